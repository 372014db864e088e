"""The paper's measures: against slow definitions, on cases with known answers, and over a whole run of its preset."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import saerelay as sr
from saerelay.analysis import attribution, similarity
from saerelay.analysis import measures as module
from saerelay.analysis.attribution import direct_logit_attribution, own_prompts
from saerelay.analysis.evaluate import evaluate
from saerelay.analysis.matrix import matrix
from saerelay.analysis.measures import comparisons_of, measures, transfer_scores, transferabilities
from saerelay.analysis.metrics import batches, held_out, measure
from saerelay.analysis.prompts import Prompt, read_prompts
from saerelay.analysis.session import Session
from saerelay.analysis.similarity import (
    TokenAssociations,
    feature_transferability,
    mean_max_cosine,
    shared,
    transfer_score,
    values_by_offset,
)
from saerelay.analysis.versions import load_versions
from saerelay.cli import main
from saerelay.data.kept import trained_on
from saerelay.errors import DataError, ModelError
from saerelay.lm.model import LanguageModel
from saerelay.runs.dictionaries import publish, read_dictionary
from saerelay.runs.documents.across_layers import Matrix, MatrixCell, Measures
from saerelay.runs.features import load_features
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.transfer import fold
from saerelay.views.tables.across_layers import measures_tables
from saerelay.workflows.report import report_run

torch.set_num_threads(1)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- between two dictionaries -----------------------------------------------------------------------------------


def test_mean_max_cosine_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    P, Q, alive_p, alive_q = randn(50, 8), randn(37, 8, seed=1) * 7, torch.arange(50) % 3 > 0, torch.arange(37) % 4 > 0
    best = [
        max(float(p @ q / p.norm() / q.norm()) for q in Q[alive_q]) for p in P[alive_p]
    ]  # fmt: skip
    expected = sum(best) / len(best)
    assert mean_max_cosine(P, Q, alive_p, alive_q) == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(similarity, "COSINES_AT_ONCE", 100)
    assert mean_max_cosine(P, Q, alive_p, alive_q) == pytest.approx(expected, abs=1e-6)


def test_equal_dictionaries_are_similar_however_they_are_ordered() -> None:
    W = randn(40, 16)
    assert mean_max_cosine(W, W) == pytest.approx(1) and mean_max_cosine(W, 3 * W[torch.randperm(40)]) == pytest.approx(
        1
    )
    assert mean_max_cosine(W, -W) < 0.9
    assert mean_max_cosine(W[:4], W) == pytest.approx(1) != mean_max_cosine(W, W[:4])
    assert math.isnan(mean_max_cosine(W, W, torch.zeros(40, dtype=torch.bool)))


def test_shared_tokens_are_counted_as_in_multisets() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 6, (200, 10), generator=generator) for _ in range(2))
    for got, x, y in zip(shared(a, b).tolist(), a.tolist(), b.tolist(), strict=True):
        both = Counter(i for i in x if i >= 0) & Counter(i for i in y if i >= 0)
        assert got == both.total()


def test_transferability_of_the_same_and_of_strangers() -> None:
    ids = [torch.randint(0, 50, (7, 10), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    one, other = TokenAssociations(*ids), TokenAssociations(*(x + 50 for x in ids))
    everything = torch.ones(7, dtype=torch.bool)
    assert feature_transferability(one, one, everything)["transferability"] == 1
    assert (
        feature_transferability(one, TokenAssociations(*(x.flip(1) for x in ids)), everything)["transferability"] == 1
    )
    assert set(feature_transferability(one, other, everything).values()) == {0}
    some = torch.arange(7) < 2
    mixed = TokenAssociations(*(torch.where(some[:, None], x, x + 50) for x in ids))
    assert feature_transferability(one, mixed, some)["transferability"] == 1
    assert feature_transferability(one, mixed, everything)["top_tokens"] == pytest.approx(2 / 7)
    assert math.isnan(feature_transferability(one, one, ~everything)["transferability"])


def test_transfer_scores() -> None:
    assert transfer_score(0.3, 0.5, 0.1) == pytest.approx(0.5) and transfer_score(0.1, 0.5, 0.1) == 1
    assert transfer_score(0.9, 0.5, 0.9) == 1 and transfer_score(0.5, 0.5, 0.1) == 0
    assert transfer_score(0.9, 0.5, 0.5) is None and transfer_score(None, 0.5, 0.1) is None


def test_averages_by_offset() -> None:
    cells = [
        MatrixCell(
            leg=f"L{s}", tokens=1, snapshot=False, source=s, target=t, method=m,
            fvu=10 * s + t + (m != "identity") / 2,
        )
        for s in range(3) for t in range(3) for m in (("identity",) if s == t else ("identity", "affine"))
    ]  # fmt: skip
    found = values_by_offset(cells, "fvu", "affine")
    assert [len(found[o]) for o in (-2, -1, 0, 1, 2)] == [1, 2, 3, 2, 1]
    assert np.mean(found[0]) == 11 and found[1] == [1.5, 12.5] and found[-2] == [20.5]
    cells[0] = cells[0].changed(fvu=None)
    assert values_by_offset(cells, "fvu", "identity")[0] == [11, 22]


def test_attribution_of_a_hand_built_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent 1 writes the right answer, latent 2 the wrong one, latent 0 nothing of either."""
    W = torch.eye(3)
    sae = Dictionary(architecture="relu", W_enc=W, b_enc=torch.zeros(3), W_dec=W, b_dec=torch.zeros(3))
    directions = torch.tensor([[0.0, 2.0, -2.0]]).expand(3, 3)
    x = torch.tensor([[5.0, 1.0, 1.0], [9.0, 3.0, 0.0], [1.0, -1.0, 4.0]])
    for n in (2**24, 3):
        monkeypatch.setattr(attribution, "ATTRIBUTIONS_AT_ONCE", n)
        scores, latents = direct_logit_attribution(sae, x, directions)
        assert scores.tolist() == [2, 6, 0] and latents.tolist()[:2] == [1, 1]


