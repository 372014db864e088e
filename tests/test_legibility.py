"""The mirror of bench/legibility.py shows what is there, once each."""

import json
import sys
from pathlib import Path

import legibility
import pytest

DENSE = """
import dataclasses
from typing import Any

@dataclasses.dataclass
class Wide:
    a: int
    b: int
    c: "dict[str, Any]"

def f(x: int | None, data: dict[str, Any]) -> list["int"]:
    '''A docstring, which is no body.'''
    a, b = x, 1  # a comment
    y = 1 if a else 2 if b else 3
    z = [i for row in data["rows"] for i in row]
    w = {k: [v for v in vs] for k, vs in data.items()}
    return {"a": y} | w
"""


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "wing" / "dense.py"
    path.parent.mkdir()
    path.write_text(DENSE)
    return path


def test_every_dense_expression_is_counted_once(dense: Path) -> None:
    counts = legibility.reflect(dense, "dense.py").counts
    assert counts == {
        "conditional": 2,
        "nested conditional": 1,
        "comprehension": 3,
        "nested comprehension": 2,
        "tuple assignment": 1,
        "dict union": 1,
        "dict[str, Any]": 1,
        "key look-up": 1,
        "comment": 1,
        "long line %": 0,
    }


def test_what_is_over_a_limit_is_listed(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legibility, "MAX_BODY_LINES", 4)
    monkeypatch.setattr(legibility, "MAX_FIELDS", 2)
    monkeypatch.setattr(legibility, "MAX_PARAMETERS", 1)
    monkeypatch.setattr(legibility, "MAX_MODULE_LINES", len(DENSE.splitlines()) - 1)
    found = legibility.reflect(dense, "dense.py")
    assert found.long_bodies == {"dense.py:11 f": 5}
    assert found.wide_specs == {"dense.py:6 Wide": 3}
    assert found.wide_signatures == {"dense.py:11 f": 2}
    assert found.long_modules == {"dense.py": len(DENSE.splitlines())}
    assert legibility.reflect(dense, "cli/dense.py").wide_signatures == {}, "options of a command"


def test_methods_count_without_self_and_commands_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.py"
    path.write_text("class A:\n def f(self, a): ...\n@app.command()\ndef g(a, b): ...\ndef h(a, *, b): ...\n")
    monkeypatch.setattr(legibility, "MAX_PARAMETERS", 1)
    assert legibility.reflect(path, "a.py").wide_signatures == {"a.py:5 h": 2}


def test_json_has_every_wing_and_the_total(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.py").write_text("x = 1\n\n")
    output = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["legibility.py", str(tmp_path), "--json", str(output)])
    legibility.main()

    document = json.loads(output.read_text())
    assert set(document) == {"ground", "wing", "TOTAL"}
    lines = len(DENSE.splitlines())
    assert document["TOTAL"]["lines"] == lines + 2
    assert document["TOTAL"]["figures"]["conditional"] == round(2000 / (lines + 2), 1)
    assert "httpx" in capsys.readouterr().out


def test_wings_without_nested_conditional_expressions_stay_without() -> None:
    """Ruff has no rule for this; the list only ever gets shorter."""
    wings = legibility.by_wing(legibility.PACKAGE)
    nested = {name for name, wing in wings.items() if wing.counts["nested conditional"]}
    assert nested <= {"analysis", "planning", "sae", "training", "views"}
