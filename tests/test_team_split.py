"""A language model that several ranks hold together: transformers cuts it, and the same plan gives the same bits."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import spec_of
from team_worker import Ranks
from test_team import digests, log_lines, wait_for, without_seconds

from saerelay.errors import ModelError
from saerelay.files import read_json
from saerelay.lm.facts import read_facts
from saerelay.lm.split import check_whole
from saerelay.planning.facts import ModelFacts
from saerelay.site import Site

RECIPE = """
[model]
name = "{model}"
dtype = "float32"
device = "cpu"
tensor_parallel = {degree}
[data]
tokens = "{tokens}"
context = 16
block_tokens = 1024
prepend_bos = false
[dictionary]
n_latents = 64
k = 4
[train]
batch_tokens = 64
checkpoint_every = 1024
[plan]
preset = "hub"
roots = [1]
root_tokens = 6144
transfer_tokens = 2048
moment_tokens = 1024
refit_tokens = 512
[evaluate]
tokens = 512
"""


@pytest.fixture(scope="module")
def recipe(family_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A recipe for a random Llama that so many ranks hold together."""
    folder = tmp_path_factory.mktemp("split")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(4, 101, size=(1200, 16)).astype(np.uint16))

    def write(degree: int) -> Path:
        path = folder / f"{degree}.toml"
        model = family_directory("llama")
        path.write_text(RECIPE.format(model=model, tokens=folder / "tokens.npy", degree=degree))
        return path

    return write


@pytest.fixture(scope="module")
def together(recipe: Callable[[int], Path]) -> Path:
    """The run of two ranks that hold the model together, each of which tells how much of it it has."""
    pytest.importorskip("accelerate", reason="transformers asks for it to cut a model")
    folder = recipe(2).parent
    ranks = Ranks(2, folder, ["train", recipe(2), "--out", folder / "together"], tell_part)
    assert ranks.wait() == [0, 0], ranks.said()
    parts = [tuple(map(int, found)) for found in re.findall(r"(\d+) of (\d+) numbers", ranks.said())]
    assert len(parts) == 2
    for own, whole in parts:
        assert 0.5 * whole <= own < 0.6 * whole, "norms are on both ranks, all else is cut"
    return folder / "together"


def tell_part(rank: int) -> None:
    """Let the rank say how many of the model's numbers it holds."""
    from saerelay.lm.model import LanguageModel

    load = LanguageModel.load

    def told(*arguments: Any, **options: Any) -> LanguageModel:
        model = load(*arguments, **options)
        parameters = list(model.hf_model.parameters())
        own = sum(getattr(x, "to_local", lambda x=x: x)().numel() for x in parameters)
        print(f"{own} of {sum(x.numel() for x in parameters)} numbers", flush=True)
        return model

    LanguageModel.load = told


def test_the_saes_are_those_of_the_whole_model_but_for_rounding(
    recipe: Callable[[int], Path], together: Path, tmp_path: Path
) -> None:
    alone = Ranks(0, tmp_path, ["train", recipe(1), "--out", tmp_path / "alone"])
    assert alone.wait() == [0], alone.said()
    pairs = zip(log_lines(together), log_lines(tmp_path / "alone"), strict=True)
    for (cursor, leg, fvu), (cursor_alone, leg_alone, fvu_alone) in pairs:
        assert (cursor, leg) == (cursor_alone, leg_alone)
        assert fvu == pytest.approx(fvu_alone, abs=2e-3)


def test_killed_and_resumed_gives_the_bits_of_an_uninterrupted_run(
    recipe: Callable[[int], Path], together: Path, tmp_path: Path
) -> None:
    words = ["train", recipe(2), "--out", tmp_path / "run"]
    ranks = Ranks(2, tmp_path, words, dawdle)
    wait_for(tmp_path / "run/state/state.json")
    ranks.processes[1].kill()
    codes = ranks.wait(60)
    assert codes[0] == 1 and "stopped because another rank stopped" in ranks.said(), ranks.said()
    again = Ranks(2, tmp_path, words)
    assert again.wait() == [0, 0], again.said()
    assert digests(tmp_path / "run") == digests(together)


