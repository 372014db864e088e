"""Documents: JSON files that one command writes and another reads, each a frozen type.

The documents of a run are in `runs.documents`; a plan, a survey and the facts of a corpus are documents, too. All are
written by `save` and read by `load`, `load_if_any` or `load_current`.
"""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, ConfigDict, ValidationError

from saerelay.errors import RunDirectoryError, SaeRelayError
from saerelay.files import finite, read_json, reason, write_json
from saerelay.spec import IN_DOCUMENT, Spec

Measured = Annotated[float | None, BeforeValidator(finite)]
"""A measured number; None where it cannot be computed. NaN and infinities, which JSON does not have, become None."""


class Record(Spec):
    """A part of a document: a row, or facts that belong together. The text below a field describes it in the docs."""

    model_config = ConfigDict(allow_inf_nan=False)


class Document(Record):
    """A whole JSON file, in memory and on disk alike.

    Its first key, `schema`, is the number of its format. A file of another schema is never taken for a current one.
    """

    SCHEMA: ClassVar[int]
    """Raised whenever the meaning of a key changes."""
    MADE_BY: ClassVar[str]
    """The command that makes the file, for error messages: "`saerelay eval RUN`"."""
    REMEDY: ClassVar[str] = ""
    """What to do about an unusable file, unless it is to delete the file and make it again."""
    ERROR: ClassVar[type[SaeRelayError]] = RunDirectoryError
    """The error that `load` raises."""
    INDENT: ClassVar[int | None] = 1
    """Number of spaces that the file is indented by; None for large files, which are written on one line."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file; the error says whether it is missing, damaged or of another schema, and what to do."""
        path = Path(path)
        if not path.is_file():
            raise cls.ERROR(f"{path}: no such file; {cls.MADE_BY} makes it")
        data = cls._read(path)
        schema = data.get("schema")
        if schema != cls.SCHEMA:
            raise cls.ERROR(
                f"{path}: schema {schema}, but this version of saerelay reads schema {cls.SCHEMA}; {cls._remedy()}"
            )
        return cls.from_data(data, source=str(path))

    @classmethod
    def load_if_any(cls, path: Path) -> Self | None:
        """Read a file; None if there is none, or if it has another schema. Raises `ERROR` if it is damaged."""
        if not path.is_file():
            return None
        data = cls._read(path)
        if data.get("schema") != cls.SCHEMA:
            return None
        return cls.from_data(data, source=str(path))

    @classmethod
    def load_current(cls, path: Path, question: Spec) -> Self | None:
        """Read a file if it answers `question`; return None if it is missing, outdated or answers another question."""
        document = cls.load_if_any(path)
        if document is None or not document.is_current(question):
            return None
        return document

    def is_current(self, question: Spec) -> bool:
        """Whether this document answers a question: its field `asked`, or else its own fields, hold the same values."""
        answered = getattr(self, "asked", self)
        names = type(question).model_fields
        return all(getattr(answered, name, None) == getattr(question, name) for name in names)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, self.to_data(), indent=self.INDENT)

    def to_data(self) -> dict[str, Any]:
        """The file's content as plain JSON data."""
        return {"schema": self.SCHEMA, **self.model_dump(mode="json")}

    def to_json(self) -> str:
        """The file's content as JSON text."""
        return json.dumps(self.to_data(), indent=1) + "\n"

    @classmethod
    def from_data(cls, data: dict[str, Any], source: str) -> Self:
        """Return the document that JSON data hold; raise `ERROR`, which names `source`, if they do not fit the type."""
        fields = {key: value for key, value in data.items() if key != "schema"}
        try:
            return cls.model_validate(fields, context=IN_DOCUMENT)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise cls.ERROR(f"{source}: damaged ({place}: {first['msg']}); {cls._remedy()}") from None

    @classmethod
    def _read(cls, path: Path) -> dict[str, Any]:
        try:
            data = read_json(path)
        except OSError as error:  # the file itself may be intact, so the message does not advise deleting it
            raise cls.ERROR(reason(error)) from None
        except ValueError as error:
            raise cls.ERROR(f"{path}: damaged ({error}); {cls._remedy()}") from None
        if not isinstance(data, dict):
            raise cls.ERROR(f"{path}: damaged (not a JSON object); {cls._remedy()}")
        return data

    @classmethod
    def _remedy(cls) -> str:
        return cls.REMEDY or f"delete it, and {cls.MADE_BY} makes it again"
