"""Tasks for circuits: prompts, each with a right and a wrong next token.

A task is a list of `Prompt`. It comes from a user's file (`read_prompts`) or from a generator (`TASKS`): a function of
`whole`, which keeps the words that are single tokens, and of a `Random`, that yields prompts as text, one balanced
group at a time, without end. `task_prompts` turns either into prompts of a run's model.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from saerelay.errors import DataError, RecipeError
from saerelay.files import parse_json, read_text
from saerelay.lm.source import pinned
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.plan import Plan

Example = tuple[str, str, str]
"""A prompt, its right continuation, and its wrong continuation, as text."""
Whole = Callable[[str, str], list[str]]
"""`whole(before, words)`: the words that are a single token after a text, including the blank it may end in."""
FEWEST_WORDS = 4
FEWEST_PROMPTS = 8


@dataclass(frozen=True)
class Prompt:
    """A text with a right and a wrong next token."""

    tokens: tuple[int, ...]
    right: int
    wrong: int


def digest(prompts: Sequence[Prompt]) -> str:
    """Return a digest of a list of prompts: 16 hexadecimal digits."""
    rows = [[*prompt.tokens, prompt.right, prompt.wrong] for prompt in prompts]
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


def task_prompts(task: str, plan: Plan, n: int = 500, seed: int = 0) -> list[Prompt]:
    """Return at least n prompts of a task of `TASKS`, all of one length, or at most n of a JSONL file, shuffled.

    The same seed gives the same prompts. Raises RecipeError for an unknown task, and DataError if the tokenizer leaves
    too few words or too few prompts.
    """
    if n < FEWEST_PROMPTS:
        raise RecipeError(f"{n} prompts are too few; at least {FEWEST_PROMPTS} are needed")
    if task in TASKS:
        return _generated(task, plan, n, seed)
    if not task.endswith(".jsonl"):
        raise RecipeError(
            f'unknown task "{task}"; expected one of: {", ".join(TASKS)}; or a file of prompts, FILE.jsonl'
        )
    prompts = read_prompts(Path(task), plan)
    if len(prompts) < FEWEST_PROMPTS:
        raise DataError(f"{task}: holds {len(prompts)} prompts; at least {FEWEST_PROMPTS} are needed")
    Random(str(seed)).shuffle(prompts)
    return prompts[:n]


def _generated(task: str, plan: Plan, n: int, seed: int) -> list[Prompt]:
    """Generate the prompts of a built-in task.

    Their length is the first for which there are n prompts; groups are kept together, so that prompts stay balanced.
    Answers are single tokens: a group is left out if one of its answers does not add exactly one token to its prompt.
    """
    tokenizer = load_tokenizer(pinned(plan.recipe.model, plan.facts))
    start = start_of(plan)
    groups = TASKS[task](_whole(task, tokenizer, plan.facts.name), Random(f"{task} {seed}"))
    by_length: dict[int, list[Prompt]] = defaultdict(list)
    seen: set[Prompt] = set()
    for _ in range(5 * n):
        group = [_encode(tokenizer, example, start) for example in next(groups)]
        prompts = [prompt for prompt in group if prompt and prompt not in seen]
        lengths = {len(prompt.tokens) for prompt in prompts}
        if len(prompts) < len(group) or len(lengths) != 1:
            continue
        seen.update(prompts)
        same_length = by_length[lengths.pop()]
        same_length += prompts
        if len(same_length) >= n:
            return same_length
    most = max((len(prompts) for prompts in by_length.values()), default=0)
    raise DataError(
        f'task "{task}": only {most} different prompts of one length could be made for the tokenizer of '
        f"{plan.facts.name}, but {n} were asked for; ask for fewer with --n-prompts, or give a file of prompts"
    )


def read_prompts(path: Path, plan: Plan) -> list[Prompt]:
    """Read prompts from a file, one JSON object per line: {"prompt": ..., "right": ..., "wrong": ...}, text or ids.

    "correct" may stand for "right". A BOS token is put in front if the run does so. Raises DataError if a line is not
    such an object, a prompt is empty or too long, or an answer is not a single token.
    """
    try:
        lines = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    reader = _PromptReader(plan)
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(reader.read(line, source=f"{path}, line {number}"))
    if not prompts:
        raise DataError(f"{path}: holds no prompts; write one JSON object per line")
    return prompts


class _PromptReader:
    """Reads lines of a file of prompts; the tokenizer is loaded at the first text."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tokenizer: Any = None

    def read(self, line: str, source: str) -> Prompt:
        """Read the prompt of one line."""
        try:
            row = parse_json(line)
            right = row["correct"] if "correct" in row else row["right"]
            parts = {"prompt": row["prompt"], "right": right, "wrong": row["wrong"]}
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{source}: expected {{"prompt": ..., "right": ..., "wrong": ...}}') from None
        prompt = self._ids(parts["prompt"], "prompt", source)
        right = self._answer(parts["right"], "correct" if "correct" in row else "right", source)
        wrong = self._answer(parts["wrong"], "wrong", source)

        if not prompt:
            raise DataError(f"{source}: the prompt is empty; give at least one token")
        facts = self.plan.facts
        tokens = start_of(self.plan) + prompt
        if len(tokens) > (facts.tokens.max_context or math.inf):
            raise DataError(
                f"{source}: has {len(tokens)} tokens; {facts.name} takes at most {facts.tokens.max_context}"
            )
        return Prompt(tuple(tokens), right, wrong)

    def _ids(self, part: Any, name: str, source: str) -> list[int]:
        """Return the token ids of a text, of a list of ids, or of one id."""
        if isinstance(part, str):
            self.tokenizer = self.tokenizer or load_tokenizer(pinned(self.plan.recipe.model, self.plan.facts))
            part = self.tokenizer.encode(part, add_special_tokens=False)
        ids = part if isinstance(part, list) else [part]
        vocab_size = self.plan.facts.tokens.vocab_size
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise DataError(f'{source}: "{name}" is neither text nor token ids from 0 to {vocab_size - 1}')
        return ids

    def _answer(self, part: Any, name: str, source: str) -> int:
        """Return the single token of an answer."""
        ids = self._ids(part, name, source)
        if len(ids) != 1:
            raise DataError(
                f'{source}: "{name}" is {part!r}, which is {len(ids)} tokens of {self.plan.facts.name}; it must be one '
                "(most tokenizers want a space in front of a word)"
            )
        return ids[0]


