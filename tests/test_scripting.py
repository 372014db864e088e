"""Python as a first way in: SAEs from tensors, and suites from keyword arguments."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensor_stream import TensorStream
from transformers import AutoTokenizer, GPTNeoXForCausalLM

import saerelay as sr
from saerelay.errors import DataError, FormatError, ModelError, RecipeError, RunDirectoryError, TransferError
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.leg import Leg
from saerelay.planning.recipe import ModelSpec
from saerelay.training.engine import Trainee
from saerelay.workflows import suites, tensors

D, F, K = 16, 64, 4
KEYS = {"k": K, "n_latents": F, "batch_tokens": 64, "progress": False}


def data(n: int = 8192, seed: int = 0) -> torch.Tensor:
    """Sparse combinations of 40 directions, around a mean."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(99))
    weights = torch.rand(n, 40, generator=g) * (torch.rand(n, 40, generator=g) < 0.08)
    return weights @ directions * 20 + 50


@pytest.fixture(scope="module")
def sae() -> sr.Dictionary:
    return sr.train(data(), **KEYS)


def test_a_tensor_trains_an_sae_that_is_better_the_longer_it_trains(sae: sr.Dictionary) -> None:
    unseen = data(2048, seed=1)
    short = sr.train(data(), tokens=1024, **KEYS)
    assert sr.evaluate(sae, unseen).fvu < 0.3
    assert sr.evaluate(sae, unseen).fvu < sr.evaluate(short, unseen).fvu
    assert sr.evaluate(sae, unseen).l0 == pytest.approx(K, rel=0.01)
    again = sr.train(data(), **KEYS)
    assert torch.equal(again.W_enc, sae.W_enc)  # the same seed gives the same bits


def test_arrays_are_taken_like_tensors(sae: sr.Dictionary) -> None:
    x = data().numpy()
    assert torch.equal(sr.train(x, **KEYS).W_enc, sae.W_enc)
    assert sr.evaluate(sae, x) == sr.evaluate(sae, data())
    hopped = sr.hop(sae, x, 2 * x, tokens=0, progress=False)
    assert torch.equal(hopped.W_dec, sr.hop(sae, data(), 2 * data(), tokens=0, progress=False).W_dec)
    in_halves = [x[:5000], x[5000:]]
    assert sr.evaluate(sae, in_halves).fvu == pytest.approx(sr.evaluate(sae, x).fvu)
    sr.train(in_halves, tokens=128, **KEYS)
    half = sae.to(torch.bfloat16)
    assert sr.evaluate(half, x).fvu == pytest.approx(sr.evaluate(sae, x).fvu, rel=0.05)
    assert sr.hop(half, x, x, tokens=0).W_enc.dtype == torch.float32


def test_an_sae_is_saved_and_comes_back(sae: sr.Dictionary, tmp_path: Path) -> None:
    assert repr(sae) == "Dictionary(topk, k=4, 64 latents, width 16)"
    sr.save_dictionary(sae, tmp_path / "mine", model="me/model", site=sr.Site(5))
    again, origin = sr.load_dictionary(tmp_path / "mine")
    assert (origin.model, origin.site) == ("me/model", sr.Site(5))
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in sae.tensors().items())

    sr.save_dictionary(sae, tmp_path / "theirs", format="saelens", model="me/model", site=sr.Site(5))
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    with pytest.raises(RunDirectoryError, match="exists"):
        sr.save_dictionary(sae, tmp_path / "mine")
    with pytest.raises(FormatError, match="formats that can be written"):
        sr.save_dictionary(sae, tmp_path / "new", format="gemma_scope")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_keys_are_those_of_a_recipe(architecture: str) -> None:
    sae = sr.train(data(), architecture=architecture, target_l0=K, lr=3e-3, **KEYS)
    assert sae.architecture == architecture
    with pytest.raises(RecipeError, match='unknown key "n_latent"; did you mean "n_latents"'):
        sr.train(data(), n_latent=3)
    with pytest.raises(RecipeError, match="train: 0 tokens"):
        sr.train(data(), tokens=0, **KEYS)
    with pytest.raises(RecipeError, match="only 4 latents"):
        sr.train(data(), k=8, n_latents=4)


