"""What is built in, so that everything runs offline: a small language model of Python code and its corpus.

The corpus is the standard library of the running interpreter: nothing is shipped and nothing is downloaded.
"""

import platform
import sysconfig
from pathlib import Path

MODEL_DIR = Path(__file__).parent
"""Directory with the model's `config.json`, `model.safetensors` and `tokenizer.json`."""

_EXCLUDED = {"site-packages", "dist-packages", "lib2to3", "encodings", "__pycache__", "_bundled"}
_MIN_CHARS, _MAX_CHARS = 400, 400_000


def source() -> str:
    """Name the corpus, with the version it depends on.

    >>> source().startswith("Python 3.")
    True
    """
    return f"Python {platform.python_version()} standard library"


def documents() -> list[str]:
    """Read the Python files of the standard library and of its tests, sorted by path; empty if there are none as files.

    >>> all(400 <= len(text) <= 400_000 for text in documents())
    True
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted((path.relative_to(root) for path in root.rglob("*.py")), key=Path.as_posix)
    texts = (
        (root / path).read_text(encoding="utf-8", errors="replace")
        for path in paths
        if _EXCLUDED.isdisjoint(path.parts)
    )
    return [text for text in texts if _MIN_CHARS <= len(text) <= _MAX_CHARS]
