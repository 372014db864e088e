"""Explanations of latents by a language model: the estimate before, and the scores after."""

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saerelay.runs.documents.interpretation import AskedModel, Estimate, InterpretationSummary, MeanScore
from saerelay.views.labels import ORIGINS
from saerelay.views.text import visible, with_error


def estimate_text(expected: Estimate, asked: AskedModel, prices: tuple[float, float]) -> Text:
    """Show the estimated cost of an interpretation, before it is started."""
    on_file = f" ({expected.n_known:,} are answered already)" if expected.n_known else ""
    most = "no bound on" if expected.tokens_out < 0 else f"at most {expected.tokens_out:,}"
    lines = [
        f"{expected.n_latents:,} latents, {expected.n_requests:,} requests: {asked.model} at {asked.endpoint}{on_file}",
        f"about {expected.tokens_in:,} tokens in (one for every three bytes), {most} tokens out, not counting retries",
    ]
    if any(prices):
        cost = "no bound on the cost" if expected.cost is None else f"at most ${expected.cost:.2f}"
        price_in, price_out = prices
        lines.append(f"{cost}, at ${price_in:g} in and ${price_out:g} out per million tokens")
    return Text("\n".join(visible(line, 500) for line in lines))


def prompts_text(prompts: dict[str, list[dict[str, str]]]) -> Text:
    """Show one question of each kind, with control characters escaped."""
    lines = []
    for kind, messages in prompts.items():
        for message in messages:
            lines.append(f"\n--- {kind}: {message['role']}")
            lines += [visible(line, 100_000) for line in message["content"].split("\n")]
    return Text("\n".join(lines))


def interpretation_tables(document: InterpretationSummary) -> list[Table | Text]:
    """Show scores of explanations by leg, and by origin: means over latents, ± standard error."""
    by_leg = Table(box=None, pad_edge=False, title="explanations: balanced accuracy", title_justify="left")
    for name in ("layer", "leg", "origin", "explained", "failed", "too rare", "detection", "fuzzing", "cost"):
        by_leg.add_column(name, justify="left" if name in ("leg", "origin") else "right")
    for leg in document.legs:
        origin = ORIGINS[leg.origin] + (f" ({escape(leg.parent)})" if leg.parent else "")
        counts = [str(leg.n_explained), str(leg.n_failed), str(leg.n_rare)]
        usd = "-" if leg.cost.usd is None else f"${leg.cost.usd:.4f}"
        scores = (_score(leg.detection), _score(leg.fuzzing))
        by_leg.add_row(str(leg.layer), escape(leg.leg), origin, *counts, *scores, usd)

    by_origin = Table(box=None, pad_edge=False, title="by origin", title_justify="left")
    for name in ("origin", "legs", "explained", "detection", "fuzzing"):
        by_origin.add_column(name, justify="left" if name == "origin" else "right")
    for row in document.origins:
        scores = (_score(row.detection), _score(row.fuzzing))
        by_origin.add_row(ORIGINS[row.origin], str(row.n_legs), str(row.n_explained), *scores)

    note = (
        "Means over latents ± standard error; 0.5 is chance. Detection: in which texts does the latent fire? Fuzzing: "
        "does it fire on the marked tokens? Cost: of all answers behind these scores, earlier runs included."
    )
    n_failed = sum(leg.n_failed_questions for leg in document.legs)
    if n_failed:
        note += f" {n_failed} questions have no readable answer."
    return [by_leg, Text(), by_origin, Text(note)]


def _score(score: MeanScore) -> str:
    return with_error(score.mean, score.standard_error, 3)
