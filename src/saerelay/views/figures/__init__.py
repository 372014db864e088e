"""Figures of a finished run, each drawn from its documents; one column of a paper wide.

    figure = matrix_figure(summary, matrix, "fvu", "affine")
    save(figure, Path("matrix.png"))

Every function takes documents (see docs/run-directory.md) and returns a Figure. Its title says what it shows, and its
small print which SAEs were measured, on which tokens, and how. No text is below 7 points in print. If a run has several
kinds of sites, the first is shown, or that of `summary.of_kind("mlp_out")`; if it has several tiers, the suite's own.
`theme` is "light", for paper, or "dark", without a background, for a dark page.
"""

from saerelay.views.figures.across_layers import matrix_figure, offsets_figure, similarity_figure
from saerelay.views.figures.circuits import circuits_figure
from saerelay.views.figures.lineage import lineage_figure
from saerelay.views.figures.page import WIDTH, Theme, save
from saerelay.views.figures.plan import plan_figure
from saerelay.views.figures.quality import quality_figure
from saerelay.views.figures.training import training_figure
from saerelay.views.figures.transfer import attribution_figure, transfer_score_figure, transferability_figure

__all__ = [
    "WIDTH",
    "Theme",
    "attribution_figure",
    "circuits_figure",
    "lineage_figure",
    "matrix_figure",
    "offsets_figure",
    "plan_figure",
    "quality_figure",
    "save",
    "similarity_figure",
    "training_figure",
    "transfer_score_figure",
    "transferability_figure",
]