# --- a run of the paper's preset --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> sr.Suite:
    root = tmp_path_factory.mktemp("measures")
    steps = np.random.default_rng(0).integers(1, 4, size=40_000).cumsum() % 100 + 1
    np.save(root / "tokens.npy", steps.astype(np.uint16))
    data = {"tokens": str(root / "tokens.npy"), "context": 16, "block_tokens": 1024, "prepend_bos": False}
    plan = {"preset": "paper", "root_tokens": "3k", "transfer_tokens": "2k", "method": "identity", "refit": False}
    sections: dict[str, Any] = {
        "model": {"name": str(tiny_model), "dtype": "float32", "device": "cpu"},
        "data": data | {"outlier_norm": 0},
        "dictionary": {"architecture": "relu", "n_latents": 64, "l1": 0.01, "normalise": False},
        "plan": plan | {"direction": "both"},
        "train": {"batch_tokens": 64, "lr": 3e-3, "snapshots": [0.5]},
        "evaluate": {"tokens": "1k"},
    }
    suite = sr.train_run(sr.Run.parse(sections, source="test"), root / "run")
    silence(suite.directory.leg("L0"), 5)
    silence(suite.directory.snapshot("L1-from-L0", 1024), 6)
    return suite


def silence(directory: Path, latent: int) -> None:
    """Let a latent of a published dictionary never fire."""
    dictionary, info = read_dictionary(directory)
    b_enc = dictionary.b_enc.clone()
    b_enc[latent] = -1e4
    publish(directory, replace(dictionary, b_enc=b_enc), info.to_data())


@pytest.fixture(scope="module")
def model(suite: sr.Suite) -> LanguageModel:
    return suite.session.model


@pytest.fixture(scope="module")
def document(suite: sr.Suite) -> Measures:
    evaluate(suite.session)
    matrix(suite.session, tokens=512)
    return measures(suite.session)


@pytest.mark.slow
def test_a_run_has_all_pairs_and_snapshots(suite: sr.Suite, document: Measures) -> None:
    assert Measures.load(suite.directory.measures) == document
    kinds = Counter((row.kind, row.snapshot) for row in document.similarity)
    assert kinds == {
        ("suite", False): 6,
        ("hop", False): 8,
        ("hop", True): 8,
        ("scratch", False): 8,
        ("scratch", True): 8,
    }
    pairs = {(row.source, row.target) for row in document.similarity if row.kind == "suite"}
    assert pairs == set(permutations(["L0", "L1", "L2"], 2))
    assert document.transferability and document.transfer_scores and document.offsets and document.dla
    hops = {(row.leg, row.parent, row.tokens) for row in document.transferability}
    expected = {("L0-from-L1", "L1"), ("L1-from-L0", "L0"), ("L1-from-L2", "L2"), ("L2-from-L1", "L1")}
    assert hops == {(leg, parent, tokens) for leg, parent in expected for tokens in (1024, 2048)}
    scored = {(row.leg, row.scratch, row.scratch_kind, row.snapshot) for row in document.transfer_scores}
    assert scored == {(leg, leg[:2], "root", snapshot) for leg, _ in expected for snapshot in (False, True)}
    assert {row.offset for row in document.offsets} == {-2, -1, 0, 1, 2}
    assert len(document.dla.legs) == 2 * 7


