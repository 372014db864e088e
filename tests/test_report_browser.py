"""The report in a browser, opened from disk, as people will see it.

SAERELAY_SCREENSHOTS=<directory> keeps pictures of every view, on a laptop and a phone, light and dark, to be looked at.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_run import EXPLANATION, HOSTILE, KNOWN, F, fake_run, sources_of, write_studies

from saerelay.runs.documents.latents import LineageDocument
from saerelay.views.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install -e '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here; Debian: apt-get install chromium")

VIEWS = (
    "# #/plan #/layers #/training #/lineage #/features/all #/feature/L1/123 #/compare/L1/123 #/measures "
    "#/interpret #/judging #/circuits #/figures"
)
HARD_TO_READ_OR_HIT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const paper = rgba(getComputedStyle(document.body).backgroundColor);
  const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => (c * a + under[i] * (255 - a)) / 255);
  const behind = (node) => {
    const parents = node.parentElement === null ? paper : behind(node.parentElement);
    return over(rgba(getComputedStyle(node).backgroundColor), parents);
  };
  const linear = (c) => (c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const faults = [];
  for (const node of document.querySelectorAll("body *")) {
    const box = node.getBoundingClientRect();
    const style = getComputedStyle(node);
    if (!box.width || !box.height || style.visibility === "hidden" || node.closest("svg, [disabled]")) continue;
    const name = `${node.tagName} "${node.textContent.slice(0, 30)}"`;
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (hasText) {
      const [low, high] = [rgba(style.color), behind(node)].map(luminance).sort((a, b) => a - b);
      const contrast = (high + 0.05) / (low + 0.05);
      if (contrast < 4.4) faults.push(`${name}: contrast ${contrast.toFixed(1)}`);
    }
    const isInline = node.closest("p, dd, .crumbs, .skip") !== null;
    if (node.matches("a:not(:has(img)), button, select, input, summary") && !isInline)
      if (box.width < 24 || box.height < 24) faults.push(`${name}: ${box.width} by ${box.height} pixels`);
  }
  return faults;
}"""
"""Text with less than the contrast that WCAG AA asks for, and what can be pressed but is under 24 pixels."""
LAPTOP, PHONE = {"width": 1366, "height": 768}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    suite = fake_run(tmp_path_factory.mktemp("report") / "run & <co>")
    write_studies(suite)
    return write_report(sources_of(suite), suite.directory.report)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page, and all that went wrong on it."""

    def __init__(self, browser: Any, report: Path, **options: Any) -> None:
        self.page = browser.new_context(**({"viewport": LAPTOP} | options)).new_page()
        self.page.set_default_timeout(10_000)
        self.report, self.complaints = report, list[str]()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        self.page.on(
            "request", lambda request: request.url.startswith("file://") or self.complaints.append(request.url)
        )

    def at(self, address: str) -> Any:
        """The page when the view at an address is drawn."""
        self.page.goto(self.report.as_uri() + address)
        self.drawn(address)
        return self.page

    def drawn(self, address: str) -> None:
        """Wait for a view."""
        self.page.wait_for_function("view => document.documentElement.dataset.shown === view", arg=address or "#/")


def keep_screenshot(page: Any, name: str) -> None:
    """A picture of the whole page, if somebody wants to look at it."""
    folder = os.environ.get("SAERELAY_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{re.sub(r'[^a-z0-9-]+', '-', name.lower())}.png", full_page=True)


@pytest.fixture
def visit(chromium: Any, report: Path) -> Iterator[Visit]:
    seen = Visit(chromium, report)
    yield seen
    seen.page.context.close()
    assert seen.complaints == []


@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_loads_and_fits(chromium: Any, report: Path, viewport: dict[str, int], theme: str) -> None:
    seen = Visit(chromium, report, viewport=viewport, color_scheme=theme)
    for address in VIEWS.split():
        page = seen.at(address.replace("#", "#/") if address == "#" else address)
        assert page.locator("main h1:visible").count() == 1
        assert page.locator(".note:visible").count() == (1 if "measures" in address else 0), page.inner_text("main")
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], address
        assert page.evaluate(HARD_TO_READ_OR_HIT) == [], address
        keep_screenshot(page, f"{viewport['width']}-{theme}-{address}")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", dark)[:3])) < 60) == (theme == "dark")
    seen.page.context.close()
    assert seen.complaints == []


def test_the_summary_can_be_read_without_javascript(chromium: Any, report: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    text = page.inner_text("main")
    for expected in (
        "What was saved?",
        "What did it cost",
        "Which layers transfer poorly?",
        "<i>model",
        "L0-from-L1",
    ):
        assert expected in text
    context.close()


def test_judging_and_circuits_have_pages_that_show_names_as_text(visit: Visit) -> None:
    page = visit.at("#/judging")
    assert HOSTILE[1] in page.inner_text("main section:visible") and "50.0 %" in page.inner_text("main section:visible")
    page = visit.at("#/circuits")
    shown = page.inner_text("main section:visible")
    assert "<b>sums" in shown and "alert(3)" in shown and "0.90 ± 0.10" in shown
    assert page.locator("main section:visible tbody tr").count() == 5  # three legs and two controls


def test_a_search_finds_a_known_latent(visit: Visit) -> None:
    page = visit.at("#/features/all")
    page.fill("input[type=search]", "needle")
    rows = page.locator("ol.list a.row")
    assert rows.count() == 1 and rows.first.get_attribute("href") == f"#/feature/L1/{KNOWN[1]}"
    assert "?q=needle" in page.url
    rows.first.click()
    visit.drawn(f"#/feature/L1/{KNOWN[1]}")
    assert page.locator(".token.peak:visible").inner_text() == "needle"


def test_filters_and_numbers_find_latents(visit: Visit) -> None:
    page = visit.at("#/features/L1")
    page.fill("input[type=search]", "#57")
    assert page.locator("ol.list a.row .id").all_inner_texts() == ["57"]
    page.fill("input[type=search]", "")
    page.get_by_label("Density").select_option("0")
    assert page.locator("ol.list a.row .id").all_inner_texts() == ["0"]
    page.get_by_label("Density").select_option(label="over 10 %")
    assert page.locator("ol.list a.row[href$='/2'] .n").first.inner_text() == "100\u00a0%"
    page.get_by_label("Density").select_option("")
    page.get_by_label("In the next layer").select_option("x")
    assert set(page.locator("ol.list a.row .status").all_inner_texts()) == {"died"}


def test_a_click_follows_a_feature_to_the_next_layer(visit: Visit) -> None:
    page = visit.at("#/feature/L0-from-L1/123")
    layers = page.locator(".strand a").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
    assert layers == [f"#/feature/{leg}/123" for leg in ("L0-from-L1", "L1", "L2-from-L1")]
    page.click("a.onward")
    visit.drawn("#/feature/L1/123")
    assert page.inner_text("main h1:visible") == "Feature 123 of layer 1"
    page.click("a.onward")
    visit.drawn("#/feature/L2-from-L1/123")
    assert "last layer" in page.inner_text("section.next")
    page.go_back()
    visit.drawn("#/feature/L1/123")


def test_a_control_leads_back_to_what_it_was_matched_with(visit: Visit) -> None:
    page = visit.at("#/feature/L0-from-L1/5")
    link = page.locator("section:has(> h2:text('Matched one to one with')) a").first
    there = link.get_attribute("href")
    link.click()
    visit.drawn(there)
    page.click("section:has(> h2:text('Matched one to one with')) a")
    visit.drawn("#/feature/L0-from-L1/5")


def test_a_band_lists_its_latents_and_one_is_traced(visit: Visit) -> None:
    page = visit.at("#/lineage")
    band = page.locator("path.band.x").first
    n = int(re.match(r"[\d,]+", band.get_attribute("aria-label"))[0].replace(",", ""))  # type: ignore[index]
    band.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        "n => document.querySelector('[data-view=lineage] h2').textContent.startsWith(`${n} died`)", arg=n
    )
    page.locator("button.quiet").first.click()
    page.wait_for_selector(".flow .trace", state="attached")
    page.wait_for_function("() => document.querySelectorAll('.strand li').length === 3")
    assert page.locator(".flow .stop").count() == 3


def test_the_lineage_says_what_share_of_its_features_a_control_has_as_well(visit: Visit) -> None:
    links = LineageDocument.load(visit.report.parents[1] / "lineage.json").links
    [status] = [link.status for link in links if link.target == "L0-scratch-full"]
    alive = len(status) - status.count("-") - status.count("b")  # those born are features of the control alone
    told = visit.at("#/lineage").inner_text("section[data-view=lineage] p.wide")
    assert f"{100 * status.count('k') / alive:.2g}\u00a0% (L0-scratch-full)" in told


def test_pictures_of_few_layers_are_no_larger_than_they_need_to_be(visit: Visit) -> None:
    box = visit.at("#/lineage").locator(".flow").bounding_box()
    assert 300 < box["height"] < LAPTOP["height"]


def test_what_a_matrix_lacks_is_not_talked_about(visit: Visit) -> None:
    """Means of neighbours that the run does not have, colours where all numbers are equal, fewer tokens where all."""
    page = visit.at("#/layers")
    said = page.inner_text("section[data-view=layers]")
    assert "one layer later (forward), " in said
    page.evaluate("""async () => {
      const run = await saerelay.load("run");
      const matrix = await saerelay.load("matrix");
      matrix.n_tokens = run.n_tokens;
      matrix.cells = matrix.cells.filter(({ source, target }) => source !== 1 && target !== 1);
      matrix.cells.forEach((cell, i) => (cell.fvu = 0.5 + i * 1e-6));
      location.hash = "#/plan";
      location.hash = "#/layers";
    }""")
    visit.drawn("#/layers")
    page.locator("section[data-view=layers] select").last.dispatch_event("change")
    said = page.inner_text("section[data-view=layers]")
    assert "on the SAE's own layer." in said and "one layer" not in said and "Measured on the first" not in said
    cells = page.locator("section[data-view=layers] td").filter(has_text="0.500")
    colours = cells.evaluate_all("cells => cells.map((cell) => getComputedStyle(cell).backgroundColor)")
    assert len(colours) > 2 and len(set(colours)) == 1


def test_a_random_dictionary_is_no_sae_that_was_trained_independently(visit: Visit) -> None:
    page = visit.at("#/")
    page.evaluate("""async () => {
      const { legs } = await saerelay.load("run");
      legs.find((leg) => leg.id === "L0-scratch-full").control_kind = "random";
      location.hash = "#/lineage";
    }""")
    visit.drawn("#/lineage")
    told = page.inner_text("section[data-view=lineage] p.wide")
    assert "(L0-scratch-equal)" in told and "(L0-scratch-full)" not in told


def test_hostile_text_is_shown_as_text(visit: Visit) -> None:
    page = visit.at("#/feature/L1/1")
    tokens = page.locator(".token").all_inner_texts()
    for text in (HOSTILE[1], HOSTILE[2], HOSTILE[6], HOSTILE[8]):
        assert text in tokens
    joined = "".join(tokens)
    for sign in ("[U+202E]", "[U+200F]", "[U+D800]", "[U+2028]", "⏎⇥␀ ␛", "(10,000 characters)"):
        assert sign in joined
    assert page.evaluate("document.querySelectorAll('main img[src=x], main script').length") == 0
    assert page.evaluate("getComputedStyle(document.querySelector('.token')).unicodeBidi") == "isolate"
    assert page.evaluate("document.documentElement.scrollWidth") <= LAPTOP["width"]
    for address in (
        "#/features/L1?q=script",
        "#/features/%3Cimg%20src=x%3E",
        "#/feature/L1/%3Cscript%3E",
        f"#/feature/L1/{F}",
    ):
        page = visit.at(address)
        assert page.evaluate("document.querySelectorAll('main img[src=x], main script').length") == 0


def test_explanations_stand_by_their_features(visit: Visit) -> None:
    page = visit.at("#/feature/L1/1")
    line = page.inner_text(".explanation")
    assert line.startswith("Explanation: fires on <script>alert(5)</script> <img src=x onerror=alert(6)> [U+202E]and")
    assert line.endswith("y" * EXPLANATION.count("y") + " (detection 0.50, fuzzing 0.25; chance is 0.5)")
    assert visit.at("#/feature/L1/3").locator(".explanation").count() == 0
    page = visit.at("#/interpret")
    rows = page.locator("[data-view=interpret] table >> nth=0").locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == ["from scratch", "from a higher layer"]
    assert "0.750 ± 0.250" in rows[0]
    page.locator("summary:has-text('L1: 2')").last.click()
    page.locator(".explanations a:visible").first.click()
    visit.drawn("#/feature/L1/1")
    assert page.evaluate("document.querySelectorAll('main img[src=x], main script').length") == 0


def test_the_theme_can_be_switched_and_is_kept(visit: Visit) -> None:
    page = visit.at("#/")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == after


def test_the_heat_map_tells_values_to_mouse_and_keyboard(visit: Visit) -> None:
    page = visit.at("#/layers")
    cells = page.locator(".heat td")
    assert cells.count() == 9
    cells.nth(1).hover()
    assert "SAE of layer 0 on layer 1" in page.inner_text("#tip")
    cells.nth(0).focus()
    page.keyboard.press("ArrowDown")
    assert "SAE of layer 1 on layer 0" in page.inner_text("#tip")
    first = page.inner_text(".heat td >> nth=1")
    page.get_by_label("Transfer method").select_option("affine")
    assert page.inner_text(".heat td >> nth=1") != first


def test_arrow_keys_step_over_cells_without_a_value(visit: Visit) -> None:
    page = visit.at("#/layers")
    page.evaluate("""() => document.querySelector("main section:not([hidden]) .body").replaceChildren(heatMap({
        rows: [0, 1, 2], columns: [0, 1, 2], corner: "", digits: 2, rowName: String, columnName: String,
        value: (row, column) => (row === column ? null : 3 * row + column),
        tooltip: (row, column) => `${row} on ${column}`,
    }))""")
    page.locator(".heat td[tabindex='0']").focus()
    assert page.inner_text("#tip") == "0 on 1"
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#tip") == "2 on 1"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#tip") == "1 on 0"
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#tip") == "1 on 0"


# --- the chart on the first page ------------------------------------------------------------------------------------


def test_the_overview_tells_values_to_mouse_and_keyboard(visit: Visit) -> None:
    page = visit.at("#/")
    chart = page.locator("svg.marks").first
    marks = chart.locator(".mark")
    assert marks.count() == 5 and chart.locator(".mark[tabindex='0']").count() == 1
    marks.nth(2).locator("path").first.hover()
    assert "L0-scratch-full: control: from scratch, full budget" in page.inner_text("#tip")
    assert "ΔCE 0.1000 ± 0.0100" in page.inner_text("#tip")
    marks.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert "L0-scratch-equal" in page.inner_text("#tip")
    assert chart.locator(".mark[tabindex='0']").get_attribute("aria-label").startswith("L0-scratch-equal")
    assert page.locator(f"#{chart.get_attribute('aria-details')}").count() == 1, "a table has the numbers"


def test_the_overview_stands_above_the_fold_and_marks_lie_within_it(visit: Visit) -> None:
    page = visit.at("#/")
    assert page.locator("svg.marks").first.bounding_box()["y"] < LAPTOP["height"]
    for chart in page.locator("svg.marks").all():
        frame = chart.bounding_box()
        for path in chart.locator(".mark path").all():
            box = path.bounding_box()
            assert frame["x"] < box["x"] and box["x"] + box["width"] < frame["x"] + frame["width"]
            assert frame["y"] < box["y"] and box["y"] + box["height"] < frame["y"] + frame["height"]


# --- the keyboard ---------------------------------------------------------------------------------------------------


def focused(page: Any) -> str:
    """What has the focus."""
    return page.evaluate("document.activeElement.getAttribute('href') || document.activeElement.type || ''")


def test_a_slash_leads_to_the_search_and_arrows_through_its_results(visit: Visit) -> None:
    page = visit.at("#/feature/L1/123")
    page.keyboard.press("/")
    visit.drawn("#/features/L1")
    page.wait_for_function("() => document.activeElement.type === 'search'")
    page.keyboard.type("/")  # in the field it is a letter
    assert page.input_value("input[type=search]") == "/"
    page.keyboard.press("Escape")
    assert page.input_value("input[type=search]") == ""
    rows = page.locator("ol.list a.row").evaluate_all("rows => rows.map((row) => row.getAttribute('href'))")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert focused(page) == rows[1]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert focused(page) == "search"
    page.keyboard.press("Escape")
    assert focused(page) != "search"


def test_arrows_lead_to_other_features_and_with_shift_to_other_layers(visit: Visit) -> None:
    page = visit.at("#/feature/L1/123")
    page.keyboard.press("ArrowRight")
    visit.drawn("#/feature/L1/124")
    page.keyboard.press("ArrowLeft")
    visit.drawn("#/feature/L1/123")
    page.keyboard.press("Shift+ArrowRight")
    visit.drawn("#/feature/L2-from-L1/123")
    page.keyboard.press("Shift+ArrowRight")  # there is no layer after it
    page.keyboard.press("Shift+ArrowLeft")
    visit.drawn("#/feature/L1/123")
    page.keyboard.press("Control+ArrowRight")  # the browser's own
    page.go_back()
    visit.drawn("#/feature/L2-from-L1/123")


def test_a_question_mark_lists_the_keys_and_escape_closes_the_list(visit: Visit) -> None:
    page = visit.at("#/feature/L1/123")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible() and "search for a feature" in page.inner_text("#keys")
    page.keyboard.press("ArrowRight")  # does nothing behind the list
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible() and page.url.endswith("#/feature/L1/123")
    page.click("#show-keys")
    page.click("#hide-keys")
    assert not page.locator("#keys").is_visible()


def test_everything_that_can_be_pressed_is_reached_with_tab_and_shows_it(visit: Visit) -> None:
    for address in ("#/features/L1", "#/feature/L1/123", "#/lineage"):
        page = visit.at(address)
        controls = page.evaluate("""() => {
          const all = document.querySelectorAll("a, button, select, input, summary, [role=button]");
          const seen = [...all].filter((node) => node.checkVisibility() && !node.disabled);
          return seen.filter((node) => node.tabIndex < 0).map((node) => node.outerHTML.slice(0, 80));
        }""")
        assert controls == []
        for _ in range(4):
            page.keyboard.press("Tab")
            outline, line = page.evaluate("""() => {
              const style = getComputedStyle(document.activeElement);
              return [style.outlineStyle, style.stroke];
            }""")
            assert outline == "solid" or line == "rgb(22, 33, 43)", "an outline, or a dark line around a band"


def test_the_skip_link_leads_into_the_view_and_not_to_another(visit: Visit) -> None:
    page = visit.at("#/plan")
    page.keyboard.press("Tab")
    assert page.locator("#skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    assert page.inner_text("main h1:visible") == "Plan"


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["#feature=L1/123", "#feature=L1%2F123", "#/feature/L1/123"])
def test_a_link_opens_its_feature_and_names_the_window_after_it(visit: Visit, address: str) -> None:
    page = visit.at(address)
    assert page.inner_text("main h1:visible") == "Feature 123 of layer 1"
    assert page.title().startswith("Feature 123 of layer 1 · Sparse autoencoders")


def test_the_link_of_a_feature_is_copied_or_shown(chromium: Any, report: Path) -> None:
    seen = Visit(chromium, report, permissions=["clipboard-read", "clipboard-write"])
    page = seen.at("#/feature/L1/123")
    page.get_by_role("button", name="Copy link").click()
    page.get_by_role("button", name="Copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url and link.endswith("#/feature/L1/123")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('refused')); }")
    page.keyboard.press("ArrowRight")
    seen.drawn("#/feature/L1/124")
    page.get_by_role("button", name="Copy link").click()
    assert page.get_by_label("Link to this feature").input_value() == page.url
    assert page.evaluate("getSelection().toString()") == page.url
    seen.page.context.close()
    assert seen.complaints == []


def test_the_way_back_leads_to_where_one_was(visit: Visit) -> None:
    page = visit.at("#/features/L1")
    row = page.locator("ol.list a.row").nth(40)
    row.scroll_into_view_if_needed()
    page.wait_for_function("() => history.state?.scrolled > 0")
    height = page.evaluate("scrollY")
    address = row.get_attribute("href")
    row.click()
    visit.drawn(address)
    page.wait_for_function("() => scrollY === 0")
    page.go_back()
    visit.drawn("#/features/L1")
    page.wait_for_function("height => Math.abs(scrollY - height) < 5", arg=height)
    page.go_forward()
    visit.drawn(address)


def test_a_view_that_is_drawn_too_late_is_not_shown(visit: Visit) -> None:
    page = visit.at("#/feature/L1/123")
    page.evaluate("""() => {
      const draw = saerelay.views.feature;
      saerelay.views.feature = async (body, parts, query) => {
        if (parts[1] === "124") await new Promise((resolve) => setTimeout(resolve, 300));
        await draw(body, parts, query);
      };
      location.hash = "#/feature/L1/124";
      setTimeout(() => { location.hash = "#/feature/L1/125"; }, 50);
    }""")
    visit.drawn("#/feature/L1/125")
    page.wait_for_timeout(500)
    assert page.inner_text("main h1:visible") == "Feature 125 of layer 1"


def test_a_list_that_comes_too_late_is_not_shown_under_the_name_of_another(visit: Visit) -> None:
    page = visit.at("#/features/L1")
    page.evaluate("""() => {
      const load = saerelay.load;
      saerelay.load = async (name) => {
        if (name === "index/L0-from-L1") await new Promise((resolve) => setTimeout(resolve, 300));
        return load(name);
      };
    }""")
    for leg in ("L0-from-L1", "L2-from-L1"):
        page.locator("section:visible .controls select").first.select_option(leg)
    page.wait_for_timeout(500)
    assert page.locator("ol.list a.row").first.get_attribute("href").startswith("#/feature/L2-from-L1/")


# --- paper ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["#/", "#/plan", "#/lineage", "#/feature/L1/123", "#/circuits"])
def test_a_printed_page_is_light_has_no_navigation_and_cuts_nothing_off(
    chromium: Any, report: Path, address: str
) -> None:
    paper = {"width": 680, "height": 1000}  # A4 without margins, in CSS pixels
    seen = Visit(chromium, report, viewport=paper, color_scheme="dark")
    page = seen.at(address)
    page.emulate_media(media="print")
    assert page.locator(".bar:visible, button:visible, select:visible, dialog:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)"
    assert page.evaluate("document.documentElement.scrollWidth") <= paper["width"]
    cut = page.evaluate("""() => [...document.querySelectorAll("main section:not([hidden]) *")]
      .filter((node) => node.clientWidth && node.scrollWidth > node.clientWidth + 1 && !node.closest("svg, .chip"))
      .filter((node) => getComputedStyle(node).overflowX !== "visible")
      .map((node) => node.outerHTML.slice(0, 80))""")
    assert cut == []
    keep_screenshot(page, f"print-{address}")
    seen.page.context.close()
