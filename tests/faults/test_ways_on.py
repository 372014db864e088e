"""After a fault there is a way on, the run is the one that it was, and errors are one message."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from errno import EACCES, ENOSPC, EROFS
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saerelay as sr
from saerelay.errors import LegFailed, ModelError, RunDirectoryError
from saerelay.planning.plan import Plan
from saerelay.planning.toml import annotated_toml
from saerelay.runs.dictionaries import publish, read_dictionary
from saerelay.runs.directory import one_at_a_time
from saerelay.runs.state import commit_state, load_part, save_part, state_facts, truncate_metrics
from saerelay.sae.dictionary import Dictionary
from saerelay.views.report import MARK, check_replaceable
from saerelay.workflows.demo import clear_demo
from saerelay.workflows.settle import mend_recipe

pytestmark = pytest.mark.slow
Call = Callable[..., tuple[int, str]]
STATE = "state/state.json"


def resume(world: Path, run: Path) -> sr.Suite:
    return sr.train_run(sr.Recipe.from_toml(world / "r.toml"), run, resume=True)


# --- the state and the run are checked --------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the facts of a state, and leave all else as it is."""
    content = json.loads(path.read_text())
    facts = json.loads(content["facts"])
    change(facts)
    path.write_text(json.dumps({**content, "facts": json.dumps(facts)}))


@pytest.mark.parametrize("cursor", [1, 10**12])
def test_a_state_with_another_cursor_is_refused(world: Path, run: Path, cursor: int) -> None:
    rewrite(run / STATE, lambda facts: facts.update(cursor=cursor))
    with pytest.raises(RunDirectoryError, match="state.json: damaged"):
        resume(world, run)


def test_a_state_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    facts = {"cursor": 0, "failures": {}, "seconds": {}, "positions": {}, "live": [], "moments": [], "machine": {}}
    facts |= {"log_bytes": 0, "legs": {}, "serial": 3}
    digests = save_part(tmp_path / "3", "leg-L0", {"a": torch.randn(64), "b": torch.zeros(8)})
    commit_state(tmp_path, {**facts, "digests": {"leg-L0": digests}})
    saved = state_facts(tmp_path)
    assert saved and load_part(tmp_path, "leg-L0", saved)
    path = tmp_path / "3/leg-L0.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"damaged \(tensor [ab] is not the one that was saved\)"):
        load_part(tmp_path, "leg-L0", saved)


def test_a_state_of_another_plan_is_refused(world: Path, run: Path) -> None:
    plan = Plan.load(run / "plan.json")
    legs = [leg.changed(lr=2 * leg.schedule.lr) for leg in plan.legs]
    plan.changed(legs=legs).save(run / "plan.json")
    with pytest.raises(
        RunDirectoryError, match=r"plan.json: leg L0 differs from the leg in .*, so that one of the two"
    ):
        resume(world, run)


def test_a_run_that_ends_without_a_leg_has_failed(world: Path, run: Path, call: Call) -> None:
    shutil.rmtree(run / "legs/L1-from-L0")
    with pytest.raises(LegFailed, match="the files of these legs are missing: L1-from-L0"):
        resume(world, run)
    code, said = call("train", world / "r.toml", "--out", run, "--resume")
    assert code == 1 and "Traceback" not in said


