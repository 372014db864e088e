"""Circuits: on a transformer whose weights are set by hand, so that they are known, and against slow definitions."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import call as call_program
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import saerelay as sr
from saerelay.analysis import circuits as module
from saerelay.analysis import prompts as prompts_module
from saerelay.analysis.ablations import STEPS, circuits_at, readings
from saerelay.analysis.prompts import TASKS, Prompt, task_prompts
from saerelay.data.kept import trained_on
from saerelay.errors import DataError, RecipeError
from saerelay.lm.model import LanguageModel, load_model
from saerelay.planning.plan import Plan
from saerelay.runs.dictionaries import publish
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.circuits import Circuits
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site
from saerelay.views.tables.circuits import circuit_tables

torch.set_num_threads(1)
KEYS, FILLERS, ANSWERS, SIZE = (1, 2), (3, 4, 5, 6), (7, 8), 50.0
"""A prompt is a key and three fillers; key 1 is answered by 7, key 2 by 8."""
WRITTEN = (8, 9)
"""Where layer 0 writes which key it has seen: dimensions of the residual stream, and latents of the dictionary."""


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, 2 layers, 16 wide: token t has dimension t, and a large constant, so that norms divide by a constant.

    Layer 0 attends to all positions alike and copies dimensions 1 and 2 to 8 and 9, layer 1 does nothing.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=1, intermediate_size=16,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        for part in (*layer.self_attn.children(), *layer.mlp.children()):
            if isinstance(part, torch.nn.Linear):
                part.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(16))
    model.model.embed_tokens.weight[:, 0] = SIZE
    attention = model.model.layers[0].self_attn
    for key, written in zip(KEYS, WRITTEN, strict=True):
        attention.v_proj.weight[key, key] = SIZE / 4  # what the norm divides by
        attention.o_proj.weight[written, key] = 4
    model.lm_head.weight.zero_()
    for answer, written in zip(ANSWERS, WRITTEN, strict=True):
        model.lm_head.weight[answer, written] = SIZE
    directory = tmp_path_factory.mktemp("by-hand") / "model"
    model.save_pretrained(directory)
    return directory


def axes(order: list[int]) -> Dictionary:
    """A latent for each dimension, numbered in an order: two of them the circuit, all others distractors."""
    W = torch.eye(16)[order]
    return Dictionary(architecture="relu", W_enc=W, b_enc=torch.zeros(16), W_dec=W.clone(), b_dec=torch.zeros(16))


@pytest.fixture(scope="module")
def run(by_hand: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of it: L1, L0-from-L1, and two controls whose latents are numbered backwards."""
    root = tmp_path_factory.mktemp("run") / "run"
    np.save(tokens := root.parent / "tokens.npy", np.zeros(99, dtype=np.uint16))
    recipe = {
        "model": {"name": str(by_hand), "dtype": "float32", "device": "cpu"},
        "data": {"tokens": str(tokens), "context": 8, "prepend_bos": False, "block_tokens": 512},
        "dictionary": {"architecture": "relu", "n_latents": 16},
        "plan": {"preset": "hub", "roots": [1], "controls": [0], "root_tokens": 4096, "transfer_tokens": 1024},
        "train": {"batch_tokens": 64},
    }
    plan, paths = sr.plan_run(sr.Run.parse(recipe, source="test")), RunDirectory(root)
    plan.save(paths.plan)
    for leg in plan.legs:
        order = list(range(16))[:: -1 if leg.role == "control" else 1]
        publish(paths.leg(leg.id), axes(order), {"tokens": leg.budget_tokens})
    return root


def lines(n: int = 64, wrong: float = 0.0) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    found = []
    for i in range(n):
        key, flip = i % 2, draw.random() < wrong
        prompt = [KEYS[key], *draw.choice(FILLERS, 3).tolist()]
        found.append({"prompt": prompt, "right": ANSWERS[key ^ flip], "wrong": ANSWERS[1 - key ^ flip]})
    return found


