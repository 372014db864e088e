"""Ask a language model about latents of a run, score its explanations, and write `interpret/<id>.json`."""

import json
import math
from asyncio import gather
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from saerelay.analysis.endpoint.address import Endpoint, estimated_tokens
from saerelay.analysis.endpoint.answers import Answer
from saerelay.analysis.endpoint.asker import Asker
from saerelay.analysis.features import make_features
from saerelay.analysis.interpret.pieces import (
    KINDS,
    LENGTH,
    QUANTILES,
    Kind,
    Piece,
    Subject,
    drawn_latents,
    subjects_of,
)
from saerelay.analysis.interpret.questions import (
    clean_text,
    explain_request,
    read_explanation,
    read_marks,
    score_requests,
)
from saerelay.analysis.lineage import check_latent
from saerelay.analysis.session import Session
from saerelay.errors import Interrupted
from saerelay.planning.leg import Leg
from saerelay.runs.documents.interpretation import (
    AnswerCost,
    AskedModel,
    Estimate,
    Interpretation,
    InterpretationSummary,
    InterpretedLatent,
    MeanScore,
    summarise,
)
from saerelay.runs.features import load_features
from saerelay.runs.suite import PublishedSuite


@dataclass(frozen=True, eq=False)
class Study:
    """Latents to be interpreted, with the pieces for all questions about them."""

    suite: PublishedSuite
    seed: int
    n_tokens: int
    """Number of positions of the test split from which pieces are taken."""
    text: Callable[[int], str]
    """The text of a token."""
    subjects: dict[str, list[Subject]]
    """The latents by leg."""

    @property
    def explicable(self) -> list[Subject]:
        """The subjects that fire often enough to be explained."""
        return [subject for subjects in self.subjects.values() for subject in subjects if subject.explained]


def prepare(
    session: Session, *, legs: Sequence[str] = (), n: int = 64, latents: Sequence[int] = (), seed: int = 0
) -> Study:
    """Read the test split once, and draw the pieces for `latents`, or for n latents of each leg; sends nothing.

    The n latents are drawn from those that fire on at least `pieces.FEWEST` tokens, in one random order of indices for
    all legs, so that legs of one root, whose latents keep their index, are asked about the same latents. Features that
    are not current are computed first. Raises RunDirectoryError if there is no such leg or latent.
    """
    suite = session.suite
    chosen_legs = [suite.leg(name) for name in legs] or suite.legs
    for leg in chosen_legs:
        for latent in latents:
            check_latent(leg.id, latent, leg.dictionary.n_latents)
    make_features(session)
    chosen = {}
    for leg in chosen_legs:
        n_fired = load_features(suite.directory, leg.id).n_fired.numpy()
        chosen[leg.id] = list(dict.fromkeys(latents)) or drawn_latents(n_fired, n, seed)
    return Study(
        suite=suite,
        seed=seed,
        n_tokens=session.held_out().size,
        text=clean_text(session.token_text),
        subjects=subjects_of(session, chosen, seed),
    )


def estimate(study: Study, asker: Asker) -> Estimate:
    """Estimate the requests still to be sent, and their cost; unknown explanations count as 120 characters."""
    new: list[bytes] = []
    n_known = 0
    for subject in study.explicable:
        request = explain_request(study.text, asker.endpoint, subject)
        kept = asker.kept(request)
        explanation = kept.read(read_explanation).value if kept else "x" * 120
        requests: list[tuple[bytes, Callable[[str], Any]]] = [(request, read_explanation)]
        if explanation:
            for kind in KINDS:
                bodies = score_requests(study.text, asker.endpoint, subject, kind, explanation)
                readers = [partial(read_marks, n=len(question)) for question in subject.questions(kind)]
                requests += zip(bodies, readers, strict=True)
        missing = [body for body, read in requests if not asker.is_answered(body, read)]
        n_known += len(requests) - len(missing)
        new += missing

    tokens_in = sum(estimated_tokens(body.decode("ascii")) for body in new)
    tokens_out = sum(longest_answer(body) for body in new)
    price_in, price_out = asker.prices
    cost = tokens_in * price_in / 1e6
    if price_out:
        cost += tokens_out * price_out / 1e6
    return Estimate(
        n_latents=len(study.explicable),
        n_requests=len(new),
        n_known=n_known,
        tokens_in=tokens_in,
        tokens_out=-1 if tokens_out == math.inf else int(tokens_out),
        cost=cost,
    )


def longest_answer(body: bytes) -> float:
    """Return the most tokens that the answer to a request may take; infinity if the request sets no bound.

    >>> longest_answer(b'{"max_tokens": 60}'), longest_answer(b'{"max_tokens": "60"}')
    (60, inf)
    """
    fields = json.loads(body)
    bounds = [fields.get("max_completion_tokens"), fields.get("max_tokens")]
    return next((bound for bound in bounds if type(bound) is int and bound > 0), math.inf)


def example_prompts(study: Study, endpoint: Endpoint) -> dict[str, list[dict[str, str]]]:
    """Return the messages of one question of each kind; none if no latent can be explained."""
    if not study.explicable:
        return {}
    subject = study.explicable[0]
    requests = {"explanation": explain_request(study.text, endpoint, subject)}
    for kind in KINDS:
        questions = score_requests(study.text, endpoint, subject, kind, "(the explanation comes here)")
        requests[kind] = questions[0]
    return {kind: json.loads(request)["messages"] for kind, request in requests.items()}