def test_keys_of_another_architecture_are_refused_and_k_is_the_l0_of_all() -> None:
    x = data()
    gated = sr.train(x, architecture="gated", lr=3e-3, **KEYS)
    assert sr.evaluate(gated, x).l0 == pytest.approx(K, rel=0.2)
    assert sr.train(x, target_l0=3, n_latents=F, tokens=64, progress=False).k == 3
    for keys, words in (
        ({"bandwidth": 0.1}, "topk has no bandwidth; its own keys: k, aux_weight"),
        ({"architecture": "relu", "k": 4}, "relu has no k; its own keys: l1"),
        ({"architecture": "top"}, 'unknown architecture "top"'),
        ({"architecture": "relu", "n_latents": -3}, "n_latents: .* greater than 0"),
        ({"skip_connection": True}, "skip_connection belongs to transcoders"),
        ({"tokens": -1}, "tokens: .* greater than or equal to 0"),
        ({"k": 4, "target_l0": 5}, "k and target_l0 mean the same, and differ; give one of them"),
        ({"seeds": 3}, "only a run can follow seeds; see sr.train_suite"),
    ):
        with pytest.raises(RecipeError, match=words):
            sr.train(x, progress=False, **keys)
    with pytest.raises(RecipeError, match="topk has no gate_l1"):
        sr.hop(sr.train(x, tokens="64", **KEYS), x, x, gate_l1=1.0)


def test_iterators_lists_and_streams_are_taken() -> None:
    x = data()
    unseen = data(2048, seed=1)

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield from x.split(100)

    whole = sr.evaluate(sr.train(x, **KEYS), unseen).fvu
    for found in (
        sr.train(endless(), tokens=8192, **KEYS),
        sr.train(list(x.split(1000)), **KEYS),
        sr.train(
            TensorStream({sr.Site(2): x}, block_tokens=1024, batch_tokens=64), site=sr.Site(2), tokens=8192, **KEYS
        ),
    ):
        assert sr.evaluate(found, unseen).fvu == pytest.approx(whole, rel=0.3)


def test_what_cannot_be_trained_on_says_so() -> None:
    with pytest.raises(RecipeError, match="give the budget: tokens="):
        sr.train(iter([data()]), **KEYS)
    with pytest.raises(DataError, match=r"ended after 8,192 of 99,968 tokens"):
        sr.train(iter([data()]), tokens=100_000, **KEYS)
    with pytest.raises(DataError, match=r"shape \(3, 4, 5\)"):
        sr.train(torch.zeros(3, 4, 5), **KEYS)
    with pytest.raises(RecipeError, match="say which: site="):
        sr.train(TensorStream({}, block_tokens=64, batch_tokens=64), tokens=64, **KEYS)
    with pytest.raises(DataError, match=r"train: x: activations do not vary \(the same at every token\)"):
        sr.train(torch.ones(100, D), **KEYS)
    with pytest.raises(DataError, match="train: x: activations are not all finite"):
        sr.train(data() / 0, **KEYS)
    with pytest.raises(DataError, match="train: x, target: activations do not vary"):
        sr.train(data(), target=torch.zeros(8192, D), **KEYS)
    with pytest.raises(DataError, match="tensors or arrays; found an object of the type list"):
        sr.train(data(100).tolist(), **KEYS)
    x = data(100)
    for batches in ([x, x[:, 1:]], [x, (x, x)]):
        with pytest.raises(DataError, match="a batch of the widths .* comes after one of the widths"):
            sr.train(batches, **KEYS)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [0, 2048])
def test_a_whole_hop_is_nearly_as_good_as_where_it_came_from(sae: sr.Dictionary, tokens: int) -> None:
    Q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))
    x = data()
    there = 3 * x @ Q - 7
    unseen = data(2048, seed=1)
    hopped = sr.hop(sae, x, there, tokens=tokens, batch_tokens=64, progress=False)
    at_home = sr.evaluate(sae, unseen)
    assert sr.evaluate(hopped, 3 * unseen @ Q - 7).fvu < 1.1 * at_home.fvu
    assert sr.evaluate(hopped, 3 * unseen @ Q - 7).l0 == pytest.approx(at_home.l0, rel=0.05)