@pytest.fixture
def task(tmp_path: Path) -> str:
    return written(tmp_path, lines())


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "keys.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def read(plan: Plan, model: LanguageModel, site: Site, *halves: list[Prompt]) -> Any:
    """Halves of the prompts as the model reads them."""
    return tuple(readings(plan, model, [site], half) for half in halves)


def call(capsys: Any, monkeypatch: Any, *arguments: object) -> tuple[int, str, str]:
    return call_program("circuits", *arguments, capsys=capsys, monkeypatch=monkeypatch)


# --- a circuit that is known ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attribution", "integrated-gradients"])
def test_the_known_circuit_is_found_and_is_all_there_is(run: Path, task: str, tmp_path: Path, method: str) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    document = sr.load(copy).circuits(task, k=[2, 1], method=method)
    assert document == Circuits.load(copy / "circuits/keys.json") and len(document.legs) == 4
    assert document.accuracy == 1.0 and (document.n_found_on, document.n_judged_on) == (32, 32)
    for row in document.legs:
        names = {15 - latent if row.role == "control" else latent for latent in row.latents}
        assert names == set(WRITTEN)
        half, whole = row.circuits
        assert (half.k, whole.k) == (1, 2) and half.faithfulness and 0.2 < half.faithfulness < 0.8
        assert whole.faithfulness == pytest.approx(1, abs=0.01)
        assert whole.completeness == pytest.approx(0, abs=0.01)
        # latents that the answer does not rest on carry nothing of it
    assert {row.leg for row in document.differences} == {"L0-from-L1"}
    for row in document.differences:  # the same latents in another order
        assert row.faithfulness == pytest.approx(0, abs=1e-4) and row.faithfulness_se == pytest.approx(0, abs=1e-4)


def test_what_else_there_is_carries_nothing(run: Path, task: str) -> None:
    plan = sr.load(run).plan
    prompts, model = task_prompts(task, plan), load_model(plan)
    others = [i for i in range(16) if i not in WRITTEN]
    dictionary = replace(axes(others), b_enc=torch.zeros(14))
    halves = read(plan, model, Site(0), prompts[:32], prompts[32:])
    found = circuits_at(model, Site(0), {"x": dictionary}, halves, k=[14])["x"]
    clean = [score(model.logits(torch.tensor([p.tokens])), p) for p in prompts[32:]]
    assert found.m_empty == pytest.approx(clean, rel=0.01)  # nothing is lost when all of them are ablated
    share, _ = module.recovered(found.m_kept[0], found.m_empty, clean)
    assert not share > 0.01  # null, if what is lost is not clear of its error


def test_effects_are_those_of_ablation_where_all_is_linear(run: Path, task: str) -> None:
    plan = sr.load(run).plan
    prompts, model, site = task_prompts(task, plan), load_model(plan), Site(0)
    halves = read(plan, model, site, prompts[:32], prompts[32:])
    found = circuits_at(model, site, {"x": axes(list(range(16)))}, halves, k=[16])["x"]
    tokens = torch.tensor([p.tokens for p in prompts[:32]])
    x = model.harvest(tokens, [site])[site]
    before = model.logits(tokens)
    for latent, effect in zip(found.latents, found.effects, strict=True):
        if latent == 0:  # the constant: ablated, it stays what it is
            assert effect == 0
            continue
        ablated = x.clone()
        ablated[..., latent] = x[..., latent].mean(dim=0)
        with model.splice(site, lambda _, ablated=ablated: ablated):
            after = model.logits(tokens)
        costs = [score(before[i], p) - score(after[i], p) for i, p in enumerate(prompts[:32])]
        assert effect == pytest.approx(np.mean(costs), abs=0.005)


# --- slow definitions -------------------------------------------------------------------------------------------


def score(logits: Tensor, prompt: Prompt) -> float:
    last = logits.reshape(-1, logits.shape[-1])[-1]
    return float(last[prompt.right] - last[prompt.wrong])


