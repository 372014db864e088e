"""Human judging: what is drawn, what the page says and does not, in a browser too, and what becomes of the answers."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import HOSTILE, F, fake_run, sources_of, token_text
from scipy.stats import binomtest
from test_cli import call

from saerelay.analysis.judging import (
    agreement,
    cohen_kappa,
    difference,
    drawn,
    layer_tallies,
    legs_by_origin,
    tallied,
    wilson,
)
from saerelay.analysis.session import Session
from saerelay.analysis.suite import Suite, load
from saerelay.errors import RecipeError, RunDirectoryError
from saerelay.planning.leg import Control
from saerelay.runs.documents.judging import JudgedItem, Scores
from saerelay.runs.features import load_features
from saerelay.site import Site
from saerelay.views import report
from saerelay.views.judge import page_data
from saerelay.workflows.judge import judge_run, score_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """Three layers, hostile tokens; layer 1 from scratch, layer 0 also."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "token_text", staticmethod(token_text))
        patch.setattr("saerelay.workflows.judge.make_features", lambda session: None)
        yield fake_run(tmp_path_factory.mktemp("judge") / "run & <co>")


@pytest.fixture
def suite(finished: Suite, tmp_path: Path) -> Suite:
    """One of its own."""
    return load(shutil.copytree(finished.directory.root, tmp_path / "run"))


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    return json.loads(found[1])


def answered(path: Path, page: str, answers: dict[int, str], name: str = "Ada") -> Path:
    path.write_text(json.dumps({"schema": 1, "page": page, "judge": name, "answers": answers}))
    return path


# --- what is drawn ----------------------------------------------------------------------------------------------


def test_every_origin_has_its_leg(suite: Suite) -> None:
    legs = legs_by_origin(suite)
    assert {(site.layer, origin): leg.id for (site, _, origin), leg in legs.items()} == {
        (0, "backward"): "L0-from-L1",
        (0, "scratch"): "L0-scratch-full",
        (1, "scratch"): "L1",
        (2, "forward"): "L2-from-L1",
    }
    assert {leg.layer for leg in legs_by_origin(suite, [2]).values()} == {2}
    with pytest.raises(RunDirectoryError, match="no dictionary at layer 7; the run has layers 0, 1, 2"):
        legs_by_origin(suite, [1, 7])


