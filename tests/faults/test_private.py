"""What is made for others names no place of this machine, and secrets are in no file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import saerelay as sr
from saerelay.analysis.endpoint.address import Endpoint
from saerelay.runs.documents.interpretation import AskedModel
from saerelay.workflows.placeless import placeless_plan, public_names

pytestmark = pytest.mark.slow
Call = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def hopped(world: Path) -> Path:
    """A run whose parent is a directory elsewhere."""
    recipe = sr.Recipe.from_toml(world / "r.toml")
    sr.hop_run(world / "trained/legs/L0", 1, recipe, world / "hopped", tokens=512)
    return world / "hopped"


def naming(place: Path, folder: Path) -> list[str]:
    """Files in a folder in which a place is named."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path.relative_to(folder)) for path in files if str(place).encode() in path.read_bytes()]


@pytest.mark.parametrize("format", ["saelens", "saerelay", "dictionary_learning"])
@pytest.mark.parametrize("one", [False, True], ids=["run", "leg"])
def test_an_export_names_no_place(
    world: Path, hopped: Path, tmp_path: Path, call: Call, format: str, one: bool
) -> None:
    source = hopped / "legs/L1-from-L0" if one else hopped
    code, said = call("export", source, "--format", format, "--out", tmp_path / "out")
    assert code == 0, said
    assert naming(world, tmp_path / "out") == []


def test_a_report_and_a_judging_page_name_no_place(world: Path, hopped: Path, tmp_path: Path, call: Call) -> None:
    run = shutil.copytree(hopped, tmp_path / "run")
    for words in (("report", run), ("judge", run, "--n", "2", "--out", tmp_path / "page.html")):
        code, said = call(*words)
        assert code == 0, said
    (tmp_path / "pages").mkdir()
    shutil.move(tmp_path / "page.html", tmp_path / "pages")
    assert naming(world, run / "report") == [] == naming(world, tmp_path / "pages")


def test_a_plan_for_others_still_holds_together(hopped: Path) -> None:
    plan = sr.load(hopped).plan
    shown = placeless_plan(plan)
    assert str(hopped.parent) not in shown.to_json()
    (leg,) = shown.legs
    assert leg.parent == "./L0" and shown.parent_site(leg) == plan.parent_site(plan.legs[0])
    assert public_names(plan)[plan.facts.name] == "model"


def test_texts_in_a_request_s_body_are_kept_in_no_file() -> None:
    body = json.dumps({"api_key": "sk-INBODY-123", "temperature": 0.5, "extra": {"user": "ada-lovelace", "on": True}})
    endpoint = Endpoint.of("m", "http://localhost:1/v1", body=body)
    asked = AskedModel(model="m", endpoint=endpoint.url, body=endpoint.described_body)
    assert asked.body == {"api_key": "(not kept)", "temperature": 0.5, "extra": {"user": "(not kept)", "on": True}}
    assert endpoint.secrets == ["sk-INBODY-123", "ada-lovelace"]
