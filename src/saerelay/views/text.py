"""Numbers, and text from others, formatted for people."""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any, TypeGuard

MAX_TOKEN_CHARS = 40
"""Most characters shown of a token."""
_SIGNS = {"\n": "⏎", "\t": "⇥", " ": " "}


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether a value is a number: neither None nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


def decimal(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` digits after the point; "-" for None.

    >>> decimal(0.0524, 3), decimal(None)
    ('0.052', '-')
    """
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, sign: str = "") -> str:
    """Format a share in percent; "-" for None; with `sign` "+", positive shares show their sign.

    >>> percent(0.125), percent(0.1, "+"), percent(None)
    ('12.5%', '+10.0%', '-')
    """
    return "-" if value is None else f"{value:{sign}.1%}"


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """Format a number with its standard error, if there is one.

    >>> with_error(0.5, 0.012, 2), with_error(0.5, None, 2), with_error(None, None, 2)
    ('0.50 ± 0.01', '0.50', '-')
    """
    if value is None or error is None:
        return decimal(value, digits)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def duration(seconds: float) -> str:
    """Format a time the way people say it.

    >>> duration(122.9), duration(4000), duration(36000)
    ('123 s', '67 min', '10.0 h')
    """
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def flops(value: float) -> str:
    """Format a number of operations, with a unit.

    >>> flops(2.1e13)
    '21 TFLOP'
    """
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e9:.3g} GFLOP"


def listed(items: Sequence[Any]) -> str:
    """Join items to a list in a sentence.

    >>> listed([1]), listed([1, 2, 3])
    ('1', '1, 2 and 3')
    """
    texts = [str(item) for item in items]
    if len(texts) == 1:
        return texts[0]
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def visible(text: str, longest: int = MAX_TOKEN_CHARS) -> str:
    """Return a token's text with invisible and control characters replaced by visible ones.

    >>> print(visible("a\\n\\x1b[2Jb\\u202e\\ud800"))
    a⏎\\x1b[2Jb\\u202e\ufffd
    """
    start = "".join(_visible_character(character) for character in text[:longest])
    return start + ("…" if len(text) > longest else "")


def _visible_character(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    if category[0] in "CZ":
        return character.encode("unicode_escape").decode()
    return character