@pytest.mark.slow
def test_rows_are_the_definitions_on_whole_tensors(suite: sr.Suite, model: LanguageModel, document: Measures) -> None:
    plan = suite.plan
    test = np.load(suite.directory.tokens / "test.npy")
    sequences = held_out(plan, test, 1000)
    tokens = torch.from_numpy(sequences.astype(np.int64))
    child, parent = read_dictionary(suite.directory.snapshot("L1-from-L0", 1024))[0], suite["L0"]
    sites = {"child": plan.leg("L1-from-L0").site, "parent": plan.leg("L0").site}
    x = model.harvest(tokens, sorted(sites.values()))
    z = {"child": child.encode(x[sites["child"]]), "parent": parent.encode(x[sites["parent"]])}
    alive = {key: (codes > 0).flatten(0, 1).any(dim=0) for key, codes in z.items()}
    about = ("L1-from-L0", True)
    row = next(r for r in document.similarity if (r.kind, r.source) == ("hop", "L0") and (r.leg, r.snapshot) == about)
    assert row.mmcs == pytest.approx(mean_max_cosine(parent.W_dec, child.W_dec, alive["parent"], alive["child"]))
    folded = fold(parent, suite.session.maps.between([(sites["parent"], sites["child"])]).popitem()[1])
    expected = mean_max_cosine(folded.W_dec, child.W_dec, alive["parent"], alive["child"])
    assert row.mmcs_folded == pytest.approx(expected) != row.mmcs
    row = next(r for r in document.transferability or () if (r.leg, r.snapshot) == about)
    W_U, shares = model.unembedding(), []
    both = alive["child"] & alive["parent"]
    for i in both.nonzero()[:, 0].tolist():
        n = 0
        for largest in (True, False):
            tops = [set((d.W_dec[i] @ W_U.T).topk(10, largest=largest).indices.tolist()) for d in (child, parent)]
            n += len(tops[0] & tops[1])
        said = []
        for codes in z.values():
            best, position = codes[:, :, i].max(dim=1)
            order = best.argsort(descending=True, stable=True)[:10]
            said.append(Counter(int(tokens[s, position[s]]) for s in order.tolist() if best[s] > 0))
        shares.append((n + (said[0] & said[1]).total()) / 30)
    assert row.n_latents == len(shares) and row.transferability == pytest.approx(np.mean(shares), abs=1e-6)


def test_scores_are_of_one_set_of_tokens(suite: sr.Suite, model: LanguageModel, document: Measures) -> None:
    row = next(r for r in document.transfer_scores or () if r.leg == "L1-from-L2" and r.snapshot)
    sequences = held_out(suite.plan, np.load(suite.directory.tokens / "test.npy"), 512)
    site = suite.plan.leg("L1").site
    snapshot = read_dictionary(suite.directory.snapshot("L1-from-L2", 1024))[0]
    dictionaries = {"transferred": snapshot, "zero_shot": suite["L2"], "from_scratch": suite["L1"]}
    placed = {key: (site, dictionary) for key, dictionary in dictionaries.items()}
    found = measure(suite.plan, model, sequences, placed, ce=True)
    for metric in ("fvu", "explained_variance", "ce_loss_score"):
        values = {key: getattr(found[key], metric) for key in dictionaries}
        way = (values["from_scratch"] - values["zero_shot"]) * (-1 if metric == "fvu" else 1)
        expected = pytest.approx(transfer_score(**values), rel=1e-3) if way > 0 else None
        assert getattr(row, metric) == expected


def test_a_leg_from_another_kind_of_site_has_no_score(suite: sr.Suite, document: Measures) -> None:
    """The matrix has its parent at its layer, but at the parent's kind of site."""
    assert document.transfer_scores
    versions = load_versions(suite.session, held_out(suite.plan, suite.session.corpus.test, 256), None)
    elsewhere = []
    for version in versions:
        if version.leg.id == "L0":
            version = replace(version, leg=version.leg.changed(module="mlp_out"))
        elsewhere.append(version)
    rows = transfer_scores(suite.session, elsewhere, Matrix.load(suite.directory.matrix))
    assert {row.leg for row in rows} == {row.leg for row in document.transfer_scores} - {"L1-from-L0"}