def test_a_published_dictionary_with_a_flipped_bit_is_refused(run: Path) -> None:
    path = run / "legs/L0/dictionary.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"dictionary.safetensors: damaged \(tensor \w+ is not the one"):
        sr.load(run)["L0"]


def test_what_was_measured_of_other_weights_is_measured_again(run: Path, call: Call) -> None:
    assert call("eval", run)[0] == 0
    before = json.loads((run / "eval/L0.json").read_text())["metrics"]
    dictionary, info = read_dictionary(run / "legs/L0")
    tensors = dictionary.tensors()
    for k, changed in ((1, tensors), (1, tensors | {"W_dec": -dictionary.W_dec})):
        other = Dictionary(architecture=dictionary.architecture, k=k, **changed)
        publish(run / "legs/L0", other, info.to_data())
        assert call("eval", run)[0] == 0
        after = json.loads((run / "eval/L0.json").read_text())["metrics"]
        assert after["fvu"] > before["fvu"]
        before = after


def test_another_model_in_the_place_of_the_runs_own_is_refused(world: Path, tmp_path: Path, call: Call) -> None:
    model = shutil.copytree(world / "model", tmp_path / "model")
    recipe = tmp_path / "r.toml"
    recipe.write_text((world / "r.toml").read_text().replace(f"{world}/model", str(model)))
    assert call("train", recipe, "--out", tmp_path / "run")[0] == 0
    os.utime(model / "model.safetensors")
    assert call("eval", tmp_path / "run")[0] == 0, "it is the same, only copied"
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "run/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/eval")
    for words in (("eval", tmp_path / "run"), ("train", recipe, "--out", tmp_path / "run", "--resume")):
        code, said = call(*words)
        assert code == 2 and "have changed since this run began" in said
    with pytest.raises(ModelError):
        sr.load(tmp_path / "run").session.model  # noqa: B018


# --- the same command goes on -----------------------------------------------------------------------------------------


def test_an_extension_that_was_killed_goes_on_by_each_of_its_commands(world: Path, run: Path, call: Call) -> None:
    more = world / "more.toml"
    before = (run / "run.toml").read_text()
    whole = shutil.copytree(run, run.with_name("whole"))
    assert call("train", more, "--out", whole, "--extend")[0] == 0
    killed = shutil.copytree(run, run.with_name("killed"))
    (killed / "cost.json").unlink()
    shutil.copy(whole / "plan.json", killed / "plan.json")  # and run.toml is still that of the first run
    assert (killed / "run.toml").read_text() == before
    os.utime(killed / "run.toml", (1, 1))
    ways = ((more, "--extend"), (more, "--resume"), (killed / "run.toml", "--resume"))
    for number, (recipe, option) in enumerate(ways):
        copy = killed.with_name(f"killed-{number}")
        shutil.copytree(killed, copy)
        if recipe.parent == killed:
            recipe = copy / "run.toml"
        code, said = call("train", recipe, "--out", copy, option)
        assert code == 0, said
        assert call("train", more, "--out", copy, "--extend")[0] == 0, "it may have been killed after all was done"
        for leg in sr.load(whole):
            assert torch.equal(sr.load(whole)[leg].W_enc, sr.load(copy)[leg].W_enc), leg


def test_a_refusal_prints_a_command_that_works(world: Path, run: Path, call: Call) -> None:
    code, said = call("train", world / "r.toml", "--out", run)
    assert code == 2
    printed = said.partition("This continues it: saerelay ")[2].split()
    assert call(*printed)[0] == 0


def test_the_same_hop_goes_on(world: Path, tmp_path: Path, call: Call) -> None:
    words = ["hop", "--from", world / "trained/legs/L0", "--to-layer", "1", "--recipe", world / "r.toml"]
    words += ["--out", tmp_path / "hop", "--tokens", "512"]
    (tmp_path / "hop/state").mkdir(parents=True)
    for _ in range(2):
        code, said = call(*words)
        assert code == 0, said
    code, said = call(*words[:-1], "1024")
    assert code == 2 and "was begun with another recipe" in said


def test_run_toml_is_written_again_where_it_is_missing_or_old(run: Path) -> None:
    whole = (run / "run.toml").read_text()
    (run / "run.toml").unlink()
    mend_recipe(run)
    assert (run / "run.toml").read_text() == whole == annotated_toml(Plan.load(run / "plan.json").recipe)


def test_half_a_report_is_no_obstacle(tmp_path: Path) -> None:
    from saerelay.files import replace_directory

    for name in ("report", ".report.new", ".report.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_directory(tmp_path / ".report.new", tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert [path.name for path in (tmp_path / "report").iterdir()] == [".report.new"]
    with pytest.raises(RunDirectoryError, match="not a report"):
        check_replaceable(tmp_path / "report")
    (tmp_path / "report" / MARK).touch()
    check_replaceable(tmp_path / "report")


def test_a_demo_killed_before_it_was_marked_starts_over(tmp_path: Path) -> None:
    clear_demo(tmp_path)
    (tmp_path / "..saerelay-demo.tmp").touch()
    clear_demo(tmp_path)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RunDirectoryError, match="not a demo"):
        clear_demo(tmp_path)


