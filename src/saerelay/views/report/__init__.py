"""`saerelay report`: one page, opened from disk, that shows the whole run; made only from documents.

report/index.html, style.css, *.js     the page: it contains the summary and draws the rest from data
report/data/                           script files, loaded when they are needed (see `data`)
report/figures/                        PNG, for papers
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from saerelay.errors import RunDirectoryError
from saerelay.files import remove_directory, replace_directory
from saerelay.views.labels import for_js
from saerelay.views.report.data import write_data
from saerelay.views.report.gallery import Picture, write_figures
from saerelay.views.report.sources import ReportSources
from saerelay.views.report.story import caption, story

MARK = ".saerelay-report"
"""Marks a directory that a report has written, so that the next report may replace it."""


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that no report has written."""
    if folder.exists() and not (folder / MARK).is_file():
        raise RunDirectoryError(f"{folder} holds something that is not a report; move it away")


def write_report(sources: ReportSources, folder: Path) -> Path:
    """Write a report beside an older one, then put it in the older one's place; return its index.html."""
    check_replaceable(folder)
    fresh = folder.with_name(f".{folder.name}.new")
    remove_directory(fresh)
    fresh.mkdir()
    (fresh / MARK).write_text("made by `saerelay report`; the next report replaces this directory\n")
    write_data(sources, caption(sources.summary), fresh / "data")
    pictures = write_figures(sources, fresh / "figures")
    write_page(sources, pictures, fresh)
    replace_directory(fresh, folder)
    return folder / "index.html"


def write_page(sources: ReportSources, pictures: list[Picture], folder: Path) -> None:
    """Fill the template, with everything escaped, and write the page's own files beside it."""
    assets = files("saerelay.views.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(assets.joinpath("template.html").read_text(encoding="utf-8"))
    context: dict[str, Any] = {
        **story(sources.plan, sources.summary, sources.measures),
        "figures": pictures,
        "judging": sources.judging,
        "circuits": sources.circuits,
        "run": sources.run,
        "labels": for_js(),
    }
    page = template.render(context)
    (folder / "index.html").write_text(page, encoding="utf-8", errors="replace")
    for asset in assets.iterdir():
        if asset.name.endswith((".js", ".css")):
            (folder / asset.name).write_bytes(asset.read_bytes())
