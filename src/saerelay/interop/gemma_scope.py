"""gemma_scope."""

from pathlib import Path

from saerelay.dictionaries import Dictionary, LayerNormed
from saerelay.interop.origin import Origin

NAME = "gemma_scope"


def recognises(path: Path) -> bool:
    """Whether it is."""
    return False


def read(path: Path) -> tuple[Dictionary | LayerNormed, Origin]:
    """Read it."""
    raise NotImplementedError
