"""The wings of the house and their arrows: who may import whom; and inside a wing, in which order modules stand."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saerelay

ROOT = Path(saerelay.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
GROUND = ("errors", "site", "spec", "spec_errors", "files", "document", "hub", "module_names", "rank", "team", "demo")
"""Modules that everything stands on; they are not listed in ARROWS as targets."""

ARROWS = {
    "sae": "",
    "planning": "sae",
    "lm": "planning sae",
    "data": "lm planning",
    "runs": "planning sae",
    "training": "data planning runs sae",
    "interop": "runs sae",
    "analysis": "data lm planning runs sae",
    "views": "planning runs",
    "workflows": "analysis data interop lm planning runs sae training views",
    "cli": "analysis lm planning runs views workflows",
}
"""Every arrow that there is. One that is not here fails, and so does one that is here and gone."""

ORDER = {
    "sae": "architectures spec dictionary moments units threads loss kernels quality maps refit reshape transfer "
    "initialise trials layer_normed",
    "planning": "facts left_out leg_spec recipe toml leg plan cost ranks presets batches legs placing compile survey "
    "curves choose",
    "lm": "source adapter split tokens identity graph trial probe readout head ports inputs facts weights model attach",
    "data": "text sources packing corpus cache remote_cache kept stream",
    "runs": "tensors directory documents dictionaries features state suite",
    "training": "alignment schedule latent_part state device engine cohort progress trackers saving team_stream "
    "run_state kept_blocks inherit train",
    "analysis": "progress logits sums metrics site_maps session similarity summary evaluate matrix collecting features "
    "links lineage describe prompts attribution versions measures ablations circuits judging endpoint interpret suite",
    "views": "text labels tables figures report judge",
    "workflows": "placeless room settle activations watching pilots survey launch keys timing hop rows tensors suites "
    "model_card neuronpedia share report judge interpret demo",
    "cli": "options training measuring judging sharing",
}
"""Inside a wing a module imports only from those before it."""


def imported_by(path: Path) -> set[tuple[str, ...]]:
    """The parts of every module of this package that a file imports, without the package's name; types aside."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(node) for block in blocks for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("saerelay") for alias in node.names), f"{path}: use from ... import"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "saerelay":
            parts = tuple(node.module.split(".")[1:])
            if len(parts) < 2:  # `from saerelay.lm import ports` imports a module, too
                found |= {(*parts, alias.name) for alias in node.names}
            else:
                found.add(parts)
    return found


def wing_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def test_every_wing_says_what_it_is_for() -> None:
    wings = {path.parent.name for path in ROOT.glob("*/__init__.py")} - set(GROUND)
    assert wings == set(ARROWS)
    for wing in wings:
        text = ast.get_docstring(ast.parse((ROOT / wing / "__init__.py").read_text(encoding="utf-8")))
        assert text and "import" in text, f"{wing}/__init__.py: say what the wing is for, and what it may import"


@pytest.mark.parametrize("wing", [*ARROWS])
def test_arrows_are_exactly_these(wing: str) -> None:
    files = [path for path in FILES if wing_of(path) == wing]
    targets = {parts[0] for path in files for parts in imported_by(path)} & set(ARROWS)
    assert targets - {wing} == set(ARROWS[wing].split())


@pytest.mark.parametrize("wing", [*ORDER])
def test_modules_of_a_wing_import_from_those_before_them(wing: str) -> None:
    order = ORDER[wing].split()
    files = [path for path in FILES if wing_of(path) == wing and module_of(path) != "__init__"]
    assert {module_of(path) for path in files} == set(order)
    for path in files:
        before = order[: order.index(module_of(path)) + 1]
        own = {parts[1] for parts in imported_by(path) if parts[0] == wing and parts[1:] and parts[1] in order}
        assert own <= set(before), f"{path.relative_to(ROOT)} imports {sorted(own - set(before))}"


def test_planning_never_loads_torch() -> None:
    modules = ", ".join(f"saerelay.planning.{name}" for name in ORDER["planning"].split())
    assert loaded_by(f"import {modules}", "torch") == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import saerelay, saerelay.cli", "torch", "transformers", "matplotlib") == []


def loaded_by(code: str, *heavy: str) -> list[str]:
    """Which of some modules are loaded once a piece of code has run in a fresh interpreter."""
    code = f"import sys; {code}; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_public_names_are_these_and_all_import() -> None:
    assert saerelay.__all__ == [
        "AffineMap",
        "Dictionary",
        "Features",
        "LanguageModel",
        "Lineage",
        "Moments",
        "Plan",
        "Recipe",
        "Run",
        "SaeRelayError",
        "Site",
        "Suite",
        "attach",
        "evaluate",
        "evaluate_run",
        "features_run",
        "fold",
        "fvu",
        "hop",
        "hop_run",
        "lineage_run",
        "load",
        "load_dictionary",
        "load_features",
        "load_layer_normed",
        "map_between",
        "match_l0",
        "plan",
        "plan_run",
        "recipe",
        "refit",
        "revive",
        "save_dictionary",
        "train",
        "train_run",
        "train_suite",
    ]
    for name in saerelay.__all__:
        assert getattr(saerelay, name) is not None
