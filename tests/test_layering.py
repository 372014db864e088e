"""A module imports only from modules above it in this list; the design in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saerelay

ORDER = """
errors spec site recipe plan cost moments dictionaries threads kernels transfer engine demo sources corpus model cache
stream progress trackers checkpoint interop attachment suite maps train survey auto evaluate matrix features lineage
prompts measures circuits asking interpret tables figures launch hop share report judge showcase cli __main__
""".split()
ROOT = Path(saerelay.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "saerelay":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if alias.name in ORDER}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("saerelay.")}
    return found


def test_every_module_has_its_place() -> None:
    modules = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert modules <= set(ORDER) - {"__main__"} | (modules & {"__main__"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_upwards(path: Path) -> None:
    module = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if module == "__init__":
        return
    allowed = set(ORDER[: ORDER.index(module)]) | {module}
    assert imports_of(path) <= allowed


def test_public_names_are_these_and_all_import() -> None:
    assert saerelay.__all__ == [
        "__version__",
        "AffineMap",
        "Dictionary",
        "Features",
        "LanguageModel",
        "Lineage",
        "Moments",
        "Plan",
        "Run",
        "SaeRelayError",
        "Site",
        "Suite",
        "attach",
        "evaluate_run",
        "features_run",
        "fold",
        "hop_run",
        "lineage_run",
        "load",
        "load_dictionary",
        "load_features",
        "load_layer_normed",
        "map_between",
        "match_l0",
        "plan_run",
        "refit",
        "revive",
        "train_run",
    ]
    for name in saerelay.__all__:
        assert getattr(saerelay, name) is not None


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules]"
    code = f"import sys, saerelay, saerelay.cli; print({heavy})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