def test_a_complete_cache_needs_no_model(recipe: Callable[[int], Path], together: Path, tmp_path: Path) -> None:
    path = tmp_path / "cached.toml"
    path.write_text(recipe(2).read_text().replace("[data]", f'[data]\ncache = "{tmp_path / "cache"}"'))
    said = []
    for name in ("first", "second"):
        ranks = Ranks(2, tmp_path, ["train", path, "--out", tmp_path / name], tell_part)
        assert ranks.wait() == [0, 0], ranks.said()
        said.append(ranks.said())
    assert "numbers" in said[0] and "numbers" not in said[1]
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def dawdle(rank: int) -> None:
    """Let a run be slow enough to be killed before its end."""
    import time

    from saerelay.training import train

    end_block = train.end_block

    def slow(*arguments: Any) -> None:
        time.sleep(0.3)
        end_block(*arguments)

    train.end_block = slow


@pytest.mark.slow
def test_two_groups_give_the_bits_of_one(recipe: Callable[[int], Path], together: Path, tmp_path: Path) -> None:
    ranks = Ranks(4, tmp_path, ["train", recipe(2), "--out", tmp_path / "run"])
    assert ranks.wait() == [0] * 4, ranks.said()
    assert digests(tmp_path / "run") == digests(together)
    assert log_lines(tmp_path / "run") == log_lines(together)


@pytest.mark.slow
def test_ranks_that_hold_the_model_together_measure_what_one_process_does(together: Path, tmp_path: Path) -> None:
    documents = []
    for size in (0, 4):
        ranks = Ranks(size, tmp_path, ["eval", together, "--json"])
        assert set(ranks.wait()) == {0}, ranks.said()
        documents.append(without_seconds(read_json(together / "eval/L1.json")))
        for path in together.glob("eval/*"):
            path.unlink()
    whole, parts = (document["metrics"] for document in documents)
    for name in ("fvu", "ce_loss_with_sae", "l0"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)


def test_a_number_of_ranks_that_forms_no_groups_is_refused(recipe: Callable[[int], Path], tmp_path: Path) -> None:
    ranks = Ranks(0, tmp_path, ["train", recipe(2), "--out", tmp_path / "run"])
    assert ranks.wait(60) == [2], ranks.said()
    assert "one process cannot form groups of 2; start a multiple of 2" in ranks.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "degree", "told"),
    [
        ("gpt2", 2, "cannot be held by several ranks together: transformers has no tensor-parallel plan"),
        ("llama", 4, r"model.tensor_parallel is 4, which does not divide the 2 heads of .*num_key_value_heads"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(
    family_directory: Callable[[str], Path], family: str, degree: int, told: str
) -> None:
    with pytest.raises(ModelError, match=told):
        read_facts(spec_of(family_directory(family), tensor_parallel=degree))


def test_attention_heads_are_not_read_where_each_rank_has_its_own(family_directory: Callable[[str], Path]) -> None:
    split = read_facts(spec_of(family_directory("llama"), tensor_parallel=2))
    whole = read_facts(spec_of(family_directory("llama")))
    with pytest.raises(
        ModelError, match=r"L1.attn_z of .* cannot be read: each of the ranks .* only its own attention"
    ):
        split.check_site(Site(1, "attn_z"))
    whole.check_site(Site(1, "attn_z"))
    assert split.d_attn_z == whole.d_attn_z and split.width(Site(1, "mlp_in")) == whole.width(Site(1, "mlp_in"))


@pytest.mark.parametrize("damage", ["a part", "a summand"])
def test_activations_that_are_not_whole_on_every_rank_are_noticed(
    family_directory: Callable[[str], Path], damage: str
) -> None:
    facts: ModelFacts = read_facts(spec_of(family_directory("llama"), tensor_parallel=2))
    x = torch.randn(1, 2, 32)
    same = {Site(0): x, Site(1): x.clone()}
    check_whole([same, same, same, same], facts, 2)
    check_whole([same, same, {Site(0): x + 1}, {Site(0): x + 1}], facts, 2)  # groups are not compared
    wrong = x[..., :16] if damage == "a part" else x + 1
    with pytest.raises(ModelError, match=r"L1: the ranks that hold .* do not all have its complete activations there"):
        check_whole([same, same, same, same | {Site(1): wrong}], facts, 2)
