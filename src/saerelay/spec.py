"""Frozen specs: what a user asked for, validated once, never changed.

Constructing a spec validates it and does nothing else: it touches no file, no clock and no device.
"""

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from saerelay.errors import RecipeError
from saerelay.files import is_deep, read_json, read_text
from saerelay.spec_errors import explain

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def _takes_numbers(annotation: Any) -> bool:
    """Whether a type has numbers among its values, alone or in a list, and no truth values."""
    kinds = [annotation]
    for kind in kinds:
        kinds += get_args(kind)
    return (int in kinds or float in kinds) and bool not in kinds


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

    >>> format_count(2_000_000), format_count(262_144), format_count(999_936), format_count(12), format_count(10**13)
    ('2M', '262k', '1M', '12', '10000B')
    """
    for suffix in ("B", "M", "k"):
        scaled = n / _SUFFIXES[suffix]
        if scaled >= 999.5:
            return f"{scaled:.0f}{suffix}"  # as .3g, 1000B would become 1e+03B
        if scaled >= 0.9995:
            return f"{scaled:.3g}{suffix}"  # 999,936 rounds to 1M, not to 1000k
    return str(n)


def rounded_up(n: float, step: int) -> int:
    """The least multiple of `step` that is not below n.

    >>> rounded_up(100, 64), rounded_up(128, 64)
    (128, 128)
    """
    return step * math.ceil(n / step)


def few_of(names: Iterable[str]) -> str:
    """Join the first eight names, for a line that must not become too long.

    >>> few_of("abc"), few_of("abcdefghij")
    ('a, b, c', 'a, b, c, d, e, f, g, h, ...')
    """
    known = list(names)
    more = ", ..." if len(known) > 8 else ""
    return ", ".join(known[:8]) + more


MAX_COUNT = 10**15
"""Far above any sensible count, and far below the point where arithmetic with floats and 64 bits goes wrong."""
MAX_SEED = 2**63 - 1
"""The largest seed: a time in nanoseconds is one."""

Count = Annotated[int, BeforeValidator(parse_count), Field(le=MAX_COUNT)]
"""A number of tokens (or of anything), possibly written "50M"."""

Whole = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""A count; bounded, because a file may be damaged or made to do harm, and a number mistyped."""
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
"""The same, but at least 1."""

Auto = Literal["auto"]
"""The value of a key that leaves a number to the program."""

Value = TypeVar("Value")
OrAuto = Annotated[Value | Auto, BeforeValidator(lambda value: "auto" if value == 0 else value)]
"""A number or "auto"; recipes once wrote 0 for it."""


IN_DOCUMENT = "document"
"""Context of validation in which a list may hold something twice, as recipes once could: it is then left out."""


def _no_twice(values: list[Value], info: ValidationInfo) -> list[Value]:
    """Raise ValueError if a list holds something twice."""
    if info.context == IN_DOCUMENT:
        return list(dict.fromkeys(values))
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} is listed twice in {values}; name it once")
    return values


Distinct = Annotated[list[Value], AfterValidator(_no_twice)]
"""A list in which nothing occurs twice."""


class Described(NamedTuple):
    """A key of a spec as `saerelay init` prints it."""

    key: str
    value: Any
    description: str


