"""What users write: counts, unknown keys, the annotated recipe."""

import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saerelay.errors import PlanError, RecipeError
from saerelay.planning.leg_spec import LegSpec, tokens_of
from saerelay.planning.recipe import Recipe
from saerelay.planning.toml import annotated_toml
from saerelay.sae.architectures import ARCHITECTURES
from saerelay.site import MODULE_KINDS, Site
from saerelay.spec import Spec, format_count, parse_count

KEYS = {
    "model": "name revision dtype device trust_remote_code gguf_file adapter tensor_parallel",
    "sites": "layers module module_out",
    "data": "dataset subset split column revision text tokens context prepend_bos epochs outlier_norm "
    "cache block_tokens",
    "dictionary": "architecture normalise skip_connection matryoshka expansion n_latents k aux_weight target_l0 "
    "l0_weight bandwidth gate_l1 l1",
    "plan": "preset budget fvu_ratio survey_tokens stop roots direction root_tokens root_reuse transfer_tokens "
    "method refit moment_tokens refit_tokens fork_at parents reuse controls control_kinds tiers tier_tokens",
    "train": "batch_tokens precision lr transfer_lr encoder_lr bias_lr betas balance whitening warmup "
    "sparsity_warmup decay clip dead_after seed seeds checkpoint_every snapshots memory_gib loggers",
    "evaluate": "tokens ce",
}
"""Every key of a recipe; taking one away or renaming it breaks what users have written."""


@pytest.mark.parametrize(
    ("text", "n"),
    [("50M", 50_000_000), ("1.5B", 1_500_000_000), ("250k", 250_000), ("12", 12), ("1_000", 1000), (7, 7)],
)
def test_counts(text: object, n: int) -> None:
    assert parse_count(text) == n


@pytest.mark.parametrize("text", ["50 millions", "M", "1.5", "-3k", "1e6", ""])
def test_no_counts(text: str) -> None:
    with pytest.raises(ValueError, match="is not a (valid count|whole number)"):
        parse_count(text)


@given(st.integers(1, 999), st.sampled_from(["", "k", "M", "B"]))
def test_counts_come_back(n: int, suffix: str) -> None:
    assert parse_count(format_count(parse_count(f"{n}{suffix}"))) == parse_count(f"{n}{suffix}")  # type: ignore[arg-type]


def test_annotated_recipe_is_the_defaults_with_every_key_uncommented() -> None:
    data = tomllib.loads(annotated_toml(Recipe()))
    assert Recipe.parse(data, source="run.toml") == Recipe()
    assert {section: set(keys) for section, keys in data.items()} == {
        section: set(keys.split()) for section, keys in KEYS.items()
    }


def test_the_annotated_recipe_says_auto_where_a_value_is_chosen_later() -> None:
    data = tomllib.loads(annotated_toml(Recipe()))
    for section, key in (("train", "bias_lr"), ("train", "lr"), ("plan", "survey_tokens"), ("data", "block_tokens")):
        assert data[section][key] == "auto"


def test_any_recipe_survives_being_written() -> None:
    run = Recipe.parse(
        {"sites": {"layers": [1, 2]}, "train": {"lr": 3e-5, "snapshots": [0, 0.5, "2M"]}, "plan": {"fork_at": "1M"}},
        source="x",
    )
    assert Recipe.parse(tomllib.loads(annotated_toml(run)), source="x") == run