@pytest.mark.parametrize("method", ["attribution", "integrated-gradients"])
@pytest.mark.parametrize("site", [Site(0), Site(1, "mlp_out")], ids=str)
def test_effects_and_answers_are_those_of_each_prompt_alone(tiny_model: Path, site: Site, method: Any) -> None:
    """Prompts of several lengths, behind BOS, on a random model and dictionary; derivatives taken at the codes."""
    recipe = {"model": {"name": str(tiny_model), "dtype": "float32", "device": "cpu"}, "data": {"context": 16}}
    plan = sr.plan_run(sr.Run.parse(recipe, source="test"))
    model, draw = load_model(plan), torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(2, 40, 32, generator=draw)
    d = Dictionary(
        architecture="relu",
        W_enc=W_enc,
        b_enc=torch.zeros(40),
        W_dec=0.1 * W_dec,
        b_dec=torch.randn(32, generator=draw),
    )
    prompts = [
        Prompt((0, *torch.randint(1, 101, (3 + i % 3,), generator=draw).tolist()), 5 + i, 50 + i) for i in range(12)
    ]
    halves = module.halved(prompts)
    found = circuits_at(model, site, {"x": d}, read(plan, model, site, *halves), k=[3, 40], method=method)["x"]

    def at(prompt: Prompt) -> tuple[Tensor, Tensor]:
        x = model.harvest(torch.tensor([prompt.tokens]), [site])[site]
        return x, d.encode(x)

    def m(prompt: Prompt, x: Tensor) -> Tensor:
        with model.splice(site, lambda _: x):
            logits = model.hf_model(input_ids=torch.tensor([prompt.tokens])).logits[0, -1]
        return logits[prompt.right] - logits[prompt.wrong]

    mean = torch.cat([at(p)[1][0, 1:] for p in halves[0]]).mean(dim=0)
    effects = torch.zeros(40)
    for prompt in halves[0]:
        x, z = at(prompt)
        change = (mean - z).index_fill(1, torch.tensor([0]), 0.0)
        for part in [0.0] if method == "attribution" else [(i + 0.5) / STEPS for i in range(STEPS)]:
            leaf = (z + part * change).requires_grad_()
            (slope,) = torch.autograd.grad(m(prompt, x - d.decode(z) + d.decode(leaf)), leaf)
            effects -= (slope * change).sum(dim=(0, 1)) / (1 if method == "attribution" else STEPS) / 6
    best = effects.argsort(descending=True)
    assert found.latents == best.tolist()
    assert found.effects == pytest.approx(effects[best].tolist(), abs=1e-5)
    for i, prompt in enumerate(halves[1]):
        x, z = at(prompt)
        for name, n, others in (("m_empty", 0, True), ("m_kept", 3, True), ("m_ablated", 3, False)):
            ablated = torch.tensor([(j in best[:n].tolist()) != others for j in range(40)])
            changed = torch.where(ablated, mean, z)
            changed[:, 0] = z[:, 0]
            known = found.m_empty[i] if n == 0 else getattr(found, name)[0][i]
            assert known == pytest.approx(float(m(prompt, x - d.decode(z) + d.decode(changed))), abs=2e-4)
    assert found.m_ablated[1] == pytest.approx(found.m_empty, abs=1e-4)  # all 40


def test_positions_that_no_dictionary_is_trained_on_are_left_alone(tiny_model: Path) -> None:
    recipe: dict[str, Any] = {"model": {"name": str(tiny_model), "device": "cpu"}, "data": {"context": 16}}
    for prepend_bos in (True, False):
        recipe["data"]["prepend_bos"] = prepend_bos
        plan = sr.plan_run(sr.Run.parse(recipe, source="test"))
        x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
        x[1, 3] *= 100  # an attention sink, say
        expected = torch.ones(2, 6, dtype=torch.bool)
        expected[1, 3] = False
        expected[:, 0] = not prepend_bos
        found = trained_on(plan, torch.ones(2, 6, dtype=torch.long), dict.fromkeys(plan.with_probe([]), x))
        assert torch.equal(found, expected)


