"""What the build of the documentation adds: README.md as its start page, more pages, and examples as code."""

import json
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages and files that are not in docs/; those of the directory above have links that begin with docs/."""
    for source, page in (("README.md", "index.md"), ("CONTRIBUTING.md", "CONTRIBUTING.md")):
        text = re.sub(r'(\]\(|src=")docs/', r"\1", (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
    files.append(File.generated(config, "tutorial.md", content=page_of(notebook)))
    for recipe in sorted((ROOT / "recipes").glob("*.toml")):
        files.append(File.generated(config, f"recipes/{recipe.name}", abs_src_path=str(recipe)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to the notebook lead to its page."""
    return markdown.replace("(tutorial.ipynb)", "(tutorial.md)")


def page_of(notebook: dict[str, Any]) -> str:
    """The cells of a notebook as Markdown, with what they printed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = output.get("text") or output["data"]["text/plain"]
            parts.append(f"```text\n{''.join(text).rstrip()}\n```")
    return "\n\n".join(parts)


class FencedExamples(griffe.Extension):
    """Puts the examples of docstrings (`>>>`) into fences, so that they are shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^>>> (?:.+\n?)+", r"```pycon\n\g<0>\n```\n", text, flags=re.M)
