"""The Hugging Face hub: references to files there, and whole suites up and down."""

from pathlib import Path


def local(reference: str | Path) -> Path:
    """The directory or file that a reference means, brought from the hub if it is hf://user/repo[@revision][/path]."""
    text = str(reference)
    if not text.startswith("hf:"):
        return Path(reference).expanduser()
    raise NotImplementedError