def start_of(plan: Plan) -> list[int]:
    """Return the tokens in front of every prompt: BOS, if it is in front of training sequences."""
    bos = plan.facts.tokens.bos_token_id
    return [bos] if plan.recipe.data.prepend_bos and bos is not None else []


def _encode(tokenizer: Any, example: Example, start: list[int]) -> Prompt | None:
    """Return an example's tokens; None if an answer does not add exactly one token to the prompt."""
    text, right, wrong = example
    ids = tokenizer.encode(text, add_special_tokens=False)
    answers = []
    for answer in (right, wrong):
        longer = tokenizer.encode(text + answer, add_special_tokens=False)
        if longer[:-1] != ids:
            return None
        answers.append(longer[-1])
    return Prompt((*start, *ids), *answers)


def _whole(task: str, tokenizer: Any, model: str) -> Whole:
    def whole(before: str, words: str) -> list[str]:
        ids = tokenizer.encode(before.rstrip(" "), add_special_tokens=False)
        one_token = []
        for word in words.split():
            longer = tokenizer.encode(before + word, add_special_tokens=False)
            if longer[:-1] == ids:
                one_token.append(word)
        if len(one_token) < FEWEST_WORDS:
            raise DataError(
                f'task "{task}": only {len(one_token)} of {len(words.split())} words ({words[:20]}...) are one token '
                f"after {before!r} for the tokenizer of {model}; at least {FEWEST_WORDS} are needed. Give a file of "
                "prompts instead."
            )
        return one_token

    return whole


# --- English ----------------------------------------------------------------------------------------------------

_NAMES = (
    "Mary John Alice Bob James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark "
    "Paul Steven Andrew George Edward Brian Kevin Jason Jeffrey Ryan Jacob Gary Eric Jonathan Larry Scott Frank Sarah "
    "Karen Lisa Nancy Betty Sandra Ashley Emily Donna Carol Amanda Melissa Laura Amy Anna Emma Rachel Kate Jane Tom"
)
_PLACES = "store garden restaurant school hospital office house station park library market church"
_GIFTS = "ring book letter ball gift key drink bag card flower phone cup"
_EVENTS = "war strike trial siege study project conflict campaign reform dispute voyage drought famine festival"
_NOUNS = (  # singular/plural
    "key/keys dog/dogs boy/boys girl/girls teacher/teachers doctor/doctors student/students author/authors "
    "manager/managers parent/parents senator/senators guard/guards artist/artists driver/drivers friend/friends "
    "lawyer/lawyers picture/pictures report/reports book/books table/tables car/cars house/houses tree/trees"
)


def ioi(whole: Whole, draw: Random) -> Iterator[list[Example]]:
    """Indirect object identification (Wang et al. 2022): who got it, of two people? Both orders, both givers."""
    names = whole("When ", _NAMES)
    places = whole("the ", _PLACES)
    gifts = whole("a ", _GIFTS)
    while True:
        a, b = draw.sample(names, 2)
        place = draw.choice(places)
        gift = draw.choice(gifts)
        group = []
        for x, y in ((a, b), (b, a)):
            scene = f"When {x} and {y} went to the {place},"
            group.append((f"{scene} {x} gave a {gift} to", f" {y}", f" {x}"))
            group.append((f"{scene} {y} gave a {gift} to", f" {x}", f" {y}"))
        yield group


