"""Damaged and hostile files, and recipes that nobody can mean: one message, soon, in little memory."""

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saerelay.errors import FormatError, PlanError, RecipeError, RunDirectoryError
from saerelay.files import MAX_DEPTH, is_deep, read_json, read_text
from saerelay.interop import load_dictionary, read_any
from saerelay.planning.compile import compile_plan
from saerelay.planning.cost import plan_cost
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.runs.dictionaries import read_dictionary

F, D = 16, 8
Call = Callable[..., tuple[int, str]]


# --- archives that unpack to more than there is -----------------------------------------------------------------------


def gemma_scope(place: Path) -> Path:
    folder = place / "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_4"
    folder.mkdir(parents=True)
    return folder


def test_an_npz_that_unpacks_to_a_thousand_times_its_size_is_not_unpacked(tmp_path: Path) -> None:
    folder = gemma_scope(tmp_path)
    np.savez_compressed(folder / "params.npz", w_enc=np.zeros((8, 2**22), np.float32))
    with pytest.raises(FormatError, match=r"has [\d,]+ bytes and says that it unpacks to 134,217,\d+"):
        read_any(folder)


def test_an_npz_whose_header_claims_terabytes_allocates_nothing(tmp_path: Path) -> None:
    folder = gemma_scope(tmp_path)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 8), }".ljust(117) + b"\n"
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("w_enc.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(FormatError, match="unpacks to 35,184,372,088,832"):
        read_any(folder)


# --- tensors that are none --------------------------------------------------------------------------------------------

ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "csr": lambda tensor: tensor.to_sparse_csr(),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "no values": lambda tensor: tensor.to("meta"),
    "repeats": lambda tensor: torch.zeros(1).expand(2**20, 2**20),
    "complex": lambda tensor: tensor.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_refused(tmp_path: Path, kind: str) -> None:
    state = {
        "encoder.weight": ODD[kind](torch.randn(F, D)),
        "encoder.bias": torch.zeros(F),
        "decoder.weight": torch.randn(D, F),
        "b_dec": torch.zeros(D),
        "k": torch.tensor(4),
    }
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match=f"tensor encoder.weight .*{kind}"):
        read_any(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "ae.pt").write_bytes(pickle.dumps({"W": Evil()}))
    with pytest.raises(FormatError):
        read_any(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- our own format is checked like foreign ones ----------------------------------------------------------------------


def own(place: Path, **changes: Any) -> Path:
    """A directory in our format, with other values in its JSON; None removes a key."""
    place.mkdir(exist_ok=True)
    shapes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, place / "dictionary.safetensors")
    info: dict[str, Any] = {"schema": 2, "architecture": "topk", "k": 4, "d_model": D, "n_latents": F}
    info |= {"layer": 1, "module": "resid_post", "model": "demo"} | changes
    text = json.dumps({key: value for key, value in info.items() if value != "absent"})
    (place / "dictionary.json").write_text(text)
    return place


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": "x"}, "k: Input should be a valid integer"),
        ({"k": 0}, "k is 0, expected a whole number from 1 to 16"),
        ({"k": 17}, "k is 17, expected a whole number from 1 to 16"),
        ({"k": None}, "k is None, expected"),
        ({"layer": "x"}, "layer: Input should be a valid integer"),
        ({"layer": -1}, "layer: Input should be greater"),
        ({"module": "absent"}, "layer is 1 and module is None; give both or neither"),
        ({"module": "mlp"}, "module: Input should be 'resid_post'"),
        ({"architecture": "gelu"}, 'unknown architecture "gelu"'),
        ({"architecture": "jumprelu"}, "tensor threshold is missing"),
        ({"d_model": 2**40}, "has shape"),
        ({"digests": {"W_enc": "00"}}, "is not the one that dictionary.json was written for"),
    ],
    ids=str,
)
def test_our_own_format_is_checked(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    assert read_dictionary(own(tmp_path / "good"))
    with pytest.raises(RunDirectoryError, match=re.escape(says)):
        load_dictionary(own(tmp_path / "bad", **changes))


@pytest.mark.parametrize("fault", ["half", "not finite", "another tensor", "missing"])
def test_our_own_tensors_are_checked(tmp_path: Path, fault: str) -> None:
    path = own(tmp_path) / "dictionary.safetensors"
    tensors = {"W_enc": torch.randn(F, D), "b_enc": torch.zeros(F), "W_dec": torch.randn(F, D), "b_dec": torch.zeros(D)}
    says = {"half": "W_enc is of type F16", "not finite": "W_enc has values that are not finite"}
    if fault == "half":
        tensors["W_enc"] = tensors["W_enc"].half()
    elif fault == "not finite":
        tensors["W_enc"][3, 3] = float("nan")
    elif fault == "another tensor":
        tensors["W_gate"] = torch.zeros(F)
    else:
        del tensors["b_dec"]
    save_file(tensors, path)
    with pytest.raises(RunDirectoryError, match=says.get(fault, r"W_gate|b_dec is missing")):
        read_dictionary(tmp_path)


# --- JSON and TOML ----------------------------------------------------------------------------------------------------


def test_nesting_is_bounded(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    assert is_deep(deep) and not is_deep(deep[0][0])
    path = tmp_path / "cfg.json"
    for depth in (MAX_DEPTH + 2, 100_000):
        path.write_text('{"a": ' + "[" * depth + "]" * depth + "}")
        (tmp_path / "sae_weights.safetensors").touch()
        with pytest.raises(FormatError, match="nested"):
            read_any(tmp_path)
    recipe = tmp_path / "r.toml"
    recipe.write_text("a = " + "[" * 5000 + "]" * 5000)
    with pytest.raises(RecipeError, match="nested too deeply"):
        Recipe.from_toml(recipe)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "r.toml"
    os.mkfifo(pipe)
    with pytest.raises(RecipeError, match="not a regular file"):
        Recipe.from_toml(pipe)
    folder = gemma_scope(tmp_path)
    os.mkfifo(folder / "params.npz")
    with pytest.raises(FormatError, match="params.npz"):
        read_any(folder / "params.npz", format="gemma_scope")
    os.mkfifo(tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="not a regular file"):
        read_any(tmp_path / "ae.pt", format="dictionary_learning")


def test_a_file_larger_than_any_text_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    for read in (read_text, read_json):
        with pytest.raises(ValueError, match="larger than any file of this kind"):
            read(path)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("key", ["data.outlier_norm", "train.clip", "train.memory_gib", "train.bias_lr"])
def test_a_recipe_has_no_infinities(tmp_path: Path, key: str, value: str) -> None:
    section, name = key.split(".")
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"[{section}]\n{name} = {value}\n")
    with pytest.raises(RecipeError, match=f"{name}.*finite"):
        Recipe.from_toml(recipe)


@pytest.mark.parametrize("tokens", ["1000B", "10000B", 2**63 - 1, 10**400])
def test_counts_without_sense_are_refused_at_once(facts: ModelFacts, tokens: Any) -> None:
    with pytest.raises((RecipeError, PlanError)):
        compile_plan(Recipe.parse({"plan": {"root_tokens": tokens}, "data": {"context": 32}}), facts)


def test_the_cost_of_a_long_plan_does_not_take_long(facts: ModelFacts) -> None:
    data = {"context": 32, "block_tokens": 1024}
    recipe = Recipe.parse({"plan": {"root_tokens": "90B"}, "data": data})
    plan = compile_plan(recipe, facts)
    stretches = list(plan.stretches())
    assert sum(n for n, _ in stretches) * plan.block_tokens == plan.n_tokens and len(stretches) < 10 * len(plan.legs)
    assert plan_cost(plan).lm_tokens <= plan.n_tokens


def test_stretches_are_what_block_by_block_is(facts: ModelFacts) -> None:
    for preset in ("hub", "forward", "alternate", "paper"):
        data = {"context": 32, "block_tokens": 1024}
        asked = {"preset": preset, "root_tokens": 9000, "transfer_tokens": 3000, "moment_tokens": 2000, "fork_at": 0.5}
        plan = compile_plan(Recipe.parse({"plan": asked, "data": data, "train": {"batch_tokens": 64}}), facts)
        block = plan.block_tokens
        one_by_one = [plan.open_sites(start, start + block) for start in range(0, plan.n_tokens, block)]
        assert [sites for n, sites in plan.stretches() for _ in range(n)] == one_by_one


def test_a_plan_that_does_not_hold_together_is_refused(facts: ModelFacts, tmp_path: Path) -> None:
    plan = compile_plan(Recipe.parse({"plan": {"preset": "forward"}, "data": {"context": 32}}), facts)
    without_root = [leg for leg in plan.legs if leg.hop]
    for legs in (without_root, [*plan.legs, plan.legs[0]], []):
        plan.changed(legs=legs).save(tmp_path / "plan.json")
        with pytest.raises(RunDirectoryError, match="plan.json: damaged"):
            Plan.load(tmp_path / "plan.json")


# --- the terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_file_says_is_shown_and_not_obeyed(world: Path, tmp_path: Path, call: Call) -> None:
    source = shutil.copytree(world / "trained/legs/L0", tmp_path / "sae")
    info = json.loads((source / "dictionary.json").read_text())
    for name in ("evil[/]model", "[link=file:///etc]x[/link]", "a\x1b[2Jb\u202e"):
        (source / "dictionary.json").write_text(json.dumps(info | {"model": name}))
        out = tmp_path / f"out-{len(name)}"
        code, said = call(
            "hop", "--from", source, "--to-layer", "1", "--recipe", world / "r.toml", "--out", out, "--tokens", "0"
        )
        assert code == 0 and "Traceback" not in said and "\x1b" not in said and "\u202e" not in said
        assert name.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e") in " ".join(said.split())
        code, said = call("import", source, "--out", f"{out}-i")
        assert code == 0 and "\x1b" not in said and "\u202e" not in said


@pytest.mark.parametrize("name", ["metrics.jsonl", "tokens/test.npy", "legs/L0/dictionary.safetensors", "state/x"])
def test_a_pipe_among_the_files_of_a_run_is_refused_and_not_waited_for(
    world: Path, run: Path, call: Call, name: str
) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for words in (("eval", run), ("train", world / "r.toml", "--out", run, "--resume")):
        code, said = call(*words)
        assert code == 2 and f"{name}: not a regular file" in said


def test_a_pipe_among_the_files_of_an_sae_is_refused(run: Path, tmp_path: Path, call: Call) -> None:
    place = run / "legs/L0"
    (place / "dictionary.safetensors").unlink()
    os.mkfifo(place / "dictionary.safetensors")
    code, said = call("import", place, "--out", tmp_path / "out")
    assert code == 2 and "dictionary.safetensors: not a regular file" in said


def test_nesting_without_end_in_what_is_known_of_the_model_is_one_message(run: Path, call: Call) -> None:
    (run / "state/model.json").write_text("[" * 200_000)
    code, said = call("eval", run)
    assert code == 2 and "Traceback" not in said and "model.json: damaged" in said