def test_a_hop_may_change_the_shape_and_refuses_what_does_not_fit(sae: sr.Dictionary) -> None:
    x = data()
    wider = sr.hop(sae, x, x + 1, n_latents=96, architecture="batchtopk", k=6, tokens=0)
    assert (wider.n_latents, wider.architecture) == (96, "batchtopk")
    assert sr.evaluate(wider, x + 1).l0 == pytest.approx(6, rel=0.1)
    with pytest.raises(DataError, match="give the same tokens"):
        sr.hop(sae, x, x[:100])
    with pytest.raises(DataError, match=r"this SAE reads \(tokens, 16\)"):
        sr.hop(sae, x[:, 1:], x)
    with pytest.raises(DataError, match="hop: x_source: activations do not vary"):
        sr.hop(sae, torch.ones_like(x), x)
    with pytest.raises(DataError, match="hop: x_target: activations do not vary"):
        sr.hop(sae, x, torch.ones_like(x))
    with pytest.raises(RecipeError, match="hop: method: must be"):
        sr.hop(sae, x, x, method="random")
    with pytest.raises(RecipeError, match="skip_connection belongs to transcoders; give a target"):
        sr.hop(sae, x, x, skip_connection=True)
    with pytest.raises(TransferError, match="fits a 16-dimensional map on 20 tokens; give more than 32 rows"):
        sr.hop(sae, x[:20], x[:20])


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_a_hop_that_is_no_better_than_a_random_dictionary_is_refused(architecture: str) -> None:
    x = data()
    sae = sr.train(x, architecture=architecture, **KEYS)
    blind = replace(sae, W_enc=sae.W_enc[:1].expand(F, D).clone())  # tells nothing apart
    with pytest.raises(TransferError, match="no map is better than a random dictionary"):
        sr.hop(blind, x, x, progress=False)


@pytest.fixture
def legs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Leg, float]]:
    """The legs that are trained, each with its largest learning rate."""
    found: list[tuple[Leg, float]] = []

    def recorded(leg, spec, state) -> Trainee:
        found.append((leg, state.lr_share * leg.schedule.lr))
        return Trainee(leg, spec, state)

    monkeypatch.setattr(tensors, "Trainee", recorded)
    return found


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("topk", {}, {"k": 4, "n_latents": F}),
        ("topk", {"target_l0": 2}, {"k": 2}),
        ("topk", {"n_latents": "0.1k"}, {"n_latents": 100}),
        ("topk", {"expansion": 5}, {"n_latents": 80}),
        ("batchtopk", {"aux_weight": 0.0}, {"k": 4, "aux_weight": 0.0}),
        ("jumprelu", {"target_l0": 10, "bandwidth": 0.1}, {"target_l0": 10, "bandwidth": 0.1}),
        ("jumprelu", {"k": 3}, {"target_l0": 3}),
        ("jumprelu", {"architecture": "topk", "k": 3}, {"architecture": "topk", "k": 3}),
        ("topk", {"architecture": "jumprelu", "l0_weight": 2}, {"target_l0": 4, "l0_weight": 2}),
        ("relu", {"l1": 1.0, "method": "affine"}, {"l1": 1.0}),
    ],
)
def test_a_hop_takes_the_keys_of_the_architecture_that_it_leads_to(
    legs: list[tuple[Leg, float]], architecture: str, keys: dict, expected: dict
) -> None:
    x = data(2048)
    own = {} if architecture == "relu" else {"k": K}
    sae = sr.train(x, architecture=architecture, tokens=512, n_latents=F, batch_tokens=64, progress=False, **own)
    sr.hop(sae, x, x + 1, tokens=64, progress=False, **keys)
    found = legs[-1][0].dictionary.model_dump()
    assert {key: found[key] for key in expected} == expected


