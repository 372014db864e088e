"""Python as a first way in: SAEs from tensors, and suites from keyword arguments."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTNeoXForCausalLM

import saerelay as sr
from saerelay.data.stream import TensorStream
from saerelay.errors import DataError, FormatError, ModelError, RecipeError, RunDirectoryError, TransferError

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
    with pytest.raises(RecipeError, match="only 4 latents"):
        sr.train(data(), k=8, n_latents=4)


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
    blind = replace(sae, W_enc=sae.W_enc[:1].expand(F, D).clone())  # tells nothing apart
    with pytest.raises(TransferError, match="no map is better than a random dictionary"):
        sr.hop(blind, x, x, progress=False)


def test_transcoders_are_trained_hopped_and_measured_on_tensors() -> None:
    x = data()
    y = (x @ torch.randn(D, D, generator=torch.Generator().manual_seed(4)) / 16).relu() + x
    transcoder = sr.train(x, target=y, skip_connection=True, **KEYS)
    assert transcoder.W_skip is not None
    quality = sr.evaluate(transcoder, x, target=y)
    assert quality.fvu < 0.3
    hopped = sr.hop(transcoder, x, 2 * x, target=(y, y - 1), tokens=0)
    assert sr.evaluate(hopped, 2 * x, target=y - 1).fvu < 1.1 * quality.fvu
    pairs = list(zip(x.split(512), y.split(512), strict=True))
    assert sr.evaluate(sr.train(pairs, **KEYS), x, target=y).fvu < 0.5


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
