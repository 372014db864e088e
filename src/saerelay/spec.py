"""Frozen specs: what a user asked for, validated once, never changed.

Constructing a spec validates and does nothing else: no file, no clock, no device.
"""

import difflib
import hashlib
import json
import re
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from saerelay.errors import RecipeError

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def parse_count(value: object) -> object:
    """Read a count that may be written "250k", "50M" or "1.5B".

    >>> parse_count("50M"), parse_count(512)
    (50000000, 512)
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:_\d+)*(?:\.\d+)?)\s*([kMB]?)\s*", value)
    if not match:
        raise ValueError(f'"{value}" is no count; write a number, or one with k, M or B, like "250k" or "50M"')
    exact = Decimal(match[1].replace("_", "")) * _SUFFIXES[match[2]]
    if exact != int(exact):
        raise ValueError(f'"{value}" is not a whole number')
    return int(exact)


def format_count(n: int) -> str:
    """Write a count as people say it.

    >>> format_count(2_000_000), format_count(262_144), format_count(999_936), format_count(12)
    ('2M', '262k', '1M', '12')
    """
    for suffix in ("B", "M", "k"):
        if n >= 0.9995 * _SUFFIXES[suffix]:
            return f"{n / _SUFFIXES[suffix]:.{3 if n < 999.5 * _SUFFIXES[suffix] else 4}g}{suffix}"
    return str(n)


Count = Annotated[int, BeforeValidator(parse_count)]
"""A number of tokens (or of anything), possibly written "50M"."""


class Spec(BaseModel):
    """Base of all specs: frozen, and an unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @classmethod
    def parse(cls, data: dict[str, Any], *, source: str = "recipe") -> Self:
        """Validate a nested dict; errors say where in `source` and what would be right."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(_explain(cls, error, source)) from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a spec from a TOML file."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"{path}: no such file. Write one with `saerelay init > {path}`.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read ({error}).") from None
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path}: not valid TOML: {error}.") from None
        return cls.parse(data, source=str(path))

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read a spec from a JSON file."""
        try:
            return cls.parse(json.loads(path.read_text(encoding="utf-8")), source=str(path))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: cannot be read ({error}).") from None

    def to_json(self) -> str:
        """The spec as indented JSON text."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def _explain(cls: type[Spec], error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            siblings = _keys_beside(cls, item["loc"])
            near = difflib.get_close_matches(str(item["loc"][-1]), siblings, n=1, cutoff=0.5)
            hint = f'did you mean "{near[0]}"?' if near else f"valid keys: {', '.join(siblings)}"
            lines.append(f'{source}: unknown key "{where}"; {hint}')
        else:
            message = item["msg"].removeprefix("Value error, ")
            found = (
                "" if isinstance(item["input"], dict) or item["type"] == "missing" else f" (found {item['input']!r})"
            )
            lines.append(f"{source}: {where + ': ' if where else ''}{message}{found}")
    return "\n".join(lines)


def _keys_beside(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the (nested) spec in which `location`'s last part stands."""
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = cls.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        cls = next((a for a in nested if isinstance(a, type) and issubclass(a, BaseModel)), cls)
    return list(cls.model_fields)


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on nothing else.

    >>> seed_from(0, "L3") == seed_from(0, "L3"), seed_from(0, "L3") == seed_from(1, "L3")
    (True, False)
    """
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
