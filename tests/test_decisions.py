"""The pages in docs/decisions are numbered without a gap, listed in their index, and what cites them finds them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
CITATION = re.compile(r"\bdecisions?\s+(\d{3}(?:(?:,|\s+and|,\s+and)\s+\d{3})*)", flags=re.IGNORECASE)
"""One number, or several: "decision 007", "decisions 019 and 029"."""


def number_of(page: Path) -> str:
    """The three digits that a page's name begins with."""
    return page.name.partition("-")[0]


def citations(text: str) -> list[str]:
    """The numbers of all decisions that a text cites."""
    return [number for match in CITATION.finditer(text) for number in re.findall(r"\d{3}", match[1])]


def citing_files() -> list[Path]:
    """Code and pages that may cite a decision."""
    code = [*(ROOT / "src").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "bench").glob("*.md")]
    return [*code, *pages]


def test_decisions_are_numbered_from_1_without_a_gap_or_a_twin() -> None:
    assert [number_of(page) for page in PAGES] == [f"{n:03}" for n in range(1, len(PAGES) + 1)]


def test_a_decision_states_its_question_evidence_and_limits() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {number_of(page)} · "), page.name
        for part in ("Question", "Decision", "Evidence", "Rejected", "Look again if"):
            assert text.count(f"**{part}") == 1, f"{page.name}: {part}"


def test_the_index_lists_every_decision_by_its_title() -> None:
    titles = [page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for page in PAGES]
    index = (ROOT / "docs" / "decisions" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d{3}) \| \[(.+)\]\((.+)\) \|$", index, flags=re.MULTILINE)
    assert [(f"{number} · {title}", name) for number, title, name in rows] == [
        (title, page.name) for title, page in zip(titles, PAGES, strict=True)
    ]


def test_every_decision_that_is_cited_exists() -> None:
    known = {number_of(page) for page in PAGES}
    cited = {path: citations(path.read_text(encoding="utf-8")) for path in citing_files()}
    assert sum(path.suffix == ".py" for path, numbers in cited.items() if numbers) >= 5, "the code cites decisions"
    for path, numbers in cited.items():
        assert set(numbers) <= known, path


def test_a_citation_may_name_several_decisions() -> None:
    assert citations("(decision 007)") == ["007"]
    assert citations("see decisions 019\nand 029") == ["019", "029"]
    assert citations("Decisions 001, 002 and 003; a decision in 2024, decision 12") == ["001", "002", "003"]
