"""What was measured of a run is out of date once the run is extended: it is measured again, or left out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saerelay as sr
from saerelay.analysis import matrix as matrix_module
from saerelay.data.corpus import Corpus
from saerelay.data.stream import LiveStream
from saerelay.document import Document
from saerelay.errors import DataError, RunDirectoryError
from saerelay.planning.cost import disk_bytes, plan_cost
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import ModelSpec
from saerelay.runs.directory import RunDirectory, read_plan
from saerelay.runs.documents.across_layers import Matrix, Measures
from saerelay.runs.documents.latents import FeatureFacts, LineageDocument
from saerelay.runs.documents.quality import Evaluation
from saerelay.runs.documents.training import RunCost
from saerelay.runs.tensors import write_tensors
from saerelay.spec import format_count
from saerelay.training.train import HELD_OUT_ROWS
from saerelay.workflows import launch, room, settle
from saerelay.workflows.activations import tokenise
from saerelay.workflows.report import report_run
from saerelay.workflows.settle import plan_run
from saerelay.workflows.share import export_run

OLD, NEW = "L1-from-L0", "L1-from-L0+4.03k"


@pytest.fixture(scope="module")
def extended(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two layers, measured, and then extended: the leg at layer 1 was continued."""
    root = tmp_path_factory.mktemp("extend")
    steps = np.random.default_rng(0).integers(1, 4, size=60_000).cumsum() % 100 + 1
    np.save(root / "tokens.npy", steps.astype(np.uint16))

    def recipe(tokens: str) -> sr.Run:
        sections: dict[str, Any] = {
            "model": {"name": str(tiny_model), "dtype": "float32", "device": "cpu"},
            "sites": {"layers": [0, 1]},
            "data": {"tokens": str(root / "tokens.npy"), "context": 16, "block_tokens": 1024},
            "dictionary": {"n_latents": 64, "k": 4},
            "plan": {"preset": "forward", "root_tokens": "4k", "transfer_tokens": tokens, "moment_tokens": "1k"},
            "train": {"batch_tokens": 64},
            "evaluate": {"tokens": "1k"},
        }
        return sr.Run.parse(sections, source="test")

    suite = sr.train_run(recipe("2k"), root / "run")
    suite.matrix(methods=["affine", "identity"], tokens=512)
    suite.measures()
    longer = sr.train_run(recipe("4k"), root / "run", extend=True)
    assert [leg.id for leg in longer.final_legs] == ["L0", NEW]
    return root / "run"