def test_the_training_log_is_cut_back_to_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"cursor": 1}\n{"cursor": 1}\n{"curs')
    truncate_metrics(path, 14)
    assert path.read_text() == '{"cursor": 1}\n'


def test_commands_that_measure_a_run_wait_for_one_another(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    done = threading.Event()

    def measure() -> None:
        with one_at_a_time(tmp_path):
            done.set()

    with one_at_a_time(tmp_path):
        thread = threading.Thread(target=measure)
        thread.start()
        assert not done.wait(0.3)
    thread.join()
    assert done.is_set()


FAKE_WANDB = """
import json, os, signal
from pathlib import Path

class Run:
    def __init__(self):
        self.n = 0

    def log(self, values):
        with Path(os.environ["SENT"]).open("a") as file:
            file.write(json.dumps(values) + "\\n")
        self.n += 1
        if str(self.n) == os.environ["KILLED_AFTER"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self):
        pass

def init(**_):
    cut = os.truncate

    def cut_and_die(*arguments):
        cut(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["KILLED_AFTER"] == "the log is cut back":
        os.truncate = cut_and_die
    return Run()
"""


def test_after_kills_the_log_and_a_tracker_have_what_an_uninterrupted_run_gives_them(
    world: Path, tmp_path: Path
) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/__init__.py").write_text(FAKE_WANDB)
    recipe = tmp_path / "r.toml"
    text = (world / "r.toml").read_text().replace("[train]", '[train]\nloggers = ["wandb"]')
    recipe.write_text(text.replace("checkpoint_every = 256", "checkpoint_every = 1024"))
    logs = {}
    points = {}
    for name, kills in (("whole", [""]), ("killed", ["3", "the log is cut back", "1", ""])):
        sent = tmp_path / f"{name}.jsonl"
        for killed_after in kills:
            environment = {"SENT": str(sent), "KILLED_AFTER": killed_after}
            places = [str(tmp_path), *sys.path]
            environment |= os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
            words = ["train", str(recipe), "--out", str(tmp_path / name), "--resume"]
            command = [sys.executable, "-W", "ignore", "-m", "saerelay", *words]
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert ended.returncode == (-signal.SIGKILL if killed_after else 0), ended.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        logs[name] = [{key: line[key] for key in line if key != "seconds"} for line in lines]
        points[name] = [json.loads(line) for line in sent.read_text().splitlines()]
    assert len(logs["whole"]) > 5
    assert logs["killed"] == logs["whole"]
    assert points["killed"] == points["whole"]


# --- errors of the operating system -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [ENOSPC, EROFS, EACCES])
@pytest.mark.parametrize("command", ["eval", "judge", "report", "train", "export"])
def test_what_the_operating_system_refuses_is_one_message(
    world: Path, run: Path, call: Call, monkeypatch: pytest.MonkeyPatch, number: int, command: str
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    words: dict[str, list[object]] = {
        "eval": ["eval", run],
        "judge": ["judge", run, "--n", "2"],
        "report": ["report", run, "--quick"],
        "train": ["train", world / "r.toml", "--out", run, "--resume"],
        "export": ["export", run, "--format", "saelens", "--out", run.with_name("out")],
    }
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        code, said = call(*words[command])
    assert code == 2 and "Traceback" not in said and os.strerror(number) in said
    assert "delete" not in said, "nothing is damaged"
    assert call(*words[command])[0] == 0


def test_a_cache_that_is_a_file_is_one_message(world: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "c").write_text("x")
    recipe = tmp_path / "r.toml"
    recipe.write_text((world / "r.toml").read_text().replace("[data]", f'[data]\ncache = "{tmp_path}/c"'))
    code, said = call("train", recipe, "--out", tmp_path / "run")
    assert code == 2 and "Traceback" not in said and f"{tmp_path}/c" in said
