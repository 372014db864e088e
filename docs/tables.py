"""The tables of keys in run-directory.md, made from the types of the documents.

    python docs/tables.py            # prints the page with its tables as they should be
    python docs/tables.py --write    # writes it

Between `<!-- keys: quality.Evaluation -->` and `<!-- end -->` stands a table of the type's keys, and one of each type
that it contains. What a key means is the text below its field. Types with markers of their own, such as
`quality.Metrics`, are referred to where others contain them.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from saerelay.document import Document, Record
from saerelay.spec import Spec

PAGE = Path(__file__).parent / "run-directory.md"
MARKERS = re.compile(r"(<!-- keys: ([\w.]+) -->\n).*?(<!-- end -->)", re.S)
WORDS: dict[Any, tuple[str, str]] = {
    bool: ("boolean", "booleans"),
    int: ("integer", "integers"),
    float: ("number", "numbers"),
    str: ("string", "strings"),
    Any: ("any value", "any values"),
    NoneType: ("null", "nulls"),
}
"""JSON's words for types, singular and plural."""


def render(page: str) -> str:
    """The page with its tables made again."""
    named = {name: load_type(name) for _, name, _ in MARKERS.findall(page)}
    described = set(named.values())

    def block(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        return f"{opening}\n{tables_of(named[name], described)}\n\n{closing}"

    return MARKERS.sub(block, page)


def load_type(name: str) -> type[Record]:
    """A type by its module in saerelay.runs.documents and its name."""
    module, _, type_name = name.rpartition(".")
    return getattr(import_module(f"saerelay.runs.documents.{module}"), type_name)


def tables_of(record: type[Record], described: set[type[Record]]) -> str:
    """The table of a type, then one for each type that it contains and that is not described elsewhere."""
    parts = [table(record, described)]
    told: set[type[Record]] = set()
    for key, inner in contained(record, described):
        if inner in told:
            continue
        told.add(inner)
        first_line = inspect.getdoc(inner).splitlines()[0]
        parts.append(f"`{key}`: {first_line}")
        parts.append(table(inner, described))
    return "\n\n".join(parts)


def contained(record: type[Record], described: set[type[Record]], path: str = "") -> Iterator[tuple[str, type[Record]]]:
    """The types that a type's keys hold, with the path to the key, each followed by those that it holds itself."""
    for name, annotation, _ in own_keys(record, described):
        for inner in records_in(annotation):
            if inner not in described:
                yield f"{path}{name}", inner
                yield from contained(inner, described, f"{path}{name}.")


def table(record: type[Record], described: set[type[Record]]) -> str:
    """A table of a type's keys."""
    rows = ["| key | type | meaning |", "|---|---|---|"]
    if issubclass(record, Document):
        rows.append(f"| `schema` | integer | Number of the file's format: {record.SCHEMA}. |")
    for name, annotation, meaning in own_keys(record, described):
        rows.append(f"| `{name}` | {type_words(annotation)} | {meaning} |")
    for base in record.__mro__[1:]:
        if base in described:
            rows.append(f"| … | | The keys of {base.__name__}, [above](#{base.__name__.lower()}). |")
    return "\n".join(rows)


def own_keys(record: type[Record], described: set[type[Record]]) -> list[tuple[str, Any, str]]:
    """Name, type and meaning of a type's keys, without those of bases that are described elsewhere."""
    elsewhere: set[str] = set()
    for base in record.__mro__[1:]:
        if base in described:
            elsewhere |= set(base.model_fields)
    meanings = meanings_of(record)
    keys = []
    for name in record.model_fields:
        if name not in elsewhere:
            keys.append((name, annotation_of(record, name), meanings[name]))
    return keys


def meanings_of(record: type[Record]) -> dict[str, str]:
    """The text below each field, on one line, those of base classes included."""
    meanings: dict[str, str] = {}
    for base in reversed(record.__mro__):
        if not issubclass(base, Record):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name = ast.unparse(field.target)
                meanings[name] = " ".join(ast.literal_eval(text.value).split()).replace("|", "\\|")
    return meanings


def annotation_of(record: type[Record], name: str) -> Any:
    """The type of a field as it is written in its class."""
    for base in record.__mro__:
        if name in inspect.get_annotations(base):
            return inspect.get_annotations(base)[name]
    raise KeyError(name)


def type_words(annotation: Any) -> str:
    """A type in JSON's words.

    >>> type_words(list[int] | None), type_words(dict[str, list[float]])
    ('list of integers or null', 'object of lists of numbers')
    """
    return phrase(annotation)[0]


def phrase(annotation: Any) -> tuple[str, str]:
    """A type in JSON's words, singular and plural."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return phrase(arguments[0])
    if origin is Literal:
        words = joined([f"`{value}`" for value in arguments])
        return words, words
    if origin in (UnionType, Union):
        options = [phrase(option) for option in arguments]
        return joined([singular for singular, _ in options]), joined([plural for _, plural in options])
    if origin in (list, tuple):
        plural = phrase(arguments[0])[1]
        return f"list of {plural}", f"lists of {plural}"
    if origin is dict:
        plural = phrase(arguments[1])[1]
        return f"object of {plural}", f"objects of {plural}"
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return "object", "objects"
    return WORDS[annotation]


def joined(words: list[str]) -> str:
    """Words with commas, and "or" before the last.

    >>> joined(["a", "b", "c"]), joined(["a"])
    ('a, b or c', 'a')
    """
    *firsts, last = words
    return f"{', '.join(firsts)} or {last}" if firsts else last


def records_in(annotation: Any) -> list[type[Record]]:
    """The record types in a type."""
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return [annotation]
    found = []
    for argument in get_args(annotation):
        found += records_in(argument)
    return found


def main() -> None:
    """Print or write the page."""
    page = render(PAGE.read_text(encoding="utf-8"))
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