def greater_than(whole: Whole, draw: Random) -> Iterator[list[Example]]:
    """Greater-than (Hanna et al. 2023): it began in 1732, so it ended in 17.. what? A later year.

    In the paper a year's last two digits are one token, and the probabilities of all later and all earlier ones are
    compared; here one later year is compared with one earlier year. Many tokenizers make digits or three digits a
    token. For those the prompt goes on to the decade, 1732 to 173.., and the last digit decides, so that all years of a
    prompt are of one decade.
    """
    events = whole("The ", _EVENTS)
    endings = _year_endings(whole)
    while True:
        began = f"{draw.randrange(11, 18)}"
        if len(endings[0]) == 1:
            began += f"{draw.randrange(10)}"
        earlier, start, later = sorted(draw.sample(endings, 3))
        event = draw.choice(events)
        yield [(f"The {event} lasted from the year {began}{start} to the year {began}", later, earlier)]


def _year_endings(whole: Whole) -> list[str]:
    """What years end in, one token each: two digits, or only the last one."""
    for before, endings in (("year 17", [f"{i:02}" for i in range(2, 99)]), ("year 173", list("0123456789"))):
        with suppress(DataError):
            return whole(before, " ".join(endings))
    raise DataError(
        'task "greater-than": no token of this tokenizer tells a later year from an earlier one. Of a year such as '
        "1732, neither the last two digits nor the last digit alone are one token after what comes before them. Give "
        "a file of prompts instead."
    )


def sva(whole: Whole, draw: Random) -> Iterator[list[Example]]:
    """Subject-verb agreement: the verb agrees with the subject, whatever the number of the noun in between."""
    one_token = set(whole("The ", _NOUNS.replace("/", " ")))
    nouns = [tuple(pair.split("/")) for pair in _NOUNS.split()]
    nouns = [pair for pair in nouns if one_token.issuperset(pair)]
    if len(nouns) < FEWEST_WORDS:
        raise DataError(
            f'task "sva": only {len(nouns)} nouns are one token for the tokenizer in both singular and plural; at '
            f"least {FEWEST_WORDS} are needed. Give a file of prompts instead."
        )
    while True:
        subject, between = draw.sample(nouns, 2)
        verbs = draw.choice(((" is", " are"), (" was", " were"), (" has", " have")))
        group = []
        for i in (0, 1):
            right = verbs[i]
            wrong = verbs[1 - i]
            group += [(f"The {subject[i]} near the {noun}", right, wrong) for noun in between]
        yield group


# --- Python, which the built-in model reads ---------------------------------------------------------------------

_IDENTIFIERS = (
    "name value key data text path file line item args result node index size code obj func type mode list count start "
    "end first last left right state field table group level offset buffer source target parent child token input"
)


def brackets(whole: Whole, draw: Random) -> Iterator[list[Example]]:
    """Closing brackets: a round one is closed by a round one, a square one by a square one."""
    words = whole("(", _IDENTIFIERS)
    while True:
        target, called, first, second = draw.sample(words, 4)
        yield [
            (f"    {target} = {called}({first}, {second}", ")", "]"),
            (f"    {target} = {called}[{first}, {second}", "]", ")"),
        ]


def quotes(whole: Whole, draw: Random) -> Iterator[list[Example]]:
    """Closing quotes: a single one is closed by a single one, a double one by a double one."""
    words = whole("(", _IDENTIFIERS)
    while True:
        target, text = draw.sample(words, 2)
        yield [(f"    {target} = '{text}", "'", '"'), (f'    {target} = "{text}', '"', "'")]


def self_or_cls(whole: Whole, draw: Random) -> Iterator[list[Example]]:
    """The first argument of a method: `self` in a property, `cls` in a class method."""
    words = whole("_", _IDENTIFIERS)
    while True:
        verb = draw.choice(("get", "set", "make", "read", "load", "write", "add", "check"))
        name = draw.choice(words)
        yield [
            (f"    @property\n    def {verb}_{name}(", "self", "cls"),
            (f"    @classmethod\n    def {verb}_{name}(", "cls", "self"),
        ]


TASKS: dict[str, Callable[[Whole, Random], Iterator[list[Example]]]] = {
    "ioi": ioi,
    "greater-than": greater_than,
    "sva": sva,
    "brackets": brackets,
    "quotes": quotes,
    "self": self_or_cls,
}
"""Tasks by name; the first sentence of each says what it is."""