def test_attributions_are_those_of_each_prompt_alone(suite: sr.Suite, model: LanguageModel, document: Measures) -> None:
    sequences = held_out(suite.plan, np.load(suite.directory.tokens / "test.npy"), 1000)
    prompts = own_prompts(suite.plan, model, sequences)
    assert prompts and prompts == own_prompts(suite.plan, model, sequences)
    assert document.dla and len(prompts) == document.dla.n_prompts
    drawn = set()
    for seed in range(6):
        train = suite.plan.recipe.train.changed(seed=seed)
        seeded = suite.plan.changed(recipe=suite.plan.recipe.changed(train=train))
        drawn |= set(own_prompts(seeded, model, sequences, 1))
    assert 1 < len(drawn) and drawn <= set(prompts)
    row = next(r for r in document.dla.legs if r.leg == "L2" and not r.snapshot)
    dictionary, W_U = suite["L2"], model.unembedding()
    for prompt, score in zip(prompts, row.scores, strict=True):
        logits = model.logits(torch.tensor([prompt.tokens]))[0, -1]
        assert logits.topk(2).indices.tolist() == [prompt.right, prompt.wrong]
        assert any(prompt.tokens == tuple(s[: len(prompt.tokens)]) for s in sequences.tolist())
        x = model.harvest(torch.tensor([prompt.tokens]), [suite.plan.leg("L2").site]).popitem()[1][0, -1]
        effects = dictionary.encode(x) * (dictionary.W_dec @ (W_U[prompt.right] - W_U[prompt.wrong]))
        assert score == pytest.approx(float(effects.max()), abs=2e-4)


def test_the_models_own_task_takes_one_forward_per_batch(suite: sr.Suite, model: LanguageModel) -> None:
    sequences = held_out(suite.plan, np.load(suite.directory.tokens / "test.npy"), 1000)
    data = suite.plan.recipe.data.changed(outlier_norm=10.0)
    plan = suite.plan.changed(recipe=suite.plan.recipe.changed(data=data), probe=1)
    assert model.head.n_tokens  # making the head runs the model
    calls = []
    hook = model.hf_model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    own_prompts(plan, model, sequences, 10**6)
    hook.remove()
    n_batches = len(list(batches(plan, sequences, model.device, holds_logits=True)))
    assert len(calls) == n_batches > 0


