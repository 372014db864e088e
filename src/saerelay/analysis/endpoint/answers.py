"""The answers received so far: a JSONL file with a lock, each answer under the digest of its request."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import filelock

from saerelay.errors import RunDirectoryError
from saerelay.files import parse_json


class Answer(NamedTuple):
    """The outcome of a question."""

    value: Any
    """The answer as it was read; None if the question was given up."""
    tokens_in: int
    """Tokens over all times the question was sent, as counted by the endpoint, or estimated."""
    tokens_out: int


@dataclass(frozen=True)
class KeptAnswer:
    """An answer as it is kept on file."""

    text: str
    tokens_in: int
    tokens_out: int

    def after(self, earlier: "KeptAnswer") -> "KeptAnswer":
        """Return the answer with the tokens of an earlier one, which was paid for as well."""
        return KeptAnswer(self.text, earlier.tokens_in + self.tokens_in, earlier.tokens_out + self.tokens_out)

    def read(self, reader: Callable[[str], Any]) -> Answer:
        """Return the answer, read by a function that raises ValueError if it cannot read the text."""
        try:
            value = reader(self.text)
        except ValueError:
            value = None
        return Answer(value, self.tokens_in, self.tokens_out)


class AnswerFile:
    """A file of answers, to which one process at a time adds; it is open and locked in a `with` block.

    A line is `{"request": digest, "answer": text, "tokens_in": n, "tokens_out": n}`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, KeptAnswer] = {}

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.path.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RunDirectoryError(
                f"{self.path}: another process is asking questions about this run; wait for it, or stop it"
            ) from None
        self.answers = read_answers(self.path)
        self._file = self.path.open("ab")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._lock.release()

    def add(self, digest: str, answer: KeptAnswer) -> None:
        """Keep an answer; RunDirectoryError if the file cannot be written, in which case it is kept in memory."""
        self.answers[digest] = answer
        line = {
            "request": digest,
            "answer": answer.text,
            "tokens_in": answer.tokens_in,
            "tokens_out": answer.tokens_out,
        }
        try:
            self._file.write((json.dumps(line) + "\n").encode("ascii"))
            self._file.flush()
        except OSError as error:
            raise RunDirectoryError(f"{self.path}: cannot be written ({error.strerror})") from None


def read_answers(path: Path) -> dict[str, KeptAnswer]:
    """Read the answers in a file, by digest; an unfinished last line is cut off, damaged lines are left out."""
    answers: dict[str, KeptAnswer] = {}
    if not path.is_file():
        return answers

    content = path.read_bytes()
    length = content.rfind(b"\n") + 1
    if length < len(content):
        os.truncate(path, length)
    for line in content[:length].splitlines():
        try:
            data = parse_json(line.decode("utf-8"))
            answer = KeptAnswer(str(data["answer"]), int(data["tokens_in"]), int(data["tokens_out"]))
            answers[data["request"]] = answer
        except (ValueError, LookupError, TypeError):
            continue
    return answers
