"""Text files as documents.

A document is a *span* (file number, start, stop) of bytes: a whole file, a line of a .jsonl file,
or, if there are few files, a piece of a large file. Files are never held in memory.
"""

import codecs
import itertools
import re
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from saerelay.errors import DataError
from saerelay.files import encodable, parse_json

_TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")

_MIN_FILES = 40
"""With fewer files than this, large files are cut, so that no single document makes up most of a split."""

_N_PIECES = 1000
"""Approximate number of pieces that all files together are cut into."""

_MIN_PIECE_BYTES = 2000
"""Least size of a piece, however few pieces there are."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, UTF-32 before UTF-16, since a mark of UTF-16 is the beginning of one of UTF-32."""

_CUTS = (re.compile(rb"\n[ \t\r]*\n"), re.compile(rb"\n"), re.compile(rb" "))
"""Where a piece may end, in order of preference: after a blank line, a line, a word."""


def spans_of(paths: list[Path]) -> np.ndarray:
    """The spans of all documents in some files, in order: [N, 3]."""
    n_bytes = sum(path.stat().st_size for path in paths)
    piece_bytes = n_bytes
    if len(paths) < _MIN_FILES:
        piece_bytes = max(_MIN_PIECE_BYTES, n_bytes // _N_PIECES)
    return np.concatenate([_file_spans(path, i, piece_bytes) for i, path in enumerate(paths)])


def check_text(names: list[str]) -> None:
    """Raise DataError unless each name is a file, or a directory with text files in it; reads none of them."""
    for name in names:
        path = Path(name).expanduser()
        if not path.exists():
            raise DataError(f'data.text: no such file or directory: "{name}" (relative paths start in {Path.cwd()}).')
        if not path.is_file() and not any(map(_is_text, path.rglob("*"))):
            raise DataError(
                f'data.text: "{name}" holds no {", ".join(_TEXT_SUFFIXES)} files; name files of other kinds one by one.'
            )


def _is_text(path: Path) -> bool:
    return path.suffix in _TEXT_SUFFIXES and path.is_file()


def text_files(names: list[str]) -> list[Path]:
    """The files named, and the text files in directories named, without repetitions."""
    check_text(names)
    files: dict[Path, Path] = {}
    for name in names:
        path = Path(name).expanduser()
        found = [path] if path.is_file() else sorted(filter(_is_text, path.rglob("*")))
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _file_spans(path: Path, number: int, piece_bytes: int) -> np.ndarray:
    """The spans of a file's documents, [N, 3]: its number, starts and stops."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            encoding = _encoding(file.read(4))
            file.seek(0)
            if encoding != "utf-8" and (path.suffix == ".jsonl" or size > piece_bytes):
                raise DataError(
                    f"{path}: is {encoding} text, which cannot be cut into documents. Convert it, for example with "
                    f"`iconv -f {encoding} -t utf-8`."
                )
            if path.suffix == ".jsonl":
                stops = np.fromiter(itertools.accumulate(len(line) for line in file), np.int64)
            elif size > piece_bytes:
                with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                    stops = np.array([*_cuts(content, piece_bytes), size], np.int64)
            else:
                stops = np.array([size], np.int64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from None
    starts = np.concatenate([[0], stops])[: len(stops)]
    numbers = np.full(len(stops), number)
    return np.stack([numbers, starts, stops], axis=1).astype(np.int64)


def _cuts(content: mmap, size: int) -> Iterator[int]:
    """Yield the positions that cut a text into pieces of about `size` bytes, at most twice that."""
    start = 0
    while len(content) - start > size:
        start = _cut_after(content, start + size, start + 2 * size)
        while start < len(content) and content[start] & 0xC0 == 0x80:  # inside a UTF-8 character
            start += 1
        if start < len(content):
            yield start


def _cut_after(content: mmap, first: int, last: int) -> int:
    """The end of the best cut between two positions; the first position if there is no cut."""
    for cut in _CUTS:
        match = cut.search(content, first, last)
        if match:
            return match.end()
    return first


def read_span(path: Path, start: int, stop: int, column: str) -> str:
    """The text of a document."""
    with path.open("rb") as file:
        encoding = _encoding(file.read(4))
        file.seek(start)
        content = file.read(stop - start)
    if path.suffix == ".jsonl":
        return _json_text(path, start, content, column)
    return _decoded(path, start, content, encoding).replace("\r\n", "\n")


def _encoding(beginning: bytes) -> str:
    """The encoding of a file by its byte order mark; UTF-8 if there is none."""
    for mark, encoding in _MARKS:
        if beginning.startswith(mark):
            return encoding
    return "utf-8"


def _decoded(path: Path, start: int, content: bytes, encoding: str = "utf-8") -> str:
    """Decode bytes that begin at `start` of a file; DataError if they are not text."""
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise DataError(
                f"{path}: ends in the middle of a character (byte {start + error.start}), so it is incomplete. Get the "
                "file again, or cut it off before that byte."
            ) from None
        raise DataError(
            f"{path}: not {encoding} text: byte {content[error.start] if error.start < len(content) else 0:#04x} at "
            f"{start + error.start}. Convert it, for example with `iconv -f latin1 -t utf-8`."
        ) from None
    if "\0" in text:
        raise DataError(
            f"{path}: contains zero bytes, so it is either not text or UTF-16 without a byte order mark. Convert it, "
            "for example with `iconv -f utf-16le -t utf-8`, or leave it out."
        )
    return text.removeprefix("\ufeff")


def _json_text(path: Path, start: int, line: bytes, column: str) -> str:
    """The text in a line of a .jsonl file, "" if there is none; DataError if it is not text.

    Half a surrogate pair, which JSON can spell but no encoding can hold, becomes a question mark.
    """
    if not line.strip():
        return ""
    try:
        row = parse_json(_decoded(path, start, line))
    except ValueError as error:
        raise _bad_line(path, start, f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise _bad_line(path, start, f"expected a JSON object, found a {type(row).__name__}")
    if column not in row or not isinstance(row[column], str | None):
        keys = ", ".join(row)
        raise _bad_line(path, start, f'no text under "{column}"; found {keys}. Set data.column to the right key')
    return encodable(row[column] or "")


def _bad_line(path: Path, start: int, problem: str) -> DataError:
    """An error that gives the number of the line beginning at a byte of a file."""
    with path.open("rb") as file:
        number = file.read(start).count(b"\n") + 1
    return DataError(
        f"{path}, line {number}: {problem}. Each line of a .jsonl file must be one JSON object with the text in it."
    )
