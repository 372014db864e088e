"""Tasks for circuits: prompts with one token that is right after them and one that is wrong.

A task is a list of `Prompt`. It comes from a file of one's own (`read_prompts`) or from a generator (`TASKS`): a
function of `whole`, which keeps those words that are one token, and of a `Random`, that yields prompts as text, a
balanced group at a time, without end. `task_prompts` turns either into prompts of a run's model.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from saerelay.errors import DataError, RecipeError
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.plan import Plan

Example = tuple[str, str, str]
"""A prompt, what is right after it, and what is wrong, as text."""
Whole = Callable[[str, str], list[str]]
"""`whole(before, words)`: which of the words are one token behind a text, together with the blank it may end in."""
FEWEST_WORDS, FEWEST_PROMPTS = 4, 8


@dataclass(frozen=True)
class Prompt:
    """A text with one token that is right after it, and one that is wrong."""

    tokens: tuple[int, ...]
    right: int
    wrong: int


def task_prompts(task: str, plan: Plan, n: int = 500, seed: int = 0) -> list[Prompt]:
    """At least n prompts of a task of `TASKS`, all of one length; or at most n of a JSONL file, in an order drawn.

    The length is the first that n prompts have; groups are kept together, so that prompts stay balanced. Answers are
    single tokens: a group is left out if some answer does not add exactly one token to its prompt. The same seed
    gives the same prompts. Raises RecipeError for an unknown task, and DataError if the tokenizer leaves too few words
    or too few prompts.
    """
    if n < FEWEST_PROMPTS:
        raise RecipeError(f"{n} prompts are asked for; at least {FEWEST_PROMPTS} are needed")
    draw = Random(f"{task} {seed}" if task in TASKS else str(seed))
    if task not in TASKS:
        if not task.endswith(".jsonl"):
            raise RecipeError(f'no task "{task}"; one of {", ".join(TASKS)}, or a file of prompts, FILE.jsonl')
        prompts = read_prompts(Path(task), plan)
        if len(prompts) < FEWEST_PROMPTS:
            raise DataError(f"{task}: {len(prompts)} prompts; at least {FEWEST_PROMPTS} are needed")
        draw.shuffle(prompts)
        return prompts[:n]
    tokenizer, facts = load_tokenizer(plan.recipe.model), plan.facts
    groups, found, seen = TASKS[task](_whole(task, tokenizer, facts.name), draw), defaultdict(list), set[Prompt]()
    for _ in range(5 * n):
        group = [_encode(tokenizer, example, start_of(plan)) for example in next(groups)]
        prompts = [prompt for prompt in group if prompt and prompt not in seen]
        if len(prompts) == len(group) and len({len(prompt.tokens) for prompt in prompts}) == 1:
            seen.update(prompts)
            found[n_tokens := len(prompts[0].tokens)] += prompts
            if len(found[n_tokens]) >= n:
                return found[n_tokens]
    most = max(map(len, found.values()), default=0)
    raise DataError(
        f'task "{task}": {most} different prompts of one length could be made for the tokenizer of {facts.name}, '
        f"{n} are asked for; ask for fewer with --prompts, or give a file of prompts"
    )


def read_prompts(path: Path, plan: Plan) -> list[Prompt]:
    """Prompts from a file with a JSON object a line: {"prompt": ..., "right": ..., "wrong": ...}, text or token ids.

    "correct" may stand for "right". A BOS token is put in front if the run has one there. Raises DataError if a line is
    none, a prompt is empty or too long, or an answer is not one token.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    facts, tokenizer, start, found = plan.facts, None, start_of(plan), []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            names = ("prompt", "correct" if "correct" in row else "right", "wrong")
            parts = {name: row[name] for name in names}
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{where}: expected {{"prompt": ..., "right": ..., "wrong": ...}}') from None
        ids = dict[str, list[int]]()
        for name, part in parts.items():
            if isinstance(part, str):
                tokenizer = tokenizer or load_tokenizer(plan.recipe.model)
                part = tokenizer.encode(part, add_special_tokens=False)
            ids[name] = part if isinstance(part, list) else [part]
            if not all(type(i) is int and 0 <= i < facts.tokens.vocab_size for i in ids[name]):
                raise DataError(
                    f'{where}: "{name}" is neither text nor token ids from 0 to {facts.tokens.vocab_size - 1}'
                )
            if name != "prompt" and len(ids[name]) != 1:
                raise DataError(
                    f'{where}: "{name}" is {parts[name]!r}, which is {len(ids[name])} tokens of {facts.name}; it must '
                    "be one (most tokenizers want a space in front of a word)"
                )
        text, (right, wrong) = start + ids["prompt"], (ids[name][0] for name in names[1:])
        if not ids["prompt"] or len(text) > (facts.tokens.max_context or math.inf):
            raise DataError(
                f"{where}: has {len(text)} tokens; {facts.name} takes 1 to {facts.tokens.max_context or 'any'}"
            )
        found.append(Prompt(tuple(text), right, wrong))
    if not found:
        raise DataError(f"{path}: no prompts in it")
    return found


