"""Frozen specs: what a user asked for, validated once, never changed.

Constructing a spec validates it and does nothing else: it touches no file, no clock and no device.
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
        raise ValueError(f'"{value}" is not a valid count; write a number, or one with k, M or B: "250k", "50M"')

    # Decimal, not float: "1.1B" must be exactly 1100000000.
    exact = Decimal(match[1].replace("_", "")) * _SUFFIXES[match[2]]
    if exact != int(exact):
        raise ValueError(f'"{value}" is not a whole number')
    return int(exact)


def format_count(n: int) -> str:
    """Write a count the way people say it, with three significant digits.

    >>> format_count(2_000_000), format_count(262_144), format_count(999_936), format_count(12)
    ('2M', '262k', '1M', '12')
    """
    for suffix in ("B", "M", "k"):
        scaled = n / _SUFFIXES[suffix]
        if scaled >= 999.5:
            return f"{scaled:.4g}{suffix}"  # with three digits, 1000B would become 1e+03B
        if scaled >= 0.9995:
            return f"{scaled:.3g}{suffix}"  # 999,936 rounds to 1M, not to 1000k
    return str(n)


Count = Annotated[int, BeforeValidator(parse_count)]
"""A number of tokens (or of anything), possibly written "50M"."""


class Spec(BaseModel):
    """Base of all specs: frozen; an unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @classmethod
    def parse(cls, data: dict[str, Any], *, source: str = "recipe") -> Self:
        """Validate nested data; RecipeError names the key in `source` and what would be right."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(_explain(cls, error, source)) from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a spec from a TOML file; RecipeError if it is missing, damaged or invalid."""
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
        """Read a spec from a JSON file; RecipeError if it is missing, damaged or invalid."""
        try:
            return cls.parse(json.loads(path.read_text(encoding="utf-8")), source=str(path))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: cannot be read ({error}).") from None

    def to_json(self) -> str:
        """The spec as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def _explain(cls: type[Spec], error: ValidationError, source: str) -> str:
    """One line for each of pydantic's complaints, in our words."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f'{source}: unknown key "{key}"; {_nearest_key(cls, item["loc"])}')
            continue

        message = item["msg"].removeprefix("Value error, ")
        where = f"{key}: " if key else ""
        # A missing key has no value, and the value of a section is too long to be shown.
        shows_value = item["type"] != "missing" and not isinstance(item["input"], dict)
        found = f" (found {item['input']!r})" if shows_value else ""
        lines.append(f"{source}: {where}{message}{found}")
    return "\n".join(lines)


def _nearest_key(cls: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """The most similar valid key as a question, or else all valid keys."""
    valid_keys = _valid_keys(cls, location)
    similar = difflib.get_close_matches(str(location[-1]), valid_keys, n=1, cutoff=0.5)
    if similar:
        return f'did you mean "{similar[0]}"?'
    return f"valid keys: {', '.join(valid_keys)}"


def _valid_keys(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section in which the last part of `location` stands."""
    for part in location[:-1]:
        if isinstance(part, int):  # an item of a list of sections, all of the same class
            continue
        annotation = cls.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]  # `Section`, or `list[Section]`
        sections = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if sections:
            cls = sections[0]
    return list(cls.model_fields)


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of the parts, and on nothing else.

    >>> seed_from(0, "L3") == seed_from(0, "L3"), seed_from(0, "L3") == seed_from(1, "L3")
    (True, False)
    """
    text = "\0".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
