"""Retakes the pictures of docs/gallery.md from a report, in headless Chromium.

    python docs/gallery.py runs/gemma/report/index.html --feature L8/1200 --search kernel

`--feature` is an SAE and a feature whose page and whose way through the layers are shown, `--search` what the list of
features is asked for. Needs the `dev` extra (Playwright, Pillow) and a `chromium` on the path (Debian: `apt-get install
chromium`). It ends with an error if the pictures are larger than what the repository should carry.
"""

import argparse
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

FOLDER = Path(__file__).parent / "gallery"
MOST_BYTES = 1_500_000
"""Of all pictures together."""
QUALITY = 82
"""Of WebP, in percent."""


@dataclass(frozen=True)
class Shot:
    """One picture: what is looked at, on what."""

    name: str
    address: str
    width: int
    height: int
    theme: str = "light"
    scale: float = 1.0
    """Pixels of the picture per CSS pixel."""


def shots(feature: str, search: str) -> list[Shot]:
    """The pictures of the page, in its order."""
    return [
        Shot("overview", "#/", width=1366, height=960),
        Shot("feature", f"#/feature/{feature}", width=1366, height=1000),
        Shot("across-layers", f"#/compare/{feature}", width=1366, height=860, theme="dark"),
        Shot("lineage", "#/lineage", width=1366, height=820),
        Shot("search", f"#/features/all?q={search}", width=1366, height=700, theme="dark"),
        Shot("phone-overview", "#/", width=390, height=844, scale=2),
        Shot("phone-feature", f"#/feature/{feature}", width=390, height=844, theme="dark", scale=2),
    ]


def take(browser: Browser, report: Path, shot: Shot) -> int:
    """Take one picture; the size of its file in bytes."""
    context = browser.new_context(
        viewport={"width": shot.width, "height": shot.height},
        color_scheme="dark" if shot.theme == "dark" else "light",
        device_scale_factor=shot.scale,
    )
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(report.resolve().as_uri() + shot.address)
    page.wait_for_function("view => document.documentElement.dataset.shown === view", arg=shot.address)
    page.wait_for_timeout(500)  # transitions
    picture = Image.open(io.BytesIO(page.screenshot()))
    context.close()

    path = FOLDER / f"{shot.name}.webp"
    picture.convert("RGB").save(path, quality=QUALITY, method=6)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="a report's index.html")
    parser.add_argument("--feature", required=True, help="an SAE and a feature of it, such as L8/1200")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="the pictures to retake, if not all")
    parser.add_argument("--search", required=True, help="what the list of features is asked for")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        raise SystemExit("docs/gallery.py: no chromium on the path (Debian: apt-get install chromium)")

    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for shot in shots(options.feature, options.search):
            if options.only and shot.name not in options.only:
                continue
            size = take(browser, options.report, shot)
            print(f"{shot.name}: {size / 1000:.0f} kB")
        browser.close()
    total = sum(path.stat().st_size for path in FOLDER.glob("*.webp"))
    if total > MOST_BYTES:
        raise SystemExit(f"docs/gallery.py: {total:,} bytes of pictures, more than {MOST_BYTES:,}")


if __name__ == "__main__":
    main()
