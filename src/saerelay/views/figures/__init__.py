"""Figures of a finished run, each drawn from its documents; one column of a paper wide.

    figure = matrix_figure(summary, matrix, "fvu", "affine")
    save(figure, Path("matrix.png"))

Every function takes documents (see docs/run-directory.md) and returns a Figure, whose title says what is seen, and
whose small print says of which SAEs, on which tokens, and what was measured. Nothing is below 7 points in print.
Of a run with several kinds of sites, the first is shown, or the one of `summary.of_kind("mlp_out")`; of several tiers,
the suite's own. `theme` is "light", for paper, or "dark", with no background, for a page that is dark itself.
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