def test_legs_of_no_origin_that_is_judged_are_refused(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as copies of another model's SAEs, trained further at their own layers."""
    monkeypatch.setattr(Suite, "origin", lambda suite, leg: "same layer")
    with pytest.raises(RunDirectoryError, match="nothing to judge: .* transferred from another layer"):
        legs_by_origin(suite)


def test_a_continued_leg_has_the_origin_of_the_first(suite: Suite) -> None:
    first = suite.plan.leg("L0-from-L1")
    more = first.changed(id="more", parent=first.id)
    shutil.copytree(suite.directory.leg(first.id), suite.directory.leg("more"))
    suite.plan = suite.plan.changed(legs=[*suite.plan.legs, more])
    assert suite.origin(more) == suite.origin(first) == "from above" and suite.successor(first) == more
    assert {leg.id for (_, _, origin), leg in legs_by_origin(suite).items() if origin == "backward"} == {"more"}

    # A control that starts at its parent's own site continues nothing.
    before = suite.final_legs
    control = more.changed(
        id="control", parent="L1", layer=1, role="control", control=Control(control_of="L1", control_kind="random")
    )
    shutil.copytree(suite.directory.leg(first.id), suite.directory.leg("control"))
    suite.plan = suite.plan.changed(legs=[*suite.plan.legs, control])
    assert suite.final_legs == before and suite.successor(suite.plan.leg("L1")) is None
    assert suite.leg_at(Site(1)).id == "L1"


def test_a_control_of_another_tier_stands_for_no_origin(suite: Suite) -> None:
    """It has another L0 than the transfer it would be judged beside."""
    before = legs_by_origin(suite)
    first = suite.plan.leg("L0-from-L1")
    assert first.hop
    sparser = first.dictionary.with_l0(2)
    tier = first.changed(id="tier", hop=first.hop.changed(parent=first.id), dictionary=sparser)
    further = tier.changed(id="further", hop=first.hop.changed(parent=tier.id))
    control = suite.plan.leg("L0-scratch-full").changed(
        id="A", dictionary=sparser, control=Control(control_of="further", control_kind="full")
    )
    for leg in (tier, further, control):
        shutil.copytree(suite.directory.leg(first.id), suite.directory.leg(leg.id))
    suite.plan = suite.plan.changed(legs=[*suite.plan.legs, tier, further, control])
    assert {key: leg.id for key, leg in legs_by_origin(suite).items()} == {key: leg.id for key, leg in before.items()}


def test_a_transcoder_is_drawn_beside_an_sae_of_what_it_reads(suite: Suite) -> None:
    sae = suite.plan.leg("L1").changed(id="L1.mlp_in", module="mlp_in")
    transcoder = sae.changed(id="L1.transcoder", module_out="mlp_out")
    suite.plan = suite.plan.changed(legs=[*suite.plan.legs, sae, transcoder])
    features = {leg.id: load_features(suite.directory, leg.id) for leg in suite.legs}
    for leg in (sae, transcoder):
        shutil.copytree(suite.directory.leg("L1"), suite.directory.leg(leg.id))
        features[leg.id] = features["L1"]
    items = drawn(legs_by_origin(suite), features, 5, 0)
    kinds = {(item.leg, item.module, item.module_out) for item in items if item.layer == 1}
    assert kinds == {("L1", "resid_post", None), (sae.id, "mlp_in", None), (transcoder.id, "mlp_in", "mlp_out")}
    tallies = [(row.leg, row.module_out, row.n_latents) for row in layer_tallies(items, {}) if row.module == "mlp_in"]
    assert tallies == [(sae.id, None, 5), (transcoder.id, "mlp_out", 5)]
    forward = [item.changed(origin="forward") for item in items if item.module_out]
    scratch = [item for item in items if item.leg == sae.id]
    assert difference("forward", [*forward, *scratch], {}).layers == [], "an SAE says nothing of a transcoder"


def test_alive_latents_are_drawn_equally_and_shuffled(suite: Suite) -> None:
    legs = legs_by_origin(suite)
    features = {leg.id: load_features(suite.directory, leg.id) for leg in legs.values()}
    items = drawn(legs, features, 20, 0)
    assert [item.item for item in items] == list(range(1, 81))
    for (site, _, origin), leg in legs.items():
        chosen = [item.latent for item in items if (item.layer, item.origin) == (site.layer, origin)]
        assert len(set(chosen)) == 20 and (features[leg.id].n_fired[chosen] > 0).all()
    origins = [item.origin for item in items]
    assert sum(a != b for a, b in zip(origins, origins[1:], strict=False)) > 25
    assert sorted(item.latent for item in drawn(legs, features, 10 * F, 0)) == [
        latent
        for latent in range(1, F)
        for _ in legs  # latent 0 is silent
    ]
    assert drawn(legs, features, 20, 1) != items


def test_same_seed_same_bytes_and_another_seed_another_page(suite: Suite) -> None:
    page, key = judge_run(suite, n=5, seed=3)
    first = page.read_bytes(), page.with_suffix(".json").read_bytes()
    again, same = judge_run(suite, n=5, seed=3)
    assert (again, same) == (page, key) and (again.read_bytes(), again.with_suffix(".json").read_bytes()) == first
    assert judge_run(suite, n=5, seed=4)[0] != page


def test_permuting_and_renaming_legs_changes_nothing_but_labels(suite: Suite) -> None:
    page, key = judge_run(suite, n=5)
    before = page.read_bytes()
    suite.plan = suite.plan.changed(legs=suite.plan.legs[::-1])
    assert judge_run(suite, n=5) == (page, key) and page.read_bytes() == before
    legs = legs_by_origin(suite)
    features = {leg.id: load_features(suite.directory, leg.id) for leg in legs.values()}
    items = drawn(legs, features, 5, 0)
    renamed = {where: leg.changed(id=f"z-{leg.id}") for where, leg in legs.items()}
    features |= {f"z-{name}": known for name, known in features.items()}
    others = drawn(dict(reversed(renamed.items())), features, 5, 0)
    unnamed = [item.changed(leg=item.leg.removeprefix("z-")) for item in others]
    assert unnamed == drawn(dict(reversed(legs.items())), features, 5, 0)
    test = np.load(suite.directory.tokens / "test.npy")
    again = page_data(drawn(renamed, features, 5, 0), features, test, token_text)
    assert again == page_data(items, features, test, token_text)


# --- the page ---------------------------------------------------------------------------------------------------


def test_the_page_does_not_say_where_latents_come_from(suite: Suite) -> None:
    page, key = judge_run(suite, n=8)
    data, text = data_of(page), page.read_text(encoding="utf-8")
    assert data.keys() == {"page", "levels", "texts", "items"} and len(data["items"]) == len(key.items) == 32
    for item in data["items"]:
        assert item.keys() == {"examples", "top", "bottom"}
        assert all(example.keys() == {"peak", "tokens", "levels"} for example in item["examples"])
    assert not any(leg.id in text for leg in suite.legs if leg.id != "L1") and '"L1"' not in text
    assert not re.search("scratch|forward|backward|control|latent|layer", re.sub("(?s)<style>.*</style>", "", text))
    assert str(suite.directory.root) not in text


def test_examples_are_shown_as_features_know_them(suite: Suite) -> None:
    page, key = judge_run(suite, n=4)
    data, test = data_of(page), np.load(suite.directory.tokens / "test.npy")
    for item, shown in zip(key.items, data["items"], strict=True):
        known = load_features(suite.directory, item.leg)
        most = float(known.max_activation[item.latent])
        for example, seen in zip(known.examples(item.latent), shown["examples"], strict=True):
            first = example.position - seen["peak"]
            assert [data["texts"][t] for t in seen["tokens"]] == [
                token_text(t) for t in test[example.sequence, first : first + len(seen["tokens"])].tolist()
            ]
            for i, level in enumerate(seen["levels"], start=first - example.start):
                inside = 0 <= i < len(example.activations)
                share = example.activations[i] / most if inside else -1.0
                assert level == (min(data["levels"], math.ceil(share * data["levels"])) if inside else -1)
        values = known.tensors()["bottom_logits_values"][item.latent]
        assert [value < 0 for _, value in shown["bottom"]] == (values.round(decimals=2) < 0).tolist()
        assert max(abs(value) for _, value in shown["top"] + shown["bottom"]) == 1


def test_the_page_goes_where_asked_but_replaces_nothing_else(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    page, key = judge_run(suite, n=2, out=tmp_path / "folder")
    assert page == tmp_path / "folder" / f"judge-{key.page}.html"
    assert (suite.directory.judging / f"{key.page}.json").is_file()
    assert [judge_run(suite, n=n, out=tmp_path / "a.html")[0] for n in (2, 3)] == [tmp_path / "a.html"] * 2
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(RunDirectoryError, match="exists and is not a judging page"):
        judge_run(suite, n=2, out=tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "mine"


# --- scores -----------------------------------------------------------------------------------------------------


def test_wilson_and_kappa_as_computed_by_hand() -> None:
    for yes, n in [(0, 5), (5, 5), (27, 32), (1, 2)]:
        expected = binomtest(yes, n).proportion_ci(0.95, method="wilson")
        assert wilson(yes, n) == pytest.approx((expected.low, expected.high))
        z, p = 1.959963984540054, yes / n
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        by_hand = [(p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
        assert wilson(yes, n) == pytest.approx(by_hand, abs=1e-12)
    assert all(map(math.isnan, wilson(0, 0)))
    # Cohen's table of 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed .7, expected .5, kappa .4
    table = {(1, 1): 20, (1, 0): 5, (0, 1): 10, (0, 0): 15}
    votes = np.array([pair for pair, n in table.items() for _ in range(n)], bool)
    assert cohen_kappa(votes) == pytest.approx(0.4)
    assert cohen_kappa(votes[:, ::-1]) == pytest.approx(0.4)
    assert math.isnan(cohen_kappa(np.ones((4, 2), bool)))


def item_number(i: int) -> JudgedItem:
    """An item of which only the number matters."""
    return JudgedItem(item=i, layer=0, module="resid_post", origin="scratch", leg="L0", kind="root", latent=i)


def test_agreement_counts_what_both_judged() -> None:
    items = [item_number(i) for i in range(1, 7)]
    a = {1: "yes", 2: "yes", 3: "no", 4: "skip", 5: "yes"}
    b = {1: "yes", 2: "no", 3: "no", 4: "yes", 6: "yes"}
    assert agreement(items, {"a": a}) == []
    (row,) = agreement(items, {"a": a, "b": b})
    assert row.judges == ["a", "b"] and row.n_latents == 3 and row.raw == pytest.approx(2 / 3)
    assert row.kappa == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert len(agreement(items, {"a": a, "b": b, "c": a})) == 3


def test_the_majority_decides_and_ties_are_counted_apart() -> None:
    items = [item_number(i) for i in range(1, 6)]
    first = {1: "yes", 2: "yes", 3: "no", 4: "skip"}
    second = {1: "yes", 2: "no", 3: "skip", 4: "skip"}
    row = tallied(items, {"a": first, "b": second})
    assert (row.n_latents, row.n_judged, row.n_tied, row.n_interpretable) == (5, 3, 1, 1)
    assert row.share == 0.5 and (row.low, row.high) == wilson(1, 2)


def test_scores_join_answers_with_origins(suite: Suite, tmp_path: Path) -> None:
    _, key = judge_run(suite, n=10)
    quota = {(0, "backward"): 4, (0, "scratch"): 6, (1, "scratch"): 9, (2, "forward"): 8}
    left, answers = dict(quota), {}
    for item in key.items:
        place = (item.layer, item.origin)
        answers[item.item] = "yes" if left[place] > 0 else "no"
        left[place] -= 1
    first = answered(tmp_path / "a.json", key.page, answers)
    scores = score_run(suite, [first])
    assert Scores.load(suite.directory.judging / "scores.json") == scores
    assert {(row.layer, row.origin): row.n_interpretable for row in scores.layers} == quota
    shares = {row.origin: (row.share, row.low, row.high) for row in scores.origins}
    assert shares == {o: (yes / n, *wilson(yes, n)) for o, yes, n in
                      (("scratch", 15, 20), ("forward", 8, 10), ("backward", 4, 10))}  # fmt: skip
    forward, backward = scores.differences
    assert forward.layers == [] and forward.difference is None
    # the only layer with both: 4 of 10 beside 6 of 10 (Newcombe 1998, method 10)
    assert backward.layers == [0] and backward.difference == pytest.approx(-0.2)
    (l1, u1), (l2, u2) = wilson(4, 10), wilson(6, 10)
    expected = -0.2 - math.hypot(0.4 - l1, u2 - 0.6), -0.2 + math.hypot(u1 - 0.4, 0.6 - l2)
    assert (backward.low, backward.high) == pytest.approx(expected)
    second = answered(tmp_path / "b.json", key.page, answers, "Bob")
    (pair,) = score_run(suite, [first, second]).agreement
    assert (pair.judges, pair.n_latents, pair.raw, pair.kappa) == (["Ada", "Bob"], 40, 1, pytest.approx(1))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"page": "0123456789ab"}, RunDirectoryError, "page 0123456789ab, .* not in this run .*: [0-9a-f]{12}$"),
        ({"page": "../../secret"}, RecipeError, "page: must match pattern"),
        ({"answers": {"9": "yes"}}, RunDirectoryError, "has an answer for item 9, but page .* has items 1 to 8"),
        ({"answers": {"1": "perhaps"}}, RecipeError, "answers.1: must be 'yes', 'no' or 'skip'"),
        ({"schema": 2}, RecipeError, "schema: must be 1"),
        ({"origin": "forward"}, RecipeError, 'unknown key "origin"'),
    ],
)
def test_files_that_do_not_belong_are_refused(
    suite: Suite, tmp_path: Path, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    _, key = judge_run(suite, n=2)
    fitting = {"schema": 1, "page": key.page, "judge": "Ada", "answers": {"1": "yes"}}
    (tmp_path / "good.json").write_text(json.dumps(fitting | {"judge": "Bob"}))
    (tmp_path / "bad.json").write_text(json.dumps(fitting | change))
    with pytest.raises(error, match=says):
        score_run(suite, [tmp_path / "good.json", tmp_path / "bad.json"])
    assert not (suite.directory.judging / "scores.json").exists()


def test_one_page_is_scored_and_each_judge_once(suite: Suite, tmp_path: Path) -> None:
    pages = [judge_run(suite, n=2, seed=seed)[1].page for seed in (0, 1)]
    files = [answered(tmp_path / f"{i}.json", page, {1: "yes"}, str(i)) for i, page in enumerate(pages)]
    with pytest.raises(RunDirectoryError, match="judge 2 different pages"):
        score_run(suite, files)
    with pytest.raises(RunDirectoryError, match='another file is by judge "0"'):
        score_run(suite, [files[0], files[0]])
    with pytest.raises(RunDirectoryError, match="give the files that the judges exported"):
        score_run(suite, [])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RecipeError, match=r"broken\.json: cannot be read"):
        score_run(suite, [tmp_path / "broken.json"])


def test_the_report_shows_scores_once_there_are_some(suite: Suite, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "write_figures", lambda sources, folder: [])
    page = report.write_report(sources_of(suite), suite.directory.report)
    assert "Human judgements of features" not in page.read_text(encoding="utf-8")
    _, key = judge_run(suite, n=5)
    said = {item.item: "yes" if item.origin == "forward" else "no" for item in key.items}
    files = [answered(tmp_path / f"{name[0]}.json", key.page, said, name) for name in ("Ada", "<b>Bob</b>")]
    score_run(suite, files)
    text = report.write_report(sources_of(suite), suite.directory.report).read_text(encoding="utf-8")
    rows = re.findall(r'<th scope="row">(from [a-z ]+)</th>(.*?)</tr>', text, re.S)
    shown = {origin: re.sub("(<[^>]*>|\\s)+", " ", cells).strip() for origin, cells in rows}
    assert shown == {
        "from scratch": "10 of 10 0.0 % 0.0 % to 27.8 % L0-scratch-full: 0.0 %, L1: 0.0 %",
        "from a lower layer": "5 of 5 100.0 % 56.6 % to 100.0 % L2-from-L1: 100.0 %",
        "from a higher layer": "5 of 5 0.0 % 0.0 % to 43.4 % L0-from-L1: 0.0 %",
    }
    agreement = "<bdi>Ada</bdi> and <bdi>&lt;b&gt;Bob&lt;/b&gt;</bdi> agree on 100.0 % of 20 features"
    assert f"{agreement} (Cohen’s kappa 1.00)" in text
    assert "<b>Bob" not in text


# --- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; pip install -e '.[dev]'"
    )
    if not CHROMIUM:
        pytest.skip("no chromium here; Debian: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def judging(finished: Suite) -> tuple[Path, dict[str, Any]]:
    """A page with every latent, so that the hostile ones are among them; its key as JSON data."""
    page, key = judge_run(finished, n=F)
    return page, key.to_data()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    """Opens a page file; whatever goes wrong there, or leaves it, fails the test."""
    complaints, contexts = list[str](), list[Any]()

    def open_page(path: Path, **options: Any) -> Any:
        contexts.append(chromium.new_context(**({"viewport": LAPTOP} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri()
                and not request.url.startswith("blob:") else None)  # fmt: skip
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def test_judge_ten_by_keyboard_reload_export_and_score(
    visit: Any, suite: Suite, tmp_path: Path, capsys, monkeypatch
) -> None:
    path, page_key = judge_run(suite, layers=[0], n=5)
    key = page_key.to_data()
    page = visit(path)
    page.fill("input", "Ada <b>")
    page.keyboard.press("Enter")
    for letter in "ynsyn":
        page.keyboard.press(letter)
    assert page.inner_text("main h1") == "Feature 6" and page.inner_text("#progress") == "6 of 10 · 5 done"
    page.reload()
    assert page.inner_text("main h1") == "Feature 6" and page.inner_text("#progress") == "6 of 10 · 5 done"
    page.keyboard.press("y")
    page.keyboard.press("u")
    assert page.locator("#answers [aria-pressed=true]").count() == 0
    assert page.inner_text("#progress") == "6 of 10 · 5 done"
    for letter in "nyyyn":
        page.keyboard.press(letter)
    assert page.inner_text("main h1") == "Done. Thank you!"
    with page.expect_download() as download:
        page.keyboard.press("e")
    export = tmp_path / download.value.suggested_filename
    download.value.save_as(export)
    said = ["yes", "no", "skip", "yes", "no", "no", "yes", "yes", "yes", "no"]
    assert json.loads(export.read_text()) == {
        "schema": 1, "page": key["page"], "judge": "Ada <b>", "answers": {str(i): a for i, a in enumerate(said, 1)}
    }  # fmt: skip
    code, shown, stderr = call("judge", path.parent.parent, "--score", export, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, stderr
    assert "Ada <b>: 5 yes, 4 no, 1 skipped, 0 not answered" in shown
    yes = {o: sum(a == "yes" for a, i in zip(said, key["items"], strict=True) if i["origin"] == o)
           for o in ("scratch", "backward")}  # fmt: skip
    code, shown, _ = call(
        "judge", path.parent.parent, "--score", export, "--json", capsys=capsys, monkeypatch=monkeypatch
    )
    assert {row["origin"]: row["n_interpretable"] for row in json.loads(shown)["origins"]} == yes


def test_held_keys_shortcuts_and_typing_judge_nothing(
    visit: Any, judging: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    page, n = visit(judging[0]), len(judging[1]["items"])
    page.locator("input").press_sequentially("sunny")
    assert page.inner_text("#progress") == "" and page.input_value("input") == "sunny"
    for key in ("Enter", "Control+y", "y"):
        page.keyboard.press(key)
    page.keyboard.down("n")
    page.keyboard.down("n")
    assert page.inner_text("#progress") == f"3 of {n} · 2 done"
    page.evaluate("n => go(n + 1)", n)
    assert page.inner_text("main h1") == "Some features are left"
    page.get_by_text("Go to the first unanswered feature").click()
    page.keyboard.press("u")
    with page.expect_download() as download:
        page.keyboard.press("e")
    download.value.save_as(tmp_path / "export.json")
    assert json.loads((tmp_path / "export.json").read_text())["answers"] == {"1": "yes"}


def test_hostile_text_is_shown_as_text(visit: Any, judging: tuple[Path, dict[str, Any]]) -> None:
    path, key = judging
    page = visit(path)
    hostile = next(item["item"] for item in key["items"] if item["latent"] == 1)
    page.evaluate("at => go(at)", hostile)
    tokens = page.locator(".token").all_inner_texts()
    for text in (HOSTILE[1], HOSTILE[2], HOSTILE[6], HOSTILE[8]):
        assert text in tokens
    joined = "".join(tokens)
    for sign in ("[U+202E]", "[U+200F]", "[U+D800]", "[U+2028]", "⏎⇥␀ ␛", "(10,000 characters)"):
        assert sign in joined
    assert page.evaluate("document.querySelectorAll('main img, main script, main b').length") == 0
    assert page.evaluate("getComputedStyle(document.querySelector('.token')).unicodeBidi") == "isolate"
    assert page.evaluate("document.documentElement.scrollWidth") <= LAPTOP["width"]


def test_the_policy_forbids_what_a_page_could_be_made_to_send(
    chromium: Any, judging: tuple[Path, dict[str, Any]]
) -> None:
    context = chromium.new_context()
    page = context.new_page()
    asked, refused = list[str](), list[str]()
    page.on("console", lambda message: refused.append(message.text))
    context.route(re.compile("^https?:"), lambda route: (asked.append(route.request.url), route.abort()))
    page.goto(judging[0].as_uri())
    page.evaluate("""() => {
        document.body.append(Object.assign(new Image(), {src: "http://elsewhere.test/a"}));
        document.body.append(Object.assign(document.createElement("script"), {textContent: "window.hacked = 1"}));
        return fetch("http://elsewhere.test/b").catch(() => {});
    }""")
    assert asked == [] and len(refused) >= 3 and all("Content Security Policy" in text for text in refused)
    assert page.evaluate("window.hacked") is None
    context.close()


@pytest.mark.parametrize(("viewport", "theme"), product((LAPTOP, PHONE), ("light", "dark")))
def test_every_view_fits(
    visit: Any, judging: tuple[Path, dict[str, Any]], viewport: dict[str, int], theme: str
) -> None:
    page = visit(judging[0], viewport=viewport, color_scheme=theme)
    for at in (0, 1, 2, len(judging[1]["items"]) + 1):
        page.evaluate("at => go(at)", at)
        if judge_shown := 1 <= at <= len(judging[1]["items"]):
            page.click("#answers [data-key=y]" if at == 1 else "#answers [data-key=n]")
            page.keyboard.press("ArrowLeft")
            assert page.inner_text("main h1") == f"Feature {at}"
            assert page.get_attribute(f"#answers [data-key={'y' if at == 1 else 'n'}]", "aria-pressed") == "true"
        assert page.locator("#answers").is_visible() == judge_shown
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], at
        assert page.locator("#theme").bounding_box()["x"] < viewport["width"] - 30
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", paper)[:3])) < 60) == (theme == "dark")


def test_a_damaged_memory_is_forgotten(visit: Any, judging: tuple[Path, dict[str, Any]]) -> None:
    page, page_id = visit(judging[0]), judging[1]["page"]
    another = {"page": "x", "judge": "", "at": 1, "answers": {}, "given": []}
    strange = {"page": page_id, "judge": "", "at": 1, "answers": {"1": "<b>"}, "given": [1]}
    for damaged in ("{", "null", json.dumps(another), json.dumps(strange)):
        page.evaluate("([id, text]) => localStorage.setItem(`saerelay-judge-${id}`, text)", [page_id, damaged])
        page.reload()
        assert page.inner_text("main h1") == "Is this feature interpretable?" and page.inner_text("#progress") == ""