def test_standard_errors_are_those_of_repeated_draws() -> None:
    draw = np.random.default_rng(0)
    shares, errors = [], []
    for _ in range(400):
        clean = draw.normal(3, 1, 60)
        empty, kept = draw.normal(0.5, 0.5, 60), 0.7 * clean + draw.normal(0, 0.5, 60)
        share, parts = module.recovered(kept.tolist(), empty.tolist(), clean.tolist())
        shares.append(share)
        errors.append(module.standard_error(parts))
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.15)
    assert np.isnan(module.recovered([1.0, 2.0], [1.0, 1.0], [1.0, 1.0])[0])


# --- the command ------------------------------------------------------------------------------------------------


def test_a_stopped_call_goes_on_and_gives_the_same(run: Path, task: str, tmp_path: Path, monkeypatch) -> None:
    whole, stopped = (shutil.copytree(run, tmp_path / name) for name in ("whole", "stopped"))
    expected = sr.load(whole).circuits(task, k=[2])
    assert sr.load(shutil.copytree(run, tmp_path / "again")).circuits(task, k=[2]) == expected
    seen, real = list[Site](), module.circuits_at

    def counted(model: LanguageModel, site: Site, *rest: Any, **options: Any) -> Any:
        seen.append(site)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(model, site, *rest, **options)

    monkeypatch.setattr(module, "circuits_at", counted)
    with pytest.raises(KeyboardInterrupt):
        sr.load(stopped).circuits(task, k=[2])
    assert [row.layer for row in Circuits.load(stopped / "circuits/keys.json").legs] == [0, 0, 0]
    assert sr.load(stopped).circuits(task, k=[2]) == expected
    assert (stopped / "circuits/keys.json").read_bytes() == (whole / "circuits/keys.json").read_bytes()
    assert seen == [Site(0), Site(1), Site(1)]
    sr.load(stopped).circuits(task, k=[2])
    assert len(seen) == 3  # all was there
    sr.load(stopped).circuits(task, k=[1], legs=["L1"])
    assert seen[3:] == [Site(1)] and len(Circuits.load(stopped / "circuits/keys.json").legs) == 1  # another question


def test_the_command_shows_and_writes(run: Path, task: str, tmp_path: Path, capsys, monkeypatch) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    asked = (copy, "--task", task, "--k", "1,2", "--leg", "0")
    code, shown, _ = call(capsys, monkeypatch, *asked, "--leg", "L0-scratch-full")
    assert code == 0 and "answers 100.0% of 64 prompts right" in " ".join(shown.split())
    assert "1.00 ± 0.00" in shown and "K = 2" in shown and "− from scratch" in shown
    code, shown, _ = call(capsys, monkeypatch, *asked, "--json")
    document = Circuits.load(copy / "circuits/keys.json")
    assert code == 0 and json.loads(shown) == document.to_data()
    unknown = document.legs[0].circuits[0].changed(faithfulness=None, faithfulness_se=None)
    first = document.legs[0].changed(circuits=[unknown, *document.legs[0].circuits[1:]])
    _, table, *_ = circuit_tables(document.changed(legs=[first, *document.legs[1:]]))
    assert [list(column.cells)[0] for column in table.columns][2] == "-"  # type: ignore[union-attr]


def test_what_a_model_cannot_do_is_said(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    task = written(tmp_path, lines(wrong=0.5))
    code, shown, stderr = call(capsys, monkeypatch, run, "--task", task, "--k", "2")
    assert (code, shown) == (2, "") and "Traceback" not in stderr and not (run / "circuits").exists()
    assert "cannot do" in stderr and "of 64 prompts right (70% are" in " ".join(stderr.split())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--task", "chess"], 'unknown task "chess"; expected one of: ioi,'),
        (["--task", "ioi"], "tokenizer"),
        (["--k", "0"], "must be from 1 to 16"),
        (["--k", "17"], "must be from 1 to 16"),
        (["--k", "4,x"], "expected numbers separated by commas, such as 4,36"),
        (["--method", "guess"], "expected one of: attribution, integrated-gradients"),
        (["--leg", "L9"], 'no leg "L9"'),
        (["--prompts", "3"], "at least 8 are needed"),
    ],
)
def test_what_is_asked_wrongly_is_said(
    run: Path, task: str, options: list[str], match: str, capsys, monkeypatch
) -> None:
    given = [run, *options] if "--task" in options else [run, "--task", task, *options]
    code, shown, stderr = call(capsys, monkeypatch, *given, *([] if "--k" in options else ["--k", "2"]))
    assert (code, shown) == (2, "") and match in " ".join(stderr.replace("│", " ").split()), stderr