def test_what_a_recipe_leaves_open_stays_open_in_the_run(tiny_model: Path, tmp_path: Path) -> None:
    """So the same file resumes and extends the run: what was settled is in the plan, not in its recipe."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(1, 101, size=60_000).astype(np.uint16))

    def recipe(tokens: str) -> sr.Recipe:
        sections: dict[str, Any] = {
            "model": {"name": str(tiny_model)},
            "data": {"tokens": str(tmp_path / "tokens.npy"), "context": 16},
            "dictionary": {"k": 4},
            "plan": {"root_tokens": "4k", "transfer_tokens": tokens, "moment_tokens": "1k", "refit_tokens": "1k"},
        }
        return sr.Recipe.parse(sections, source="test")

    suite = sr.train_run(recipe("1k"), tmp_path / "run")
    assert suite.plan.recipe == recipe("1k")
    sr.train_run(recipe("1k"), tmp_path / "run", resume=True)
    more = recipe("2k")
    with pytest.raises(RunDirectoryError, match=r"to add this to the run when it is finished, use --extend"):
        sr.train_run(more, tmp_path / "run", resume=True)
    wider = more.changed(dictionary=more.dictionary.changed(n_latents=64))
    with pytest.raises(RunDirectoryError, match=r"(?s)n_latents: .*\nchoose another --out\. This continues"):
        sr.train_run(wider, tmp_path / "run", resume=True)
    with pytest.raises(RunDirectoryError, match=r"n_latents: .*\nan extension adds layers, legs or tokens; set these"):
        sr.train_run(wider, tmp_path / "run", extend=True)
    longer = sr.train_run(more, tmp_path / "run", extend=True)
    assert longer.plan.recipe.train == recipe("2k").train and longer.plan.n_tokens > suite.plan.n_tokens


def test_an_extension_is_of_the_commit_that_the_run_was_begun_with(tiny_model: Path, monkeypatch) -> None:
    """The name of a model on the hub may have moved on, and an added leg must not read another model."""
    facts = settle.read_facts(ModelSpec(name=str(tiny_model)))
    monkeypatch.setattr(settle, "read_facts", lambda spec: facts.changed(revision=spec.revision or "newest"))
    recipe = sr.recipe(tiny_model, k=4, n_latents=64, context=16, preset="scratch", root_tokens="4k")
    begun = settle.plan_run(recipe)
    assert begun.facts.revision == "newest"
    begun = begun.changed(facts=facts.changed(revision="older"))
    longer = settle.plan_run(recipe.changed(plan=recipe.plan.changed(root_tokens=8192)), finished=begun)
    assert longer.facts.revision == "older" and longer.recipe.model.revision == ""
    assert longer.n_tokens > begun.n_tokens


def test_an_extension_that_the_disk_cannot_hold_is_refused(extended: Path, tmp_path: Path, monkeypatch) -> None:
    """Only what the extension writes counts: what the run has written before is not among the free bytes."""
    longer = read_plan(extended)
    before = longer.changed(legs=[leg for leg in longer.legs if leg.id != NEW])
    needed = disk_bytes(longer, [longer.leg(NEW)])
    assert needed < disk_bytes(longer, longer.legs) == plan_cost(longer).disk_bytes
    paths = RunDirectory(tmp_path)
    before.save(paths.plan)

    def leave(n_bytes: float) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": n_bytes}))

    leave(needed)
    room.check_disk(longer, paths)
    leave(needed - 1)
    with pytest.raises(RunDirectoryError, match=r"the extension needs up to 0\.0 GiB on disk, but .* add fewer legs"):
        room.check_disk(longer, paths)
    longer.save(paths.plan)
    room.check_disk(longer, paths)  # an extension that is resumed was checked when it was begun


def test_an_extension_reads_new_text(extended: Path) -> None:
    plan = read_plan(extended)
    corpus = Corpus.open(extended / "tokens")
    before = corpus.facts.grown_from[0]
    stream = LiveStream(None, corpus.train, plan, grown_from=corpus.facts.grown_from)
    order = stream.read_order(0, plan.n_tokens // 16)
    assert len(set(order)) == len(order) > before
    first = LiveStream(None, corpus.train[:before], plan)
    assert list(order[:before]) == list(first.read_order(0, before))


def planned(root: Path, model: Path, tokens: str, epochs: int = 1) -> tuple[Plan, RunDirectory]:
    """The plan of a run of two layers whose transfer gets some tokens, and its directory."""
    sections: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "sites": {"layers": [0, 1]},
        "data": {"tokens": str(root / "tokens.npy"), "context": 16, "block_tokens": 1024, "epochs": epochs},
        "dictionary": {"n_latents": 64, "k": 4},
        "plan": {"preset": "forward", "root_tokens": "4k", "transfer_tokens": tokens, "moment_tokens": "1k"},
        "evaluate": {"tokens": "1k"},
    }
    return plan_run(sr.Run.parse(sections, source="test")), RunDirectory(root / "run")


def begin(root: Path, model: Path, n_rows: int) -> Path:
    """The directory of a run that has begun, beside a file with its text: rows of tokens."""
    np.save(root / "tokens.npy", np.random.default_rng(0).integers(1, 101, (n_rows, 40)).astype(np.uint16))
    plan, paths = planned(root, model, "2k")
    tokenise(plan, paths, None)
    plan.save(paths.plan)
    return paths.root


@pytest.fixture
def tokenised(tiny_model: Path, tmp_path: Path) -> Path:
    """The directory of a run that has begun."""
    return begin(tmp_path, tiny_model, 1500)


@pytest.mark.parametrize("n_rows", [1500, 250])  # with 250, there is too little held-out text, but more to train on
def test_an_extension_repeats_no_text_while_there_is_more(tmp_path: Path, tiny_model: Path, n_rows: int) -> None:
    tokenised = begin(tmp_path, tiny_model, n_rows)
    before = Corpus.open(tokenised / "tokens").facts.train_sequences
    plan, paths = planned(tokenised.parent, tiny_model, "8k", epochs=3)
    facts = tokenise(plan, paths, None).facts
    assert before < facts.train_sequences <= plan.n_tokens // 16 and facts.grown_from == [before]
    assert facts.complete == (facts.train_sequences < plan.n_tokens // 16) == (n_rows == 250)


def test_an_extension_killed_while_it_replaced_the_text_goes_on(tokenised: Path, tiny_model: Path) -> None:
    before = Corpus.open(tokenised / "tokens").facts.train_sequences
    (tokenised / "tokens").rename(tokenised / ".tokens.old")
    plan, paths = planned(tokenised.parent, tiny_model, "8k")
    assert tokenise(plan, paths, None).facts.grown_from == [before]
    assert not (tokenised / ".tokens.old").exists()


def test_an_extension_is_refused_if_its_text_is_not_that_of_the_run(tokenised: Path, tiny_model: Path) -> None:
    """All documents would change places, and some that were trained on would be held out."""
    rows = np.load(tokenised.parent / "tokens.npy")
    np.save(tokenised.parent / "tokens.npy", np.append(rows, rows, axis=0))
    plan, paths = planned(tokenised.parent, tiny_model, "8k")
    before = Corpus.open(tokenised / "tokens").facts
    with pytest.raises(DataError, match="not the text that this run began with.* or begin a new run$"):
        tokenise(plan, paths, None)
    assert Corpus.open(tokenised / "tokens").facts == before and not (tokenised / "tokens.new").exists()
    before.changed(train_documents=0).save(tokenised / "tokens" / "corpus.json")
    with pytest.raises(DataError, match="this one was begun by an older version, which took other parts of documents"):
        tokenise(plan, paths, None)


def test_an_extension_may_read_the_text_more_often(tiny_model: Path, tmp_path: Path) -> None:
    """A run that has used up its text says so, and its advice can be followed."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(1, 101, (220, 40)).astype(np.uint16))

    def recipe(tokens: str, epochs: int) -> sr.Recipe:
        return planned(tmp_path, tiny_model, tokens, epochs)[0].recipe

    sr.train_run(recipe("1k", 1), tmp_path / "run")
    with pytest.raises(DataError, match=r"set data.epochs = 2"):
        sr.train_run(recipe("8k", 1), tmp_path / "run", extend=True)
    sr.train_run(recipe("8k", 2), tmp_path / "run", extend=True)
    plan = read_plan(tmp_path / "run")
    assert plan.recipe.data.epochs == 2 and plan.legs[-1].id.startswith("L1-from-L0+")


