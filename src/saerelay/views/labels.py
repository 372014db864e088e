"""The labels of metrics, methods, statuses, origins and roles, all in one place.

Tables, figures, the report and the model card use them; the report's data files pass them to its scripts (`for_js`).
"""

from collections.abc import Sequence
from typing import Any

from saerelay.runs.documents.latents import STATUSES
from saerelay.runs.documents.quality import LegSummary, Summary
from saerelay.runs.documents.seeds import found_again, spread
from saerelay.spec import few_of, format_count
from saerelay.views.text import listed, percent, with_error

_FVU = "E‖x − x̂‖² / E‖x − E x‖²".replace(" ", "\u00a0")  # not broken between lines

METRICS = {
    "fvu": ("FVU", f"FVU: {_FVU}, lower is better"),
    "balanced_fvu": ("balanced FVU", "Balanced FVU: the mean over dimensions of each dimension's FVU, lower is better"),
    "explained_variance": ("explained variance", "Explained variance: 1 − FVU, higher is better"),
    "l0": ("L0", "L0: mean number of active latents per token"),
    "ce_loss_score": (
        "CE score",
        "CE score: (CE zero-ablated − CE with SAE) / (CE zero-ablated − CE clean), 1 is best; it saturates near 1",
    ),
    "delta_ce": (
        "ΔCE (nats per token)",
        "ΔCE: cross-entropy with the SAE in place minus clean cross-entropy, lower is better",
    ),
    "kl_div_with_sae": ("KL (nats per token)", "KL: KL(clean ‖ with SAE) over the vocabulary, lower is better"),
    "kl_div_score": ("KL score", "KL score: (KL zero-ablated − KL with SAE) / KL zero-ablated, higher is better"),
}
"""For each metric, its name for an axis or a column, and its definition."""

METHODS = {
    "identity": "plain copy",
    "rescale": "rescaling",
    "procrustes": "rotation (Procrustes)",
    "affine": "affine map",
    "affine+refit": "affine map with decoder refit",
}
"""How a dictionary is transferred to another layer."""

ORIGINS = {
    "scratch": "from scratch",
    "random": "random dictionary",
    "from below": "from a lower layer",
    "from above": "from a higher layer",
    "same layer": "from the same layer",
    "forward": "from a lower layer",
    "backward": "from a higher layer",
}
"""Where a leg's latents come from; "forward" and "backward" are the paper's words, which judging uses."""

ROLES = {
    "root": "from scratch (root)",
    "transfer": "transferred",
    "equal_tokens": "control: from scratch, equal tokens",
    "full": "control: from scratch, full budget",
    "random": "control: random dictionary, refitted",
}
"""The role of a leg; for controls, their kind."""

SCRATCH_KINDS = {"root": "a root's tokens", "equal_tokens": "equal tokens", "full": "the full budget"}
"""The budget of a leg from scratch with which a transferred leg is compared."""

SPREAD_METRICS = {"l0": 1, "delta_ce": 4, "balanced_fvu": 4, "fvu": 4, "ce_loss_score": 4}
"""Metrics whose spread over seeds is shown, with their number of digits."""


def seeds_label(legs: Sequence[LegSummary]) -> str:
    """Return the label of a row with the means over some legs' seeds."""
    shared = found_again(legs)
    label = f"mean ± SD of {len(legs)} seeds"
    return label if shared is None else f"{label}, {shared:.0%} of latents found again"


def spread_cells(legs: Sequence[LegSummary]) -> list[str]:
    """Return the means of legs over seeds, with standard deviations: SPREAD_METRICS, and the share of live latents."""
    cells = []
    for metric, digits in SPREAD_METRICS.items():
        cells.append(with_error(*spread(legs, metric), digits))
    cells.append(percent(spread(legs, "frac_alive").mean))
    return cells


ARCHITECTURES = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "gated": "Gated", "relu": "ReLU"}

LINK_KINDS = {"hop": "from parent to child", "depth": "from layer to layer", "control": "from the suite to controls"}
"""Kinds of links of a lineage."""


CURVES = {
    "fvu": ("FVU", f"FVU in normalised units, on the training tokens of each block: {_FVU}, lower is better"),
    "loss": ("loss", "Training loss in normalised units, including auxiliary terms"),
    "l0": ("L0", "L0: mean number of active latents per token"),
    "n_dead": ("dead latents", "Dead latents: latents that have not fired for more than dead_after_tokens tokens"),
    "learning_rate": ("learning rate", "The optimiser's learning rate"),
}
"""For each column of the training log, its name for an axis, and its definition."""


LARGE_DIMENSION = 0.25
"""Share of the variance above which readers are told that one dimension decides FVU."""
L0_TOLERANCE = 0.1
"""Share of the L0 asked for by which L0 may differ before readers are told."""


def metric_name(metric: str) -> str:
    """Return the short name of a metric, without its unit.

    >>> metric_name("delta_ce")
    'ΔCE'
    """
    return METRICS[metric][0].split(" (")[0]