def test_the_models_own_task_leaves_out_positions_that_nothing_is_trained_on(
    suite: sr.Suite, model: LanguageModel
) -> None:
    tokens = torch.arange(1, 6)[:, None]
    for _ in range(5):  # texts of which the model predicts every token
        tokens = torch.cat([tokens, model.logits(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    data = suite.plan.recipe.data.changed(prepend_bos=True, outlier_norm=1.05)
    plan = suite.plan.changed(recipe=suite.plan.recipe.changed(data=data), probe=1)
    keep = trained_on(plan, tokens, model.harvest(tokens, plan.with_probe([])))
    expected = {
        tuple(row[: i + 1].tolist()) for row, kept in zip(tokens, keep, strict=True) for i in range(5) if kept[i]
    }
    assert {prompt.tokens for prompt in own_prompts(plan, model, tokens.numpy(), 99)} == expected
    assert not keep[:, 0].any() and 0 < len(expected) < 5 * 4


def test_without_matrix_there_are_no_scores(suite: sr.Suite, document: Measures) -> None:
    kept = suite.directory.matrix.read_bytes()
    suite.directory.matrix.unlink()
    try:
        again = measures(suite.session)
    finally:
        suite.directory.matrix.write_bytes(kept)
        document.save(suite.directory.measures)
    assert again.transfer_scores is None and again.offsets is None and again.n_matrix_tokens is None
    assert again.similarity == document.similarity and len(measures_tables(again)) == 1


def test_what_was_measured_is_not_measured_again(
    suite: sr.Suite, document: Measures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_versions", None)
    assert measures(suite.session) == document
    with pytest.raises(TypeError):
        measures(suite.session, tokens=256)
    monkeypatch.setattr(Measures, "SCHEMA", Measures.SCHEMA + 1)
    with pytest.raises(TypeError):
        measures(suite.session)


def test_a_report_shows_features_and_lineage_of_the_same_tokens(
    suite: sr.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if measures of fewer tokens are out of date, and taken again for it."""
    copy = sr.load(shutil.copytree(suite.directory.root, tmp_path / "run"))
    measures(copy.session, tokens=256)
    silence(copy.directory.leg("L2"), 3)
    monkeypatch.setattr("saerelay.workflows.report.write_report", lambda sources, folder: folder)
    report_run(copy, copy.model)
    assert Measures.load(copy.directory.measures).asked.tokens == 256
    assert load_features(copy.directory, "L2").facts.n_sequences == copy.lineage().facts.n_sequences == 63


def test_a_model_without_a_head_and_a_lone_layer_have_what_there_is(
    suite: sr.Suite, model: LanguageModel, document: Measures, tmp_path: Path
) -> None:
    run = suite.plan.recipe
    plan = run.plan.changed(preset="scratch", root_tokens=1024)
    alone = run.changed(plan=plan, sites=run.sites.changed(layers=[1]))
    lone = sr.train_run(alone, tmp_path / "run")
    headless = lone.plan.facts.changed(has_lm_head=False)
    lone.plan = lone.plan.changed(facts=headless)
    found = measures(Session(lone, model=LanguageModel(model._model, headless)))
    assert found.similarity == [] and found.transferability is None and found.dla is None
    assert measures_tables(found) == []
    with pytest.raises(ModelError, match="no language-model head"):
        (tmp_path / "p.jsonl").write_text('{"prompt": [5], "correct": 7, "wrong": 8}')
        measures(Session(lone, model=LanguageModel(model._model, headless)), prompts=tmp_path / "p.jsonl")


def test_a_hop_that_took_nothing_from_its_parent_is_not_compared_with_it(
    suite: sr.Suite, model: LanguageModel, document: Measures, tmp_path: Path
) -> None:
    root = shutil.copytree(suite.directory.root, tmp_path / "run")
    path = root / "legs/L1-from-L0/dictionary.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"hop": info["hop"] | {"method": "scratch"}}))
    fell_back = sr.load(root)
    versions = load_versions(fell_back.session, held_out(suite.plan, suite.session.corpus.test, 256), None)
    compared = {(c.kind, c.about.leg.id) for c in comparisons_of(fell_back, versions)}
    assert ("hop", "L1-from-L0") not in compared and ("hop", "L1-from-L2") in compared
    assert document.transferability
    associations = TokenAssociations(*(torch.zeros(64, 10, dtype=torch.long) for _ in range(3)))
    versions = [replace(version, associations=associations) for version in versions]
    rows = transferabilities(fell_back, versions)
    assert {row.leg for row in rows} == {row.leg for row in document.transferability} - {"L1-from-L0"}


# --- prompts from a file ----------------------------------------------------------------------------------------


def test_prompts_are_read_as_text_or_ids(suite: sr.Suite, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [5, 6], "correct": 7, "wrong": [8]}\n\n')
    assert read_prompts(path, suite.plan) == [Prompt((5, 6), 7, 8)]
    demo = sr.plan_run(sr.Run.parse({}, source="test"))
    path.write_text('{"prompt": "def f(self", "correct": ")", "wrong": ","}')
    (prompt,) = read_prompts(path, demo)
    assert prompt.tokens[0] == 0 and len(prompt.tokens) > 3


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("", "holds no prompts; write one JSON object per line"),
        ("\n[1]", 'line 2: expected {"prompt"'),
        ('{"prompt": "a", "correct": "b"}', "expected {"),
        ('{"prompt": [1], "correct": [2, 3], "wrong": 4}', r'"correct" is \[2, 3\], which is 2 tokens.*must be one'),
        ('{"prompt": [1], "correct": 2, "wrong": 4096}', '"wrong" is neither text nor token ids from 0 to 100'),
        ('{"prompt": [true], "correct": 2, "wrong": 1}', '"prompt" is neither'),
        ('{"prompt": [], "correct": 2, "wrong": 1}', "the prompt is empty"),
        (f'{{"prompt": {[1] * 65}, "correct": 2, "wrong": 1}}', "has 65 tokens; .* takes at most 64"),
    ],
)
def test_bad_prompts_are_refused(
    suite: sr.Suite,
    tmp_path: Path,
    line: str,
    match: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=match):
        read_prompts(path, suite.plan)
    run = suite.directory.root
    monkeypatch.setattr("sys.argv", ["saerelay", "measures", str(run), "--prompts", str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "prompts.jsonl" in capsys.readouterr().err


def test_measures_from_outside(
    suite: sr.Suite,
    document: Measures,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [5, 6], "correct": 7, "wrong": 8}\n' * 3)
    command = ["saerelay", "eval", str(suite.directory.root), "--measures", "--prompts", str(path)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "what transfers" in shown and "normalised transfer score" in shown and "3 prompts, prompts.jsonl" in shown
    found = Measures.load(suite.directory.measures)
    assert found.similarity == document.similarity and found.dla and found.dla.prompts == "prompts.jsonl"
    scores = found.dla.legs[0].scores
    assert len(scores) == 3 and len(set(scores)) == 1
