"""What is wrong with a recipe or a plan, in words: the errors that pydantic finds, one line per key.

`Spec.parse` raises them as a RecipeError.
"""

import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError

_IN_WORDS = {
    "missing": "is missing",
    "model_type": "must be a table of keys",
    "dict_type": "must be a table of keys",
    "list_type": "must be a list, in [ ]",
    "tuple_type": "must be a list, in [ ]",
    "string_type": "must be text, in quotes",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
}
"""What is wrong, by pydantic's name for it; other messages of pydantic are used, from "Input should be" on."""

_MEMBERS = re.compile(r"(constrained-)?(int|float|str|bool)|.*\[.*")
"""The names that pydantic gives to the members of a union."""


def explain(cls: type[BaseModel], error: ValidationError, source: str) -> str:
    """Say what is wrong with each key, in our words, one line per key.

    Where a key may have one of several types, pydantic reports what each of them lacks: "must be true or false, or a
    number". An error of our own validators says that the type is right, and so replaces these.
    """
    wrong: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for item in error.errors():
        location = _without_parts(cls, item["loc"])
        key = _key_of(location)
        if item["type"] == "extra_forbidden" or location != item["loc"] or _is_name_of_part(cls, item):
            wrong[key] = [f'unknown key "{key}"; {_nearest_key(cls, location)}']
            continue
        message = _message(item)
        if item["type"] == "value_error":
            wrong[key] = [message]
        elif wrong.get(key):
            wrong[key].append(message.removeprefix("must be "))
        else:
            wrong[key] = [message]
        found[key] = _found(item, message)
    lines = []
    for key, messages in wrong.items():
        if any(other.startswith(f"{key}.") for other in wrong):
            continue  # one item of a list is wrong; the other members of the union are no matter
        where = f"{key}: " if key and not messages[0].startswith("unknown key") else ""
        lines.append(f"{source}: {where}{', or '.join(messages)}{found.get(key, '')}")
    return "\n".join(lines)


def _message(item: Any) -> str:
    """What is wrong according to one of pydantic's errors, or one of our own validators."""
    message = _IN_WORDS.get(item["type"]) or item["msg"].removeprefix("Value error, ")
    return re.sub("^(Input|String) should ", "must ", message)


def _found(item: Any, message: str) -> str:
    """The value that was given, in brackets; "" if there was none, or if the message shows it."""
    given = item["input"]
    is_shown = item["type"] == "value_error" and (isinstance(given, dict) or str(given) in message)
    if is_shown or item["type"] == "missing":
        return ""
    return f" (found {'a table' if isinstance(given, dict) else _shortened(repr(given))})"


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _key_of(location: tuple[int | str, ...]) -> str:
    """The dotted key of an error's location, without the names that pydantic gives to members of a union."""
    return ".".join(str(part) for part in location if not _MEMBERS.fullmatch(str(part)))


def _without_parts(cls: type[BaseModel], location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """An error's location, cut after the name of an inline part."""
    for n in range(1, len(location)):
        if _ends_with_part(cls, location[:n]):
            return location[:n]
    return location


def _nearest_key(cls: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Suggest the most similar valid key, or else list all valid keys."""
    valid_keys = _valid_keys(cls, location)
    similar = difflib.get_close_matches(str(location[-1]), valid_keys, n=1, cutoff=0.5)
    if similar:
        return f'did you mean "{similar[0]}"?'
    return f"valid keys: {', '.join(valid_keys)}"


def _is_name_of_part(cls: type[BaseModel], item: Any) -> bool:
    """Whether an error is about the name of an inline part."""
    location = item["loc"]
    return bool(location) and not isinstance(item["input"], dict) and _ends_with_part(cls, location)


def _ends_with_part(cls: type[BaseModel], location: tuple[int | str, ...]) -> bool:
    """Whether a location ends with the name of an inline part, which is a field in code but no key of a file."""
    is_field = location[-1] in _section(cls, location).model_fields
    return is_field and location[-1] not in _valid_keys(cls, location)


def _valid_keys(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the section that the last part of `location` belongs to."""
    section = _section(cls, location)
    all_keys = getattr(section, "all_keys", None)  # a Spec, whose inline parts have their keys in its own section
    return all_keys() if all_keys else list(section.model_fields)


def _section(cls: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section that the last part of `location` belongs to."""
    for part in location[:-1]:
        if isinstance(part, int) or part not in cls.model_fields:  # an item of a list, or a member of a union
            continue
        annotation = cls.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]  # `Section`, or `list[Section]`
        sections = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if sections:
            cls = sections[0]
    return cls