def test_a_run_is_not_resumed_without_the_roots_it_was_begun_with(tiny_model: Path, tmp_path: Path) -> None:
    run = begin(tmp_path, tiny_model, 1500)
    recipe = planned(tmp_path, tiny_model, "2k")[0].recipe
    read_plan(run).changed(recipe=recipe.changed(plan=recipe.plan.changed(roots=[1]))).save(run / "plan.json")
    with pytest.raises(RunDirectoryError, match=r"plan\.roots: \[1\] in the run, \[\] in the recipe"):
        settle.resumed_plan(recipe, RunDirectory(run))


@pytest.fixture
def auto(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sr.Recipe:
    """The recipe of a finished run in `tmp_path / "run"` whose legs a survey chose; the first of them ends early."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(1, 101, size=60_000).astype(np.uint16))
    legs = [
        LegSpec.parse({"id": "L0", "layer": 0, "tokens": 8192, "goal_fvu": 9.0, "predicted_fvu": 0.5}, source="test"),
        LegSpec.parse({"id": "L1-from-L0", "layer": 1, "tokens": 1024, "parent": "L0"}, source="test"),
    ]

    def written_out(recipe: sr.Recipe, *_: Any) -> sr.Recipe:
        return recipe.changed(plan=recipe.plan.changed(legs=legs), data=recipe.data.changed(block_tokens=512))

    monkeypatch.setattr(launch, "survey_run", lambda *_: (None, None))
    monkeypatch.setattr(launch, "written_out", written_out)
    sections: dict[str, Any] = {
        "model": {"name": str(tiny_model), "dtype": "float32", "device": "cpu"},
        "sites": {"layers": [0, 1]},
        "data": {"tokens": str(tmp_path / "tokens.npy"), "context": 16},
        "dictionary": {"n_latents": 64, "k": 4},
        "plan": {"preset": "auto", "root_tokens": "8k", "moment_tokens": "1k"},
        "train": {"batch_tokens": 64},
        "evaluate": {"tokens": "1k"},
    }
    recipe = sr.Recipe.parse(sections, source="test")
    sr.train_run(recipe, tmp_path / "run")
    return recipe


def test_a_surveyed_run_is_extended_by_its_legs_written_out(auto: sr.Recipe, tmp_path: Path) -> None:
    suite = sr.load(tmp_path / "run")
    assert suite.plan.recipe == auto and suite.plan.block_tokens == 512
    planned = sr.Recipe.from_toml(tmp_path / "run/planned.toml")
    assert settle.plan_run(planned).legs == suite.plan.legs
    with pytest.raises(RunDirectoryError, match=r"Raise tokens or add legs in .*run/planned.toml, .* --extend"):
        sr.train_run(auto, tmp_path / "run", extend=True)
    with pytest.raises(RunDirectoryError, match="the recipe adds nothing"):
        sr.train_run(planned, tmp_path / "run", extend=True)
    first, second = planned.plan.legs
    more = planned.changed(plan=planned.plan.changed(legs=[first, second.changed(tokens=2048)]))
    longer = sr.train_run(more, tmp_path / "run", extend=True)
    assert [leg.id for leg in longer.final_legs] == ["L0", "L1-from-L0+2.05k"]
    (tmp_path / "run/planned.toml").unlink()
    with pytest.raises(RunDirectoryError, match=r"Write \[\[plan.legs\]\] into the recipe"):
        sr.train_run(auto, tmp_path / "run", extend=True)


def test_a_leg_that_reached_its_goal_is_not_trained_further_towards_it(auto: sr.Recipe, tmp_path: Path) -> None:
    suite = sr.load(tmp_path / "run")
    assert suite.info(suite.leg("L0")).tokens < suite.leg("L0").budget_tokens
    planned = sr.Recipe.from_toml(tmp_path / "run/planned.toml")

    def asked(goal: float | None, *, tokens: int = 16_384, stop: bool = True) -> sr.Recipe:
        first, second = planned.plan.legs
        legs = [first.changed(tokens=tokens, goal_fvu=goal), second]
        return planned.changed(plan=planned.plan.changed(legs=legs, stop=stop))

    for goal in (9.0, 10.0):
        with pytest.raises(
            RunDirectoryError, match=r"have reached their goal and so ended early: L0; lower their goal"
        ):
            settle.extended_plan(asked(goal), RunDirectory(tmp_path / "run"))
    for recipe in (asked(8.9), asked(None), asked(9.0, stop=False)):
        assert settle.extended_plan(recipe, RunDirectory(tmp_path / "run")).has("L0+16.4k")
    with pytest.raises(RunDirectoryError, match="the recipe adds nothing .* add legs, layers or tokens"):
        settle.extended_plan(asked(8.9, tokens=8192), RunDirectory(tmp_path / "run"))
    before = RunCost.load(tmp_path / "run/cost.json").positions
    assert before.held_out == Corpus.open(tmp_path / "run/tokens").validation.size < HELD_OUT_ROWS  # each row once
    longer = sr.train_run(asked(8.9), tmp_path / "run", extend=True)
    after = RunCost.load(tmp_path / "run/cost.json").positions
    assert after.read > before.read and after.held_out == 2 * before.held_out > 0  # the extension read them once more
    sr.train_run(asked(8.9), tmp_path / "run", resume=True)
    assert RunCost.load(tmp_path / "run/cost.json").positions == after
    assert longer.leg("L0").goal.predicted_fvu == 0.5 and longer.leg("L0+16.4k").goal.predicted_fvu is None
    with pytest.raises(RunDirectoryError, match=r"ended early: L0\+16.4k;"):
        settle.extended_plan(asked(8.9, tokens=32_768), RunDirectory(tmp_path / "run"))
    (tmp_path / "run/legs/L0+16.4k/dictionary.json").unlink()  # as if it had failed
    assert settle.extended_plan(asked(8.9, tokens=32_768), RunDirectory(tmp_path / "run")).has("L0+32.8k")


@pytest.fixture
def run(extended: Path, tmp_path: Path) -> Path:
    """A run of one's own."""
    return shutil.copytree(extended, tmp_path / "run")


def legs_of(path: Path) -> set[str]:
    """Legs that a matrix has cells of."""
    return {cell.leg for cell in Matrix.load(path / "matrix.json").cells}


def test_the_matrix_is_measured_again(run: Path) -> None:
    assert OLD in legs_of(run) and NEW not in legs_of(run), "it is of the old leg, in as many cells"
    document = sr.load(run).matrix(methods=["affine", "identity"], tokens=512)
    assert {cell.leg for cell in document.cells} == legs_of(run) == {"L0", NEW}


def test_measures_are_taken_again_and_so_is_the_matrix_they_rest_on(run: Path) -> None:
    assert NEW not in {row.leg for row in Measures.load(run / "measures.json").similarity}
    document = sr.load(run).measures()
    assert NEW in {row.leg for row in document.similarity} and legs_of(run) == {"L0", NEW}
    assert Measures.load(run / "measures.json") == document and document.offsets


def test_a_continued_leg_is_compared_with_the_parent_it_came_from(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With itself at the end of the first run it has almost everything in common: nothing was transferred since."""
    suite = sr.load(run)
    method = suite.method(suite.plan.leg(OLD))
    suite.matrix(methods=["identity", method or ""], tokens=512)
    monkeypatch.setattr(sr.Suite, "scratch_counterparts", lambda suite, leg: [suite.plan.leg("L0")])
    document = suite.measures()
    assert {(row.leg, row.parent) for row in document.transferability or ()} == {(OLD, "L0"), (NEW, "L0")}
    compared = {frozenset((row.source, row.target)) for row in document.similarity if row.kind == "hop"}
    assert compared == {frozenset(("L0", OLD)), frozenset(("L0", NEW))}
    scored = {(row.leg, row.parent, row.method) for row in document.transfer_scores or ()}
    assert scored == {(leg, "L0", how) for leg in (OLD, NEW) for how in ("identity", method)}


def test_a_report_measures_again_what_is_out_of_date_as_it_was_asked(run: Path) -> None:
    report_run(sr.load(run))
    asked = Matrix.load(run / "matrix.json").asked
    assert set(asked.legs) == {"L0", NEW} and (asked.tokens, asked.methods) == (512, ["affine", "identity"])
    assert NEW in {row.leg for row in Measures.load(run / "measures.json").similarity}
    assert has(run) == {"matrix": True, "measures": True, "interpretations": False}


def test_a_quick_report_leaves_out_what_is_out_of_date(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_module, "measure_cells", None)
    report_run(sr.load(run), quick=True)
    assert has(run) == {"matrix": False, "measures": False, "interpretations": False}


def has(run: Path) -> dict[str, bool]:
    """What a report says that it has."""
    text = (run / "report/data/run.js").read_text(encoding="ascii")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])["has"]


def test_the_summary_says_which_leg_stands_for_a_layer(run: Path) -> None:
    summary = sr.load(run).evaluate()
    assert summary.leg(OLD).continued_by == NEW and not summary.leg(OLD).in_suite
    assert [leg.id for leg in summary.suite] == ["L0", NEW] == [leg.id for leg in summary.final_legs]
    assert summary.leg(NEW).origin == summary.leg(OLD).origin == "from below"


def test_the_summary_counts_sequences_and_the_documents_that_they_are_from(run: Path) -> None:
    suite = sr.load(run)
    facts = Corpus.open(suite.directory.tokens).facts
    whole = suite.evaluate()
    assert whole.n_sequences == facts.test_sequences and whole.n_documents == facts.test_documents > 0
    half = suite.evaluate(tokens=facts.context * (facts.test_sequences // 2))
    assert half.n_sequences == facts.test_sequences // 2 and half.n_documents == 0  # it is not known of a part


def test_a_model_card_counts_the_tokens_of_the_whole_line(run: Path, tmp_path: Path) -> None:
    own = sr.load(run).info(sr.load(run).leg(NEW)).tokens
    (continued,) = export_run(str(run), tmp_path / "out", "saerelay", legs=[NEW])
    assert continued.tokens_before == sr.load(run).info(sr.load(run).leg(OLD)).tokens > 0
    card = (tmp_path / "out/README.md").read_text()
    assert f"| {format_count(own + continued.tokens_before)} tokens |" in card
    assert "The run was extended" in card and "reproduces these dictionaries" not in card


MAKERS: dict[str, tuple[type[Document], Callable[[sr.Suite], object]]] = {
    "eval/L0.json": (Evaluation, lambda suite: suite.evaluate()),
    "matrix.json": (Matrix, lambda suite: suite.matrix(methods=["affine", "identity"], tokens=512)),
    "measures.json": (Measures, lambda suite: suite.measures()),
    "lineage.json": (LineageDocument, lambda suite: suite.lineage()),
}
"""Files that an analysis writes once, and what writes them."""


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_a_file_of_another_schema_is_made_again(run: Path, name: str) -> None:
    document, make = MAKERS[name]
    suite = sr.load(run)
    make(suite)
    current = json.loads((run / name).read_text())
    assert current["schema"] == document.SCHEMA
    (run / name).write_text(json.dumps(current | {"schema": document.SCHEMA - 1}))
    make(suite)
    assert json.loads((run / name).read_text()) == current


@pytest.mark.slow
def test_features_of_another_schema_are_made_again(run: Path) -> None:
    suite = sr.load(run)
    features = suite.features("L0")
    path = suite.directory.features("L0")
    facts = features.facts.to_data()
    write_tensors(path, features.tensors(), {"facts": json.dumps(facts | {"schema": FeatureFacts.SCHEMA - 1})})
    with pytest.raises(sr.SaeRelayError, match="has another schema than"):
        sr.load_features(suite.directory, "L0")
    assert suite.features("L0").facts == features.facts