def interpret(
    study: Study, asker: Asker, *, resume_command: str = "", console: Console | None = None
) -> InterpretationSummary:
    """Explain and score the latents of a study; writes interpret/<leg>.json.

    Questions answered before are not asked again. Raises EndpointError if the endpoint refuses or keeps failing, and
    Interrupted after Ctrl-C, with the command that continues; all answers are kept.
    """
    jobs = []
    for subjects in study.subjects.values():
        jobs += [interpret_latent(study, asker, subject) for subject in subjects]
    n_requests = estimate(study, asker).n_requests
    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[cost]}"))
    silent = console is None or not console.is_terminal
    try:
        with Progress(TextColumn("asking"), *columns, console=console, transient=True, disable=silent) as bar:
            latents = iter(asker.run(jobs, bar, n_requests))
    except KeyboardInterrupt:
        raise Interrupted(resume_command) from None

    documents = []
    for leg_id, subjects in study.subjects.items():
        leg_latents = list(islice(latents, len(subjects)))
        document = leg_document(study, asker, study.suite.leg(leg_id), leg_latents)
        document.save(study.suite.directory.interpretation(leg_id))
        documents.append(document)
    return summarise(documents)


async def interpret_latent(study: Study, asker: Asker, subject: Subject) -> InterpretedLatent:
    """Ask for an explanation of one latent, and score it."""
    answers: list[Answer] = []
    scores: dict[str, Any] = {}
    explanation = None
    if subject.explained:
        answer = await asker.ask(explain_request(study.text, asker.endpoint, subject), read_explanation)
        answers.append(answer)
        explanation = answer.value
    if explanation:
        for kind in KINDS:
            questions = subject.questions(kind)
            requests = score_requests(study.text, asker.endpoint, subject, kind, explanation)
            readers = [partial(read_marks, n=len(question)) for question in questions]
            pairs = zip(requests, readers, strict=True)
            score_answers = await gather(*(asker.ask(request, reader) for request, reader in pairs))
            scores |= score(kind, questions, [answer.value for answer in score_answers])
            answers += score_answers
    return InterpretedLatent(
        latent=subject.latent,
        n_pieces=subject.n_pieces,
        explanation=explanation,
        n_questions=len(answers),
        n_failed=sum(answer.value is None for answer in answers),
        tokens_in=sum(answer.tokens_in for answer in answers),
        tokens_out=sum(answer.tokens_out for answer in answers),
        **scores,
    )


# --- scores ---------------------------------------------------------------------------------------------------------


def balanced_accuracy(hits: int, misses: int, false_alarms: int, rejections: int) -> float | None:
    """Return the mean of the shares of right answers where the truth is yes and where it is no.

    >>> balanced_accuracy(3, 1, 1, 1), balanced_accuracy(4, 0, 0, 0)
    (0.625, None)

    None if there are no questions of either truth. 0.5 is chance, and also the score of always answering yes.
    """
    if not hits + misses or not false_alarms + rejections:
        return None
    return (hits / (hits + misses) + rejections / (false_alarms + rejections)) / 2


def score(kind: Kind, questions: list[list[Piece]], answers: list[list[bool] | None]) -> dict[str, Any]:
    """Return the scores over the questions that were answered, as fields of `ExplanationScores`.

    The score of a quantile uses its own pieces whose truth is yes, together with all pieces whose truth is no.
    """
    answered: list[tuple[Piece, bool]] = []
    for pieces, marks in zip(questions, answers, strict=True):
        if marks is not None:
            answered += zip(pieces, marks, strict=True)
    false_alarms = sum(mark for piece, mark in answered if not piece.truth)
    rejections = sum(not mark for piece, mark in answered if not piece.truth)

    by_quantile = []
    hits = 0
    misses = 0
    for quantile in range(QUANTILES):
        marks = [mark for piece, mark in answered if piece.truth and piece.quantile == quantile]
        quantile_hits = sum(marks)
        quantile_misses = len(marks) - quantile_hits
        by_quantile.append(balanced_accuracy(quantile_hits, quantile_misses, false_alarms, rejections))
        hits += quantile_hits
        misses += quantile_misses
    return {
        kind: balanced_accuracy(hits, misses, false_alarms, rejections),
        f"{kind}_by_quantile": by_quantile,
        f"{kind}_counts": [hits, misses, false_alarms, rejections],
    }


def leg_document(study: Study, asker: Asker, leg: Leg, latents: list[InterpretedLatent]) -> Interpretation:
    """Return the document of a leg."""
    plan = study.suite.plan
    explained = [latent for latent in latents if latent.explanation]
    asked = [latent for latent in latents if latent.n_questions]
    tokens_in = sum(latent.tokens_in for latent in latents)
    tokens_out = sum(latent.tokens_out for latent in latents)
    price_in, price_out = asker.prices
    dollars = (tokens_in * price_in + tokens_out * price_out) / 1e6
    return Interpretation(
        leg=leg.id,
        layer=leg.layer,
        module=leg.module,
        origin=study.suite.origin(leg),
        parent=leg.parent or None,
        model=plan.facts.name,
        asked=AskedModel(model=asker.endpoint.model, endpoint=asker.endpoint.url, body=asker.endpoint.described_body),
        seed=study.seed,
        n_tokens=study.n_tokens,
        piece_tokens=min(LENGTH, plan.recipe.data.context),
        n_latents=len(latents),
        n_explained=len(explained),
        n_rare=len(latents) - len(asked),
        n_failed=len(asked) - len(explained),
        n_failed_questions=sum(latent.n_failed for latent in latents),
        detection=MeanScore.over(latent.detection for latent in explained),
        fuzzing=MeanScore.over(latent.fuzzing for latent in explained),
        cost=AnswerCost(
            n_questions=sum(latent.n_questions for latent in latents),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            usd=dollars if any(asker.prices) else None,
        ),
        latents=latents,
    )