class Spec(BaseModel):
    """Base of all specs: frozen, and an unknown key is an error that names the nearest valid one.

    A spec with many keys is made of parts, which are specs themselves. The keys of `inline` parts are written beside
    the others, in TOML as in JSON, so that a file need not know how the code groups them:

    >>> class Size(Spec):
    ...     width: int = 1
    ...     height: int = 1
    >>> class Picture(Spec):
    ...     inline = ("size",)
    ...     title: str
    ...     size: Size = Size()
    >>> picture = Picture.parse({"title": "sunflowers", "width": 73})
    >>> picture.size.width, picture.model_dump()
    (73, {'title': 'sunflowers', 'width': 73, 'height': 1})
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
    inline: ClassVar[tuple[str, ...]] = ()
    """Names of the parts whose keys are written beside the others; such a part may be optional."""

    @classmethod
    def part(cls, name: str, data: dict[str, Any]) -> "type[Spec]":
        """The class of an inline part; `data` holds all keys given, in case the class depends on one of them."""
        candidates = [cls.model_fields[name].annotation, *get_args(cls.model_fields[name].annotation)]
        return next(part for part in candidates if isinstance(part, type) and issubclass(part, Spec))

    @classmethod
    def all_keys(cls) -> list[str]:
        """All keys that may be written, including those of inline parts."""
        found: list[str] = []
        for name in cls.model_fields:
            found += cls.part(name, {}).all_keys() if name in cls.inline else [name]
        return found

    def changed(self, **changes: Any) -> Self:
        """Return a copy with other values for some keys, including keys of inline parts; values are not validated.

        Raises TypeError for a key that the spec does not have.
        """
        own: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            if key in type(self).model_fields:
                own[key] = value
                continue
            part = next((name for name in self.inline if key in type(self).part(name, {}).all_keys()), None)
            if part is None:
                raise TypeError(f"{type(self).__name__} has no key {key}")
            parts.setdefault(part, {})[key] = value
        for part, values in parts.items():
            own[part] = getattr(self, part).changed(**values)
        copy = self.model_copy(update=own)
        values = vars(copy)
        for name in values.keys() - type(self).model_fields.keys():
            del values[name]  # a cached property, of the old values
        return copy

    def described(self) -> Iterator[Described]:
        """Yield each key with its value and its meaning, including the keys of inline parts."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in self.inline and value is not None:
                yield from value.described()
            else:
                yield Described(name, value, field.description or "")

    @model_validator(mode="before")
    @classmethod
    def _gather_parts(cls, data: Any, info: ValidationInfo) -> Any:
        """Put the keys of inline parts together."""
        if not cls.inline or not isinstance(data, dict):
            return data
        rest = dict(data)
        for name in cls.inline:
            if isinstance(rest.get(name), dict):
                raise ValueError(f"{name} is no key; write the keys of this table directly in the section")
            if isinstance(rest.get(name), Spec):  # constructed in code, from a finished part
                continue
            part = cls.part(name, data)
            own = {key: rest.pop(key) for key in part.all_keys() if key in rest}
            # A file that has the name of a part as a key is wrong; `spec_errors.explain` says so.
            if own and name not in rest:
                rest[name] = part.model_validate(own, context=info.context)
        return rest

    @model_validator(mode="before")
    @classmethod
    def _check_numbers(cls, data: Any) -> Any:
        """Refuse true and false as numbers, which they are in Python; pydantic calls this before the one above."""
        if not isinstance(data, dict):
            return data
        for name, field in cls.model_fields.items():
            values = data[name] if isinstance(data.get(name), list | tuple) else [data.get(name)]
            if any(isinstance(value, bool) for value in values) and _takes_numbers(field.annotation):
                raise ValueError(f"{name} takes numbers, not true or false (found {str(data[name]).lower()})")
        return data

    @model_serializer(mode="wrap")
    def _spread_parts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write the keys of inline parts beside the others."""
        data: dict[str, Any] = {}
        for key, value in handler(self).items():
            if key in self.inline:
                data.update(value or {})
            else:
                data[key] = value
        return data

    @classmethod
    def parse(cls, data: dict[str, Any], *, source: str = "recipe") -> Self:
        """Validate nested data; RecipeError names the key in `source` and what would be right."""
        if is_deep(data):
            raise RecipeError(f"{source}: lists or tables are nested too deeply")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(explain(cls, error, source)) from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a spec from a TOML file; RecipeError if it is missing, damaged or invalid."""
        try:
            data = tomllib.loads(read_text(Path(path)))
        except FileNotFoundError:
            raise RecipeError(f"{path}: no such file. Write one with `saerelay init > {path}`.") from None
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path}: not valid TOML: {error}.{_windows_hint(path)}") from None
        except RecursionError:
            raise RecipeError(f"{path}: lists or tables are nested too deeply.") from None
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: cannot be read ({error}).") from None
        _check_strings(data, str(path))
        return cls.parse(data, source=str(path))

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read a spec from a JSON file; RecipeError if it is missing, damaged or invalid."""
        try:
            data = read_json(path)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: cannot be read ({error}).") from None
        return cls.parse(data, source=str(path))

    def to_json(self) -> str:
        """The spec as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


_BACKSLASHES = (
    "In TOML a backslash in double quotes begins a special character; write Windows paths in single quotes "
    "('C:\\Users\\me\\notes') or with forward slashes (\"C:/Users/me/notes\")."
)


def _windows_hint(path: str | Path) -> str:
    """Advice about backslashes, if a TOML file that cannot be read has any in double quotes."""
    text = Path(path).read_text(encoding="utf-8")
    return f" {_BACKSLASHES}" if re.search(r'"[^"\n]*\\[^"\n]*"', text) else ""


def _check_strings(data: Any, source: str, key: str = "") -> None:
    """Raise RecipeError for text with control characters, which TOML makes of paths such as "D:\\texts\\new"."""
    if isinstance(data, dict):
        for name, value in data.items():
            _check_strings(value, source, f"{key}.{name}".removeprefix("."))
    elif isinstance(data, list):
        for value in data:
            _check_strings(value, source, key)
    elif isinstance(data, str) and re.search(r"[\x00-\x1f\x7f]", data):
        raise RecipeError(f"{source}: {key}: {data!r} has control characters in it. {_BACKSLASHES}")


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of the parts, and on nothing else.

    >>> seed_from(0, "L3") == seed_from(0, "L3"), seed_from(0, "L3") == seed_from(1, "L3")
    (True, False)
    """
    text = "\0".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