def test_a_hop_keeps_an_l0_that_is_no_whole_number(legs: list[tuple[Leg, float]]) -> None:
    x = torch.randn(4096, D, generator=torch.Generator().manual_seed(0))
    eye, zeros = torch.eye(D), torch.zeros(D)
    for threshold in (1.5, 2.2, 9.0):
        sae = sr.Dictionary(
            architecture="jumprelu", W_enc=eye, b_enc=zeros, W_dec=eye, b_dec=zeros, threshold=zeros + threshold
        )
        l0 = sr.evaluate(sae, x).l0
        if not l0:
            with pytest.raises(TransferError, match="none of the SAE's latents fires"):
                sr.hop(sae, x, x, progress=False)
            continue
        hopped = sr.hop(sae, x, 2 * x, method="affine", batch_tokens=64, progress=False)
        assert legs[-1][0].dictionary.l0 == pytest.approx(l0)
        assert sr.evaluate(hopped, 2 * x).l0 == pytest.approx(l0, rel=0.15)


def test_the_rate_of_a_hop_is_the_one_given_or_follows_from_the_map(
    sae: sr.Dictionary, legs: list[tuple[Leg, float]]
) -> None:
    x = data()

    def rate(**keys: object) -> float:
        sr.hop(sae, x, x + 1, tokens=64, progress=False, **keys)
        return legs[-1][1]

    assert rate() == rate(lr="auto") == rate(transfer_lr="auto") < 0.2 * legs[-1][0].schedule.lr
    assert rate(transfer_lr=1e-4) == rate(lr=1e-4) == rate(lr=1e-4, transfer_lr=1e-3) == 1e-4


def test_transcoders_are_trained_hopped_and_measured_on_tensors() -> None:
    x = data()
    y = (x @ torch.randn(D, D, generator=torch.Generator().manual_seed(4)) / 16).relu() + x
    transcoder = sr.train(x, target=y, skip_connection=True, **KEYS)
    assert transcoder.W_skip is not None
    quality = sr.evaluate(transcoder, x, target=y)
    assert quality.fvu < 0.3
    hopped = sr.hop(transcoder, x, 2 * x, target=(y, y - 1), tokens=0)
    assert hopped.W_skip is not None
    assert sr.evaluate(hopped, 2 * x, target=y - 1).fvu < 1.1 * quality.fvu
    plain = sr.hop(transcoder, x, 2 * x, target=(y, y - 1), tokens=0, skip_connection=False)
    again = sr.hop(plain, 2 * x, x, target=(y - 1, y), tokens=0, skip_connection=True)
    assert plain.W_skip is None and again.W_skip is not None
    assert sr.evaluate(again, x, target=y).fvu < sr.evaluate(plain, 2 * x, target=y - 1).fvu
    pairs = list(zip(x.split(512), y.split(512), strict=True))
    from_pairs = sr.train(pairs, **KEYS)
    fvu = sr.evaluate(from_pairs, x, target=y).fvu
    assert fvu < 0.5
    assert sr.evaluate(from_pairs, pairs).fvu == pytest.approx(fvu)
    with pytest.raises(RecipeError, match=r"evaluate: a target belongs to a tensor; an iterable gives pairs"):
        sr.evaluate(from_pairs, [x], target=y)


@pytest.mark.parametrize(("width", "skip_connection"), [(12, False), (12, True), (D, True)])
def test_a_transcoder_without_its_target_is_refused(width: int, skip_connection: bool) -> None:
    x = data(2048)
    y = x @ torch.randn(D, width, generator=torch.Generator().manual_seed(5))
    transcoder = sr.train(x, target=y, skip_connection=skip_connection, **KEYS)
    for use in (
        lambda: sr.evaluate(transcoder, x),
        lambda: sr.hop(transcoder, x, x),
        lambda: sr.refit(transcoder, [x]),
        lambda: sr.revive(transcoder, x),
        lambda: sr.fvu(transcoder, x),
    ):
        with pytest.raises(DataError, match="this is a transcoder: give the activations that it reconstructs"):
            use()
    with pytest.raises(DataError, match=rf"the target is 3 wide, but this SAE reconstructs {width} dimensions"):
        sr.evaluate(transcoder, x, target=y[:, :3])
    with pytest.raises(DataError, match="2048 rows of x and 5 of the target"):
        sr.hop(transcoder, x, x, target=(y, y[:5]))
    with pytest.raises(DataError, match=r"target=\(y_source, y_target\)"):
        sr.hop(transcoder, x, x, target=y)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"refit: a batch of the shape \(16,\)"):
        sr.refit(transcoder, x, target=y)


