"""What became of latents from leg to leg."""

from typing import TYPE_CHECKING

from saerelay.runs.documents.latents import STATUSES, LineageDocument, LineageLink
from saerelay.runs.documents.quality import Summary
from saerelay.views.figures.page import Theme, dress, facts_of, legend, page
from saerelay.views.labels import LINK_KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "light": {"k": "#1b4965", "d": "#5fa8d3", "r": "#bfdbec", "x": "#b4bcc1", "b": "#ca6702"},
    "dark": {"k": "#8ecae6", "d": "#4279a3", "r": "#24445c", "x": "#6b7780", "b": "#f2914a"},
}
"""Colour of each status, by theme; silent latents are not drawn."""


def lineage_figure(
    summary: Summary, lineage: LineageDocument, kind: str = "hop", *, theme: Theme = "light"
) -> "Figure":
    """Draw what became of latents over each link of a kind ("hop", "depth", "control"): shares of each status."""
    summary = summary.of_kind()
    legs = {leg.id for leg in summary.legs}
    links = [link for link in lineage.links if link.kind == kind and link.target in legs]
    links.sort(key=lambda link: (link.target_layer, link.source_layer))
    ways = sorted({"by index" if link.by == "index" else "by optimal assignment" for link in links})
    small = (
        f"Latents alive in at least one of the two SAEs, matched {' and '.join(ways) or 'not at all'}. Kept: cosine of "
        f"decoder rows above {lineage.kept_above}, the source folded through the affine map between the layers; "
        f"replaced: below {lineage.replaced_below}; alive: fired more than {lineage.alive_above} times."
    )
    title = f"Lineage of latents, {LINK_KINDS[kind]}"
    height = 0.6 + 0.17 * max(3, len(links))
    with page(theme, facts_of(summary, lineage.n_tokens), title, small, height) as figure:
        axis = figure.subplots()
        lefts = [0.0] * len(links)
        for letter, colour in _COLOURS[theme].items():
            shares = [_percent(link, letter) for link in links]
            axis.barh(range(len(links)), shares, left=lefts, color=colour, height=0.75, label=STATUSES[letter])
            lefts = [before + share for before, share in zip(lefts, shares, strict=True)]
        names = [link.target if kind == "control" else _layers(link) for link in links]
        axis.set_yticks(range(len(links)), names)
        axis.invert_yaxis()
        dress(axis, theme, xlabel="latents (%)", ylabel="" if kind == "control" else "layers", grid=False)
        axis.set_xlim(0, 100)
        legend(axis, columns=5)
    return figure


def _percent(link: LineageLink, letter: str) -> float:
    """Return the share of live latents with a status, in percent."""
    return 100 * link.status.count(letter) / max(1, link.n_alive)


def _layers(link: LineageLink) -> str:
    return f"{link.source_layer} → {link.target_layer}"