def start_of(plan: Plan) -> list[int]:
    """What is in front of every prompt: BOS, where training has one there."""
    bos = plan.facts.tokens.bos_token_id
    return [bos] if plan.recipe.data.prepend_bos and bos is not None else []


def _encode(tokenizer: Any, example: Example, start: list[int]) -> Prompt | None:
    """An example's tokens; None if an answer does not add just one token to the prompt."""
    text, *answers = example
    ids = tokenizer.encode(text, add_special_tokens=False)
    longer = [tokenizer.encode(text + answer, add_special_tokens=False) for answer in answers]
    if any(one[:-1] != ids for one in longer):
        return None
    return Prompt((*start, *ids), longer[0][-1], longer[1][-1])


def _whole(task: str, tokenizer: Any, model: str) -> Whole:
    def whole(before: str, words: str) -> list[str]:
        ids = tokenizer.encode(before.rstrip(" "), add_special_tokens=False)
        ends = [(word, tokenizer.encode(before + word, add_special_tokens=False)) for word in words.split()]
        kept = [word for word, end in ends if end[:-1] == ids]
        if len(kept) < FEWEST_WORDS:
            raise DataError(
                f'task "{task}": of {len(ends)} words ({words[:20]}...) the tokenizer of {model} has {len(kept)} as '
                f"one token behind {before!r}; at least {FEWEST_WORDS} are needed. Give a file of prompts instead."
            )
        return kept

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
    names, places, gifts = whole("When ", _NAMES), whole("the ", _PLACES), whole("a ", _GIFTS)
    while True:
        a, b = draw.sample(names, 2)
        place, gift = draw.choice(places), draw.choice(gifts)
        yield [
            (f"When {x} and {y} went to the {place}, {giver} gave a {gift} to", f" {other}", f" {giver}")
            for x, y in ((a, b), (b, a))
            for giver, other in ((x, y), (y, x))
        ]


def greater_than(whole: Whole, draw: Random) -> Iterator[list[Example]]:
    """Greater-than (Hanna et al. 2023): it began in 1732, so it ended in 17.. what? A later year."""
    events, years = whole("The ", _EVENTS), whole("year 17", " ".join(f"{year:02}" for year in range(2, 99)))
    while True:
        century, (earlier, start, later) = draw.randrange(11, 18), sorted(draw.sample(years, 3))
        event = draw.choice(events)
        yield [(f"The {event} lasted from the year {century}{start} to the year {century}", later, earlier)]


def sva(whole: Whole, draw: Random) -> Iterator[list[Example]]:
    """Subject-verb agreement: the verb agrees with the subject, whatever the number of the noun in between."""
    one_token = set(whole("The ", _NOUNS.replace("/", " ")))
    nouns = [tuple(pair.split("/")) for pair in _NOUNS.split()]
    nouns = [pair for pair in nouns if one_token.issuperset(pair)]
    if len(nouns) < FEWEST_WORDS:
        raise DataError(
            f'task "sva": of {len(nouns)} nouns the tokenizer has singular and plural as one token; at least '
            f"{FEWEST_WORDS} are needed. Give a file of prompts instead."
        )
    while True:
        subject, between = draw.sample(nouns, 2)
        verbs = draw.choice(((" is", " are"), (" was", " were"), (" has", " have")))
        yield [
            (f"The {subject[i]} near the {noun}", verbs[i], verbs[1 - i])
            for i in (0, 1) for noun in between
        ]  # fmt: skip


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
        verb, name = draw.choice(("get", "set", "make", "read", "load", "write", "add", "check")), draw.choice(words)
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