def test_a_hop_finds_a_map_to_other_widths_on_enough_rows(sae: sr.Dictionary) -> None:
    x = data()
    y = (x @ torch.randn(D, 20, generator=torch.Generator().manual_seed(6))).relu()
    wider = y @ torch.randn(20, 24, generator=torch.Generator().manual_seed(7))
    transcoder = sr.train(x, target=y, **KEYS)
    hopped = sr.hop(transcoder, x, x + 1, target=(y, wider), tokens=0)
    assert hopped.d_out == 24
    assert sr.evaluate(hopped, x + 1, target=wider).fvu < 0.8
    with pytest.raises(TransferError, match="fits a 24-dimensional map on 40 tokens; give more than 48 rows"):
        sr.hop(sae, x[:40], wider[:40], tokens=0)


# --- suites -----------------------------------------------------------------------------------------------------------

SMALL = {"n_latents": 64, "k": 4, "context": 16, "block_tokens": 1024, "root_tokens": "2k", "transfer_tokens": "1k",
         "moment_tokens": "1k", "layers": [0, 1], "batch_tokens": 64, "evaluate": {"tokens": "1k"}, "dtype": "float32",
         "device": "cpu"}  # fmt: skip


def test_a_recipe_in_code_is_the_recipe_of_a_file() -> None:
    found = sr.recipe("demo", ["notes"], k=24, layers=[3, 4], lr=1e-3, data={"context": 64})
    expected = {
        "model": {"name": "demo"}, "sites": {"layers": [3, 4]}, "dictionary": {"k": 24}, "train": {"lr": 1e-3},
        "data": {"text": ["notes"], "context": 64},
    }  # fmt: skip
    assert found == sr.Recipe.parse(expected)
    with pytest.raises(RecipeError, match=r'"tokens" is a key of data and evaluate; write data=\{"tokens": ...\} or'):
        sr.recipe("demo", tokens=5)
    with pytest.raises(RecipeError, match='unknown key "layer"; did you mean "layers"'):
        sr.recipe("demo", layer=[1])


def test_a_loaded_model_is_taken_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    """With weights that no file has."""
    model = GPTNeoXForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_4h_to_h.bias += 3
    ids = torch.randint(1, 101, (20_000,), generator=torch.Generator().manual_seed(0))
    suite = sr.train_suite(model, ids, out=tmp_path / "run", progress=False, **SMALL)
    assert sorted(suite) == ["L0", "L1"] or len(suite) == 2
    assert repr(suite) == f"Suite({tmp_path / 'run'}: {', '.join(suite)})"
    read = suite.model.hf_model.state_dict()
    assert torch.equal(
        read["gpt_neox.layers.0.mlp.dense_4h_to_h.bias"], model.state_dict()["gpt_neox.layers.0.mlp.dense_4h_to_h.bias"]
    )
    assert suite.evaluate().final_legs