def leading_metric(summary: Summary) -> str:
    """Return the metric to compare a run's SAEs by: ΔCE, or, if not measured, balanced FVU, which ranks them alike."""
    measured = all(leg.delta_ce is not None for leg in summary.final_legs)
    return "delta_ce" if measured else "balanced_fvu"


def misleading_fvu(summary: Summary) -> str:
    """Return a sentence on the layers where one dimension dominates FVU; "" if there are none."""
    places = []
    for kind in summary.kinds:
        layers = []
        for leg in summary.of_kind(kind).suite:
            if leg.largest_dimension is not None and leg.largest_dimension > LARGE_DIMENSION:
                layers.append(f"{leg.layer} ({100 * leg.largest_dimension:.0f} %)")
        if layers:
            of_kind = f" of {kind}" if len(summary.kinds) > 1 else ""
            places.append(f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(layers)}{of_kind}")
    if not places:
        return ""
    return (
        f"FVU says little where one dimension holds much of the variance, as at {'; '.join(places)}. Compare "
        "the SAEs of such a layer by ΔCE, or by balanced FVU, which gives all dimensions equal weight."
    )


def uncounted(outside_parents: Sequence[str]) -> str:
    """Return a sentence on what a cost leaves out: the training of SAEs from elsewhere; "" if there are none."""
    if not outside_parents:
        return ""
    return f"What it took to train {few_of(outside_parents)}, from outside this run, is not counted."


def unequal_l0(summary: Summary) -> str:
    """Return a sentence on the SAEs whose L0 is not what was asked for, by more than a tenth; "" if there are none."""
    found = []
    for leg in summary.legs:
        if leg.l0 is not None and leg.target_l0 and abs(leg.l0 / leg.target_l0 - 1) > L0_TOLERANCE:
            found.append(f"{leg.id} ({leg.l0:.1f} for {leg.target_l0:g})")
    if not found:
        return ""
    return (
        f"On this text L0 differs by more than {100 * L0_TOLERANCE:.0f} % from what was asked for: {', '.join(found)}. "
        "More active latents mean a lower FVU and ΔCE, so do not compare these SAEs with others as if at equal L0."
    )


def few_documents(summary: Summary) -> str:
    """Return a sentence on errors that are too small, since sequences of a document are alike; "" if they are not."""
    if not 0 < summary.n_documents < summary.n_sequences / 2:
        return ""
    return (
        f"The {summary.n_sequences:,} held-out sequences are from {summary.n_documents:,} documents only. Sequences of "
        "one document are alike, so the errors are larger than the table says; give more documents."
    )


def made(summary: Summary, leg: LegSummary) -> str:
    """Say how a leg was made; add its id if another leg at its layer was made in the same words."""
    alike = [
        other
        for other in summary.first_seeds
        if (other.kind, other.layer, other.made) == (leg.kind, leg.layer, leg.made) and not other.control_kind
    ]
    return f"{leg.made} ({leg.id})" if len(alike) > 1 else leg.made


def place_name(summary: Summary, leg: LegSummary) -> str:
    """Return a leg's place in words: "layer 4", with its kind and its active latents if the run has several."""
    name = f"layer {leg.layer}"
    if len(summary.kinds) > 1:
        name += f", {leg.kind}"
    if summary.is_other_tier(leg):
        # The L0 of a ReLU SAE follows from its penalty.
        name += f", {leg.architecture}" if leg.target_l0 is None else f", {leg.target_l0:g} active latents"
    return name


def mean_l0(summary: Summary) -> str:
    """Return the mean L0 of a run's SAEs, tier by tier: "16", or "8, 16 and 32"."""
    of_tier: dict[tuple[bool, float | None], list[float]] = {}
    for leg in summary.final_legs:
        is_other = summary.is_other_tier(leg)
        if leg.l0 is not None:
            of_tier.setdefault((is_other, leg.target_l0 if is_other else None), []).append(leg.l0)
    return listed([f"{mean:.3g}" for mean in sorted(sum(l0) / len(l0) for l0 in of_tier.values())])


def tokens_of(legs: Sequence[LegSummary]) -> str:
    """Return the tokens that legs were trained on, with those of the legs they continue: "4k", or "2k to 4k"."""
    counts = [leg.tokens_in_all for leg in legs]
    least = format_count(min(counts))
    most = format_count(max(counts))
    return most if least == most else f"{least} to {most}"


def carried(method: str) -> str:
    """Say how dictionaries were transferred to another layer, as part of a sentence.

    >>> carried("identity"), carried("affine")
    ('copied unchanged', 'transferred by affine map')
    """
    if method == "identity":
        return "copied unchanged"
    return f"transferred by {METHODS.get(method, method)}"


def for_js() -> dict[str, Any]:
    """Return the labels in the form that the report's scripts read."""
    return {
        "metrics": METRICS,
        "methods": METHODS,
        "statuses": STATUSES,
        "origins": ORIGINS,
        "roles": ROLES,
        "curves": CURVES,
    }