def test_a_file_is_read_in_an_order_drawn(run: Path, task: str) -> None:
    plan = sr.load(run).plan
    asked = [Prompt(tuple(row["prompt"]), row["right"], row["wrong"]) for row in lines()]
    prompts = task_prompts(task, plan, seed=1)
    assert sorted(map(str, prompts)) == sorted(map(str, asked)) and prompts == task_prompts(task, plan, seed=1)
    assert asked != prompts != task_prompts(task, plan, seed=2) and len(task_prompts(task, plan, 20)) == 20


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("not JSON", 'line 2: expected {"prompt"'),
        ('{"prompt": [1], "right": 7}', "line 2: expected {"),
        ('{"prompt": [1], "right": [7, 8], "wrong": 8}', 'line 2: "right" is .* 2 tokens'),
        ('{"prompt": [1], "right": 16, "wrong": 8}', 'line 2: "right" is neither text nor token ids from 0 to 15'),
        ('{"prompt": [], "right": 7, "wrong": 8}', "line 2: the prompt is empty"),
        ('{"prompt": "\\u2028", "right": 7, "wrong": 8}', "tokenizer"),
        ("", "1 prompts; at least 8 are needed"),
    ],
)
def test_bad_lines_are_named(run: Path, tmp_path: Path, line: str, match: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(lines(1)[0]) + "\n" + line)
    with pytest.raises((DataError, sr.SaeRelayError), match=match):
        task_prompts(str(path), sr.load(run).plan)


# --- prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["brackets", "quotes", "self"])
def test_built_in_tasks_are_balanced_seeded_and_of_single_tokens(task: str) -> None:
    plan = sr.plan_run(sr.Run.parse({}, source="test"))
    prompts = task_prompts(task, plan, 60, seed=3)
    assert prompts == task_prompts(task, plan, 60, seed=3) != task_prompts(task, plan, 60, seed=4)
    assert len(prompts) == len({prompt.tokens for prompt in prompts}) == 60
    assert len({len(prompt.tokens) for prompt in prompts}) == 1 and {prompt.tokens[0] for prompt in prompts} == {0}
    answers = [(prompt.right, prompt.wrong) for prompt in prompts]
    first = answers[0]
    assert answers.count(first) == answers.count(first[::-1]) == 30


def test_prompts_are_read_by_the_tokenizer_of_the_runs_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sr.plan_run(sr.Run.parse({}, source="test"))
    load = prompts_module.load_tokenizer
    revisions = []

    def load_and_tell(spec: Any) -> Any:
        revisions.append(spec.revision)
        return load(spec.changed(revision=""))

    monkeypatch.setattr(prompts_module, "load_tokenizer", load_and_tell)
    pinned = plan.changed(facts=plan.facts.changed(revision="abc"))
    task_prompts("brackets", pinned, 8)
    prompts_module._PromptReader(pinned).read('{"prompt": "a", "right": 7, "wrong": 8}', source="line 1")
    assert revisions == ["abc", "abc"]


class Words:
    """A tokenizer for which words, two-digit numbers and the parts of a year are tokens."""

    def __init__(self) -> None:
        self.known = dict[str, int]()

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self.known.setdefault(word, len(self.known)) for word in re.findall(r" ?[A-Za-z]+| ?\d\d| ?\S| ", text)]