def error_of(data: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(data, source="run.toml")
    return str(caught.value)


def test_errors_name_the_key_and_the_remedy() -> None:
    assert error_of({"plan": {"presset": "hub"}}) == 'run.toml: unknown key "plan.presset"; did you mean "preset"?'
    for section, key in (("dictionary", "activation"), ("train", "optimizer"), ("plan", "hop")):  # names in code only
        assert error_of({section: {key: "topk"}}).startswith(f'run.toml: unknown key "{section}.{key}"; ')
        assert error_of({section: {key: "topk"} | ({"k": 8} if section == "dictionary" else {})}).count("unknown") == 1
    assert 'unknown key "trian"; did you mean "train"?' in error_of({"trian": {}})
    assert "valid keys: name, revision" in error_of({"model": {"xyz": 1}})
    assert "sites.module" in error_of({"sites": {"module": "resid"}}) and "'resid_post'" in error_of(
        {"sites": {"module": "q"}}
    )
    assert "sites.layers: must be 'all', or a list, in [ ] (found '4-7')" in error_of({"sites": {"layers": "4-7"}})
    assert '"5 mil" is not a valid count' in error_of({"plan": {"root_tokens": "5 mil"}})
    assert "dataset and text are given; keep one" in error_of({"data": {"dataset": "a", "text": ["b"]}})
    assert 'plan.legs.0.layers"; did you mean "layer"?' in error_of(
        {"plan": {"legs": [{"id": "a", "layers": 1, "tokens": 5}]}}
    )
    assert "plan.legs.0.id" in error_of({"plan": {"legs": [{"id": "../x", "layer": 1, "tokens": 5}]}})


ODD: list[tuple[str, str, Any, str]] = [
    ("sites", "layers", [3, 3], "sites.layers: 3 is listed twice in [3, 3]; name it once"),
    ("sites", "layers", [0.5], "sites.layers.0: must be a whole number (found 0.5)"),
    ("sites", "layers", {"a": 1}, "sites.layers: must be 'all', or a list, in [ ] (found a table)"),
    ("sites", "layers", [True], "sites: layers takes numbers, not true or false (found [true])"),
    (
        "sites",
        "module",
        ["mlp_in", "mlp_in"],
        "sites.module: 'mlp_in' is listed twice in ['mlp_in', 'mlp_in']; name it",
    ),
    ("plan", "tiers", [4, 4], "plan.tiers: 4 is listed twice in [4, 4]; name it once"),
    ("plan", "roots", [1, 1], "plan.roots: 1 is listed twice"),
    ("plan", "controls", [1, 1], "plan.controls: 1 is listed twice"),
    ("plan", "controls", "1", "plan.controls: must be a list, in [ ] (found '1')"),
    ("plan", "legs", ["a"], "plan.legs.0: must be a table of keys (found 'a')"),
    ("plan", "legs", [{"layer": 1, "tokens": 5}], "plan.legs.0.id: is missing"),
    ("plan", "tiers", True, "plan: tiers takes numbers, not true or false (found true)"),
    ("train", "snapshots", [True], "train: snapshots takes numbers, not true or false (found [true])"),
    ("plan", "root_tokens", True, "plan: root_tokens takes numbers, not true or false (found true)"),
    ("plan", "hop", {"method": "affine"}, "plan: hop is no key; write the keys of this table directly in the section"),
    ("plan", "reuse", 10**6, "plan.reuse: must be less than or equal to 1000 (found 1000000)"),
    ("dictionary", "activation", {"name": "topk"}, 'unknown key "dictionary.activation"; valid keys: architecture,'),
    ("dictionary", "expansion", 1e300, "dictionary.expansion: must be less than or equal to 1000000"),
    ("dictionary", "k", "eight", "dictionary.k: must be a whole number (found 'eight')"),
    ("train", "lr", -1.0, "train.lr: must be greater than 0, or 'auto' (found -1.0)"),
    ("train", "lr", math.nan, "train.lr: must be a finite number, or 'auto' (found nan)"),
    ("train", "seeds", 10**9, "train.seeds: must be less than or equal to 1000"),
    ("train", "seed", 10**23, "train.seed: must be less than or equal to"),
    (
        "train",
        "batch_tokens",
        "lots",
        '"lots" is not a valid count; write a number, or one with k, M or B: "250k", "50M"',
    ),
    ("model", "name", "", "model.name: must have at least 1 character (found '')"),
]


@pytest.mark.parametrize(("section", "key", "value", "told"), ODD)
def test_odd_values_get_one_line_that_names_the_key(section: str, key: str, value: Any, told: str) -> None:
    message = error_of({section: {key: value}})
    assert message.startswith("run.toml: ") and told in message and "\n" not in message
    for word in ("Input", "Spec", "constrained", "dictionary or instance"):  # the words of pydantic and of the code
        assert word not in message


def numbers_of(cls: type[Spec]) -> list[str]:
    """The keys of a spec, inline parts included, whose value is a number."""
    found = []
    for name, field in cls.model_fields.items():
        if name in cls.inline:
            found += numbers_of(cls.part(name, {}))
        elif re.search(r"\b(int|float)\b", str(field.annotation)):
            found.append(name)
    return found


LEG = {"id": "a", "layer": 1, "tokens": 5, "parent": "b", "control_of": "c"}
SECTIONS: list[tuple[type[Spec], str, Callable[[dict], dict]]] = [
    *[(type(section), name, lambda keys, name=name: {name: keys}) for name, section in Recipe()],
    (LegSpec, "plan.legs.0", lambda keys: {"plan": {"legs": [LEG | keys]}}),
    *[
        (kind, "dictionary", lambda keys, kind=kind: {"dictionary": {"architecture": kind.name} | keys})
        for kind in ARCHITECTURES
    ],
]


@pytest.mark.parametrize(("cls", "section", "recipe_with"), SECTIONS)
def test_true_and_false_are_no_numbers(cls: type[Spec], section: str, recipe_with: Callable[[dict], dict]) -> None:
    for key in numbers_of(cls):
        for value in (True, False, [True]):
            told = f"{key} takes numbers, not true or false (found {str(value).lower()})"
            assert error_of(recipe_with({key: value})) == f"run.toml: {section}: {told}"


LAYERS = {"layers", "roots", "controls", "layer", "shared_layers"}
"""Keys that are bounded by the model's layers, when a recipe is planned."""


@pytest.mark.parametrize(("cls", "section", "recipe_with"), SECTIONS)
def test_no_number_is_without_bounds(cls: type[Spec], section: str, recipe_with: Callable[[dict], dict]) -> None:
    for key in set(numbers_of(cls)) - LAYERS:
        for value in (10**400, [10**400, 10**400]):
            message = error_of(recipe_with({key: value}))
            assert message.startswith(f"run.toml: {section}.{key}") and "must be" in message and len(message) < 1000


def test_a_section_is_a_table() -> None:
    assert error_of({"model": "demo"}) == "run.toml: model: must be a table of keys (found 'demo')"


def test_recipe_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file. Write one with `saerelay init"):
        Recipe.from_toml(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("[plan\n")
    for path in (r"C:\Users\me", r"D:\texts\new"):
        (tmp_path / "windows.toml").write_text(f'[data]\ntext = ["{path}"]\n')
        with pytest.raises(RecipeError, match="write Windows paths in single quotes"):
            Recipe.from_toml(tmp_path / "windows.toml")
    with pytest.raises(RecipeError, match="not valid TOML"):
        Recipe.from_toml(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_toml(tmp_path / "binary.toml")


def test_learning_rates_may_be_auto() -> None:
    assert Recipe.parse({"train": {"lr": "auto", "transfer_lr": 1e-4}}, source="x").train.optimizer.transfer_lr == 1e-4


def test_shares_and_counts() -> None:
    assert [tokens_of(v, 1000) for v in (0.25, 1.0, 1, 40)] == [250, 1000, 1, 40]
    written = [0, 1, 0.25, 1.0, 40, 3e6, "2k"]  # nobody means a single token by 1
    ages = Recipe.parse({"train": {"snapshots": written}}).train.snapshots
    assert [tokens_of(age, 1000) for age in ages] == [0, 1000, 250, 1000, 40, 3_000_000, 2000]


@pytest.mark.parametrize("value", [1.5, -1, -0.5, math.inf, math.nan])
def test_what_is_neither_a_share_nor_a_count(value: float) -> None:
    expected = "must be a share, from 0 to 1, or a whole number of tokens"
    assert f"plan.fork_at: {expected} (found {value})" in error_of({"plan": {"fork_at": value}})
    assert f"train.snapshots.1: {expected}" in error_of({"train": {"snapshots": [0.5, value]}})
    leg = {"id": "a", "layer": 1, "tokens": 5, "parent": "b", "fork_at": value}
    assert f"plan.legs.0.fork_at: {expected}" in error_of({"plan": {"legs": [leg]}})


@pytest.mark.parametrize(
    ("section", "key"),
    [("data", "block_tokens"), ("plan", "tier_tokens"), ("plan", "survey_tokens"), ("train", "dead_after")],
)
def test_no_count_is_negative(section: str, key: str) -> None:
    assert f"{section}.{key}: must be greater than 0, or 'auto' (found -64)" in error_of({section: {key: -64}})


def test_every_dictionary_has_a_latent() -> None:
    spec = Recipe.parse({"dictionary": {"architecture": "relu", "expansion": 0.001}}).dictionary
    assert spec.sized(192).n_latents == 1


@given(st.integers(0, 200), st.sampled_from(MODULE_KINDS))
def test_sites_come_back_from_text(layer: int, module) -> None:
    assert Site.parse(str(Site(layer, module))) == Site(layer, module)


@pytest.mark.parametrize("text", ["3", "L3.mlp", "L-1", "L3.mlp_out.x", "l3"])
def test_texts_that_are_no_site(text: str) -> None:
    with pytest.raises(PlanError, match='invalid site "'):
        Site.parse(text)


def test_impossible_sites() -> None:
    with pytest.raises(PlanError, match="'L3' is not; Site.parse reads"):
        Site("L3")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match='unknown module "mlp"; expected one of: resid_post'):
        Site(1, "mlp")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="negative"):
        Site(-1)