def test_a_loaded_model_gets_the_tokenizer_of_its_own_commit(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    model = GPTNeoXForCausalLM.from_pretrained(tiny_model)
    tokenizer = load_tokenizer(ModelSpec())
    asked = []

    def on_the_hub(name: str, *, revision: str | None = None) -> Any:
        asked.append((name, revision))
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", on_the_hub)
    model.config._commit_hash = "a" * 40  # as transformers 5.0 sets it
    suites._write_model(model, None, tmp_path)
    assert asked == [(str(tiny_model), "a" * 40)] and (tmp_path / "tokenizer.json").is_file()


def test_a_model_is_not_mistaken_for_that_of_an_earlier_call(tiny_model: Path, tmp_path: Path) -> None:
    model = GPTNeoXForCausalLM.from_pretrained(tiny_model)
    out = tmp_path / "run"
    with pytest.raises(RecipeError, match="unknown key"):
        sr.train_suite(model, out=out, progress=False, tokenss=3, **SMALL)
    assert not out.exists()
    for _ in range(2):  # the second call finds the model that the first one wrote
        with pytest.raises(ModelError, match="no fast tokenizer"):
            sr.train_suite(model, out=out, progress=False, **SMALL)
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_4h_to_h.bias += 3
    with pytest.raises(ModelError, match="holds another model than the one given"):
        sr.train_suite(model, out=out, progress=False, **SMALL)


def test_a_model_is_compared_without_being_read(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    model = GPTNeoXForCausalLM.from_pretrained(tiny_model)
    monkeypatch.setattr(GPTNeoXForCausalLM, "from_pretrained", None)
    suites._write_model(model, None, tmp_path)
    suites._write_model(model, None, tmp_path)
    (tmp_path / "weights.json").unlink()  # as if the process had been killed while it wrote the model
    with pytest.raises(ModelError, match="or an incomplete one"):
        suites._write_model(model, None, tmp_path)


def test_token_ids_are_not_mistaken_for_those_of_an_earlier_call(tiny_model: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(1, 101, 20_000)
    out = tmp_path / "run"
    few = ids[:100]
    with pytest.raises(DataError, match="too little text|training tokens"):
        sr.train_suite(tiny_model, few, out=out, progress=False, **SMALL)
    suite = sr.train_suite(tiny_model, ids, out=out, progress=False, **SMALL)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        sr.train_suite(tiny_model, ids[::-1].copy(), out=out, progress=False, **SMALL)
    with pytest.raises(DataError, match="was begun with other token ids"):
        sr.train_suite(tiny_model, ids[::-1].copy(), out=out, resume=True, progress=False, **SMALL)
    again = sr.train_suite(tiny_model, torch.from_numpy(ids), out=out, resume=True, progress=False, **SMALL)
    assert list(again) == list(suite) and np.array_equal(np.load(out / "model/ids.npy"), ids)


def test_what_is_no_token_id_is_refused_and_nothing_written(tiny_model: Path, tmp_path: Path) -> None:
    ids = np.arange(1, 20_001) % 100
    wrong = {
        "found float64 of the shape": ids + 0.7,
        "found float32 of the shape": torch.from_numpy(ids).bfloat16(),
        "found bool of the shape": ids > 50,
        r"shape \(0,\)": ids[:0],
        "-100 is no token id": np.where(ids % 7, ids, -100),
        "8589934691 is no token id": ids + 2**33,
    }
    for match, given in wrong.items():
        with pytest.raises(DataError, match=match):
            sr.train_suite(tiny_model, given, out=tmp_path / "run", progress=False, **SMALL)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="is not empty and holds no run"):
        sr.train_suite(tiny_model, ids, out=tmp_path / "notes", progress=False, **SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["notes", "a.txt"]


def test_a_named_model_and_its_plan(tiny_model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(20_000, dtype=np.uint16) % 100)
    keys = SMALL | {"data": {"tokens": str(tmp_path / "ids.npy")}}
    with pytest.raises(DataError, match="no such file or directory"):
        sr.plan(tiny_model, "/nothing/there", **SMALL)
    with pytest.raises(DataError, match="data.tokens: no such file"):
        sr.plan(tiny_model, **SMALL | {"data": {"tokens": "/nothing/there.npy"}})
    plan = sr.plan(tiny_model, **keys)
    assert [leg.layer for leg in plan.legs] in ([1, 0], [0, 1])
    assert repr(plan) == f"Plan({tiny_model}: {', '.join(leg.id for leg in plan.legs)})"
    with pytest.raises(ModelError, match="int is not a transformers model"):
        sr.train_suite(3, out=tmp_path / "x")
    with pytest.raises(RecipeError, match="a tokenizer belongs to a model that is already loaded"):
        sr.train_suite("demo", out=tmp_path / "x", tokenizer=object())