@pytest.mark.parametrize(("task", "group"), [("ioi", 4), ("greater-than", 1), ("sva", 4)])
def test_english_tasks_ask_what_they_say(run: Path, task: str, group: int, monkeypatch) -> None:
    words = Words()
    monkeypatch.setattr("saerelay.analysis.prompts.load_tokenizer", lambda _: words)
    prompts = task_prompts(task, sr.load(run).plan, 40, seed=0)
    text = {i: word for word, i in words.known.items()}
    assert len(prompts) == 40 and len(set(prompts)) == 40
    for i in range(0, 40, group):
        here = prompts[i : i + group]
        for prompt in here:
            said = "".join(text[t] for t in prompt.tokens)
            right, wrong = text[prompt.right], text[prompt.wrong]
            if task == "ioi":
                assert said.count(wrong.strip()) == 2 and said.count(right.strip()) == 1
            if task == "greater-than":
                assert int(wrong) < int(said.split(" to ")[0][-2:]) < int(right)
            if task == "sva":
                assert (right in (" are", " were", " have")) == said.split()[1].endswith("s")
        assert sorted(p.right for p in here) == sorted(p.wrong for p in here) or group == 1


YEARS = {
    "two digits": (r"\d\d", 2),
    "each digit": (r"\d", 1),
    "three digits": (r"\d{1,3}", 1),
}
"""What a tokenizer makes a token of in a year, and how many digits of a year the answer is then."""


def splitting_years(pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words and of digits as a pattern splits them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    split = Regex(rf"{pattern}| ?[A-Za-z]+| ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(split, behavior="isolated")  # type: ignore[assignment]
    words = [f"The {event} lasted from the year 1 to the year" for event in prompts_module._EVENTS.split()]
    numbers = [f"{i:0{n}}" for n in (1, 2, 3, 4) for i in range(min(10**n, 2000))]
    tokenizer.train_from_iterator([*words, *numbers], trainers.WordLevelTrainer(special_tokens=["?"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@pytest.mark.parametrize("way", YEARS)
def test_greater_than_is_asked_however_a_tokenizer_splits_years(run: Path, way: str, monkeypatch) -> None:
    pattern, n_digits = YEARS[way]
    tokenizer = splitting_years(pattern)
    monkeypatch.setattr(prompts_module, "load_tokenizer", lambda _: tokenizer)
    plan = sr.load(run).plan
    for prompt in task_prompts("greater-than", plan, 40):
        tokens = tokenizer.convert_ids_to_tokens(list(prompt.tokens[len(prompts_module.start_of(plan)) :]))
        right, wrong = tokenizer.convert_ids_to_tokens([prompt.right, prompt.wrong])
        assert "?" not in (*tokens, right, wrong)
        began, so_far = re.findall(r"\d+", "".join(tokens))
        assert (len(began), len(so_far), len(right), len(wrong)) == (4, 4 - n_digits, n_digits, n_digits)
        assert int(so_far + wrong) < int(began) < int(so_far + right)


def test_greater_than_says_why_it_cannot_be_asked(run: Path, monkeypatch) -> None:
    tokenizer = splitting_years(r"\d+")  # a year is one token
    monkeypatch.setattr(prompts_module, "load_tokenizer", lambda _: tokenizer)
    with pytest.raises(DataError, match="no token of this tokenizer tells a later year from an earlier one"):
        task_prompts("greater-than", sr.load(run).plan)


@pytest.mark.slow
def test_a_task_that_a_tokenizer_has_no_words_for_is_said() -> None:
    plan = sr.plan_run(sr.Run.parse({}, source="test"))
    for task in set(TASKS) - {"brackets", "quotes", "self"}:
        with pytest.raises(DataError, match="Give a file of prompts instead"):
            task_prompts(task, plan)
    with pytest.raises(DataError, match="ask for fewer with --n-prompts"):
        task_prompts("self", plan, 1000)
    with pytest.raises(RecipeError, match="unknown task"):
        task_prompts("keys.csv", plan)
