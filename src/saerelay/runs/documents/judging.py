"""Blind judgements of latents by people: the key of a page, and `judging/scores.json`."""

from typing import ClassVar, Literal

from saerelay.document import Document, Measured, Record

JudgedOrigin = Literal["scratch", "forward", "backward"]


class JudgedItem(Record):
    """One latent on a judging page."""

    item: int
    """Number on the page, from 1."""
    layer: int
    """Layer of its leg."""
    module: str
    """Kind of module its leg reads."""
    module_out: str | None = None
    """Kind of module its leg reconstructs, if that is a transcoder; null for an SAE."""
    origin: JudgedOrigin
    """Where its leg's latents come from: `forward` is from a lower layer, `backward` from a higher one."""
    leg: str
    """Id of the leg."""
    kind: str
    """Role of the leg, or which kind of control it is."""
    latent: int
    """Number of the latent."""


class PageFacts(Record):
    """The identity of a judging page, and how its latents were drawn."""

    page: str
    """Name of the page: 12 hexadecimal digits, a digest of the seed and of its content."""
    model: str
    """Name of the language model."""
    seed: int
    """Seed of the draw."""
    n: int
    """Largest number of latents drawn of each origin at each layer."""
    n_tokens: int
    """Number of kept positions of the test split, from which examples come."""


class JudgingKey(PageFacts, Document):
    """`judging/<page>.json`: which latent each item is. Not for judges."""

    SCHEMA: ClassVar = 1
    MADE_BY: ClassVar = "`saerelay judge RUN`"

    items: list[JudgedItem]
    """The latents, in the order in which they are shown."""


class Share(Record):
    """The share of latents that people find interpretable, with its 95 % interval (Wilson)."""

    share: Measured
    """Share of the judged latents, ties left out."""
    low: Measured
    """Lower end of the interval."""
    high: Measured
    """Upper end of the interval."""


class Tally(Share):
    """How many of some latents are interpretable: a latent is if more judges say yes than no."""

    n_latents: int
    """Number of latents."""
    n_judged: int
    """Number of these that someone answered with yes or no."""
    n_tied: int
    """Number of these with equally many judges for yes and for no."""
    n_interpretable: int
    """Number of these with more judges for yes."""


class OriginTally(Tally):
    """The tally of one origin over all layers."""

    origin: JudgedOrigin
    """Where the latents come from."""


class LayerTally(Tally):
    """The tally of one origin at one layer."""

    layer: int
    """Layer of the leg."""
    module: str
    """Kind of module it reads."""
    module_out: str | None = None
    """Kind of module that it reconstructs, if it is a transcoder; null for an SAE."""
    origin: JudgedOrigin
    """Where the latents come from."""
    leg: str
    """Id of the leg."""
    kind: str
    """Role of the leg, or which kind of control it is."""


class JudgeTally(Share):
    """The answers of one judge."""

    judge: str
    """Name the judge gave."""
    n_yes: int
    """Number of latents found interpretable."""
    n_no: int
    """Number of latents found not interpretable."""
    n_skip: int
    """Number of latents skipped."""
    n_left: int
    """Number of latents not answered."""


class OriginDifference(Record):
    """Share of an origin minus the share from scratch, over the layers that have both."""

    origin: JudgedOrigin
    """Origin of the latents that are compared with those from scratch."""
    layers: list[int]
    """Layers that have both."""
    difference: Measured
    """Difference of the shares."""
    low: Measured
    """Lower end of its 95 % interval (Newcombe 1998, method 10)."""
    high: Measured
    """Upper end of the interval."""


class Agreement(Record):
    """How far two judges agree on the latents that both judged."""

    judges: list[str]
    """Names of the two judges."""
    n_latents: int
    """Number of latents that both judged."""
    raw: Measured
    """Share of equal answers."""
    kappa: Measured
    """Cohen's kappa; null if both always gave the same answer."""


class Scores(PageFacts, Document):
    """`judging/scores.json`: the answers of the judges of one page."""

    SCHEMA: ClassVar = 1
    MADE_BY: ClassVar = "`saerelay score RUN FILE...`"

    judges: list[JudgeTally]
    """Each judge."""
    origins: list[OriginTally]
    """Each origin over all layers."""
    layers: list[LayerTally]
    """Each origin at each layer."""
    differences: list[OriginDifference]
    """Transferred latents compared with those from scratch."""
    agreement: list[Agreement]
    """Agreement of each pair of judges."""
