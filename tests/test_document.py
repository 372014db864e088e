"""Documents and files: whole or not at all, never of another schema, and current only for the same question."""

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest

from saerelay.document import Document, Measured, Record
from saerelay.errors import RunDirectoryError
from saerelay.files import replacing, write_text


class Question(Record):
    """What was asked."""

    tokens: int


class Answer(Document):
    """A small document."""

    SCHEMA: ClassVar = 3
    MADE_BY: ClassVar = "`saerelay answer RUN`"

    asked: Question
    fvu: Measured = None


ANSWER = Answer(asked=Question(tokens=5), fvu=0.5)


def test_a_document_comes_back_from_its_file(tmp_path: Path) -> None:
    ANSWER.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"schema": 3, "asked": {"tokens": 5}, "fvu": 0.5}
    assert Answer.load(tmp_path / "a.json") == ANSWER


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_none_in_memory_as_on_disk(tmp_path: Path, value: float) -> None:
    answer = Answer(asked=Question(tokens=5), fvu=value)
    assert answer.fvu is None
    answer.save(tmp_path / "a.json")
    assert '"fvu": null' in (tmp_path / "a.json").read_text() and Answer.load(tmp_path / "a.json") == answer


def test_only_the_answer_to_the_same_question_is_current(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert Answer.load_current(path, Question(tokens=5)) is None, "there is no file"
    ANSWER.save(path)
    assert Answer.load_current(path, Question(tokens=5)) == ANSWER
    assert Answer.load_current(path, Question(tokens=6)) is None


def test_a_file_of_another_schema_is_never_current(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ANSWER.to_data() | {"schema": 2}))
    assert Answer.load_current(path, Question(tokens=5)) is None and Answer.load_if_any(path) is None
    with pytest.raises(RunDirectoryError, match=r"a.json: schema 2, but .* reads schema 3; delete it, and `saerelay a"):
        Answer.load(path)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"schema": 3, "asked": {"tokens": "many"}}', '{"schema": 3}'])
def test_damage_is_named_with_its_remedy(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    for read in (Answer.load, Answer.load_if_any):
        with pytest.raises(RunDirectoryError, match=r"a.json: .*; delete it, and `saerelay answer RUN` makes .*again$"):
            read(path)


def test_a_missing_file_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="a.json: no such file; `saerelay answer RUN` makes it$"):
        Answer.load(str(tmp_path / "a.json"))
    Answer(asked=Question(tokens=5)).save(tmp_path / "a.json")
    assert Answer.load(str(tmp_path / "a.json")).asked.tokens == 5


@pytest.mark.parametrize("several_writers", [False, True])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, several_writers: bool) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path, several_writers=several_writers) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path, several_writers=True) as one, replacing(path, several_writers=True) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one", "the last to finish wins"
