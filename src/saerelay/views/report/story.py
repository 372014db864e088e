"""The text of the report's first page, made from the run's documents: what was trained, saved and lost, and where."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from saerelay.planning.leg_spec import ControlKind
from saerelay.planning.plan import Plan
from saerelay.runs.documents.across_layers import Measures
from saerelay.runs.documents.quality import LegSummary, Summary
from saerelay.spec import few_of, format_count
from saerelay.views.labels import (
    ARCHITECTURES,
    few_documents,
    leading_metric,
    mean_l0,
    metric_name,
    misleading_fvu,
    tokens_of,
    uncounted,
)
from saerelay.views.report.overview import overviews
from saerelay.views.report.rows import plan_rows, quality_ratio, quality_rows, tiles
from saerelay.views.tables.plan import rate_note
from saerelay.views.text import decimal, duration, is_number, listed


def story(plan: Plan, summary: Summary, measures: Measures | None = None) -> dict[str, Any]:
    """Return everything that the page's template refers to: facts, answers as sentences, and rows of its tables."""
    return {
        "model": summary.model,
        "title": f"Sparse autoencoders for {_layers(plan, summary)} of {summary.model}",
        "caption": caption(summary),
        "trained": trained(plan, summary),
        "tiles": tiles(summary),
        "price": by_kind(summary, lambda part: [price(part)]),
        "saved": saved(summary),
        "lost": by_kind(summary, lost),
        "badly": by_kind(summary, lambda part: transfers_badly(part) + other_signs(part, measures)),
        "surveyed": any(leg.predicted_fvu is not None for leg in summary.legs),
        "leading": metric_name(leading_metric(summary)),
        "misleading": misleading_fvu(summary),
        "few_documents": few_documents(summary),
        "overviews": overviews(summary),
        "rows": quality_rows(summary),
        "plan_rows": plan_rows(plan),
        "rate_note": rate_note(plan),
        "plan_tokens": format_count(plan.n_tokens),
    }


def by_kind(summary: Summary, answer: Callable[[Summary], list[str]]) -> list[str]:
    """Return the answers about each kind of site, from its own suite, named if there are several kinds."""
    sentences = []
    for kind in summary.kinds:
        name = f"{kind}: " if len(summary.kinds) > 1 else ""
        sentences += [f"{name}{sentence}" for sentence in answer(summary.of_kind(kind)) if sentence]
    return sentences


def _layers(plan: Plan, summary: Summary) -> str:
    n = len({leg.layer for leg in summary.final_legs})
    if n == 1:
        return "one layer"
    return f"all {n} layers" if n == plan.facts.n_layers else f"{n} layers"


def _transferred(summary: Summary) -> list[LegSummary]:
    return [leg for leg in summary.final_legs if summary.is_transferred(leg)]


def _name(leg: LegSummary) -> str:
    return ARCHITECTURES.get(leg.architecture, leg.architecture)


def caption(summary: Summary) -> str:
    """Return the caption of every figure: model, data, tokens, dictionaries, L0, seed."""
    legs = summary.final_legs
    kinds = ", ".join(sorted({f"{_name(leg)}, {leg.n_latents} latents" for leg in legs}))
    modules = ", ".join(
        dict.fromkeys(f"{leg.module} → {leg.module_out}" if leg.module_out else leg.module for leg in legs)
    )
    seeds = ", ".join(str(seed) for seed in sorted({leg.seed for leg in legs}))
    return (
        f"{summary.model} ({modules}); {summary.data or 'its data'}, test split, {legs[0].n_eval_tokens:,} tokens; "
        f"{kinds}, mean L0 {mean_l0(summary)}; seed {seeds}."
    )


# --- what was trained -----------------------------------------------------------------------------------------------


def trained(plan: Plan, summary: Summary) -> str:
    """Say which dictionaries were trained, how, and on what."""
    legs = summary.final_legs
    facts = plan.facts
    of_kinds = f", at each of {listed(summary.kinds)}," if len(summary.kinds) > 1 else ""
    names = " or ".join(sorted({_name(leg) for leg in legs}))
    sizes = " or ".join(f"{size:,}" for size in sorted({leg.n_latents for leg in legs}))
    parts = [
        f"Sparse autoencoders ({names}, {sizes} latents) for {_layers(plan, summary)}{of_kinds} of "
        f"{summary.model} ({facts.family}, {facts.n_layers} layers, {facts.d_model} wide, "
        f"{format_count(facts.model_params)} parameters)."
    ]
    parts += by_kind(summary, _how_trained)
    for leg in plan.without_controls().legs:
        if leg.shared_layers:
            shared = listed(sorted([leg.layer, *leg.shared_layers]))
            tokens = format_count(leg.budget_tokens)
            parts.append(f"Layers {shared} shared one SAE, trained on {tokens} tokens of their aligned activations.")
    of_other_l0 = [leg for leg in legs if summary.is_other_tier(leg)]
    tiers = [leg for leg in of_other_l0 if _is_copy(summary, leg)]
    if tiers:
        l0 = listed([f"{tier:g}" for tier in sorted({leg.target_l0 or 0 for leg in tiers})])
        parts.append(f"Copies of each SAE with {l0} active latents were trained on {tokens_of(tiers)} tokens each.")
    others = [leg for leg in of_other_l0 if leg not in tiers]
    if others:
        parts.append(f"Beside them, at another L0: {listed([leg.id for leg in others])}.")
    parts.append(f"Text: {summary.data or 'as in run.toml'}, in sequences of {plan.recipe.data.context} tokens.")
    parts.append(f"Evaluated on {legs[0].n_eval_tokens:,} tokens of documents that were not used for training.")
    if summary.left_out and summary.left_out.note:
        parts.append(f"Note: {summary.left_out.note}.")
    return " ".join(parts)


def _is_copy(summary: Summary, leg: LegSummary) -> bool:
    """Whether a leg began as a copy of another SAE of its own place."""
    first = summary.first_of(leg)
    if first.parent and summary.has(first.parent):
        return summary.leg(first.parent).place == leg.place
    return first.origin == "same layer"


def _how_trained(summary: Summary) -> list[str]:
    """Say which layers of one kind of site were trained from scratch, and which were transferred."""
    children = _transferred(summary)
    roots = [leg for leg in summary.final_legs if leg not in children]
    sentences = []
    if roots:
        sentences.append(f"{_at_layers(roots)} trained from scratch on {tokens_of(roots)} tokens.")
    if children:
        methods = set()
        for leg in children:
            first = summary.first_of(leg)
            refit = " with a decoder refit" if first.refit_tokens else ""
            methods.add(f"{first.method}{refit}")
        how = ", ".join(sorted(methods))
        outside = f" from {few_of(summary.outside_parents)}" if summary.outside_parents and not roots else ""
        sentences.append(
            f"{_at_layers(children)} transferred{outside} ({how}) and trained on {tokens_of(children)} tokens each."
        )
    return sentences


def _at_layers(legs: Sequence[LegSummary]) -> str:
    layers = sorted({leg.layer for leg in legs})
    if len(layers) == 1:
        return f"Layer {layers[0]} was"
    return f"Layers {listed(layers)} were"


# --- what was saved -------------------------------------------------------------------------------------------------


def price(summary: Summary) -> str:
    """Say at what quality the suite achieves the savings that its tiles show."""
    children = _transferred(summary)
    if not children:
        return ""
    pairs = _with_controls(summary, children, "full")
    if not pairs:
        return "Quality may not be equal: no transferred layer has a control with the full budget to compare with."
    metric = metric_name(leading_metric(summary))
    ratios = sorted(ratio for _, ratio in _ratios(summary, pairs))
    if not ratios:
        return (
            f"Quality at this cost: {metric} of the from-scratch controls with the full budget is not clearly above "
            "0, so ratios would say nothing; the differences are given below."
        )
    span = f"{ratios[0]:.2f}" if len(ratios) == 1 else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return (
        f"Quality at this cost: {metric} is {span} times that of from-scratch controls with the full budget, at "
        f"{len(ratios)} of {len(children)} transferred layers."
    )


Pair = tuple[LegSummary, LegSummary]
"""A leg and its control."""


def _with_controls(summary: Summary, legs: Sequence[LegSummary], kind: ControlKind) -> list[Pair]:
    """Return the legs that have a control of a kind, each with this control."""
    pairs = []
    for leg in legs:
        control = summary.control(leg, kind)
        if control:
            pairs.append((leg, control))
    return pairs


def _ratios(summary: Summary, pairs: Sequence[Pair]) -> list[tuple[LegSummary, float]]:
    """Return legs with their leading metric divided by the control's, where the ratio means something."""
    ratios = []
    for leg, control in pairs:
        ratio = quality_ratio(leg, control, leading_metric(summary))
        if ratio is not None:
            ratios.append((leg, ratio))
    return ratios


def saved(summary: Summary) -> str:
    """Say what the suite cost, compared with all layers from scratch, and what is counted."""
    if summary.only_measured:
        return "Nothing was trained or fitted in this run: its SAEs come from elsewhere, and were only measured."
    cost = summary.cost
    sentences = []
    ours = cost.with_survey.seconds
    theirs = cost.from_scratch.seconds_estimate
    if is_number(ours) and is_number(theirs):
        verdict = f", {theirs / ours:.1f} times as long" if theirs > ours else ": nothing was saved"
        sentences.append(
            f"The suite took {duration(ours)}; training all its layers from scratch at the full budget would have "
            f"taken an estimated {duration(theirs)}{verdict}."
        )
        sentences.append(
            "The estimate uses the time per token of the legs that this run trained from scratch, and counts the "
            "language model's forward passes once for all layers."
        )
    if cost.survey:
        sentences.append(f"This includes the survey that chose the plan ({duration(cost.survey.seconds)}).")
    if cost.controls.seconds:
        controls = duration(cost.controls.seconds)
        sentences.append(f"The controls took another {controls}; neither this nor evaluation is counted.")
    else:
        sentences.append("Evaluation is not counted.")
    sentences.append(uncounted(summary.outside_parents))
    return " ".join(filter(None, sentences))


# --- what was lost --------------------------------------------------------------------------------------------------


def lost(summary: Summary) -> list[str]:
    """Say what the saving cost in quality: against controls if there are any, and in the model's loss."""
    comparisons: tuple[tuple[ControlKind, str], ...] = (
        ("full", "from-scratch controls with the full budget"),
        ("equal_tokens", "from-scratch controls on as many tokens as the transfer used in all"),
    )
    sentences = []
    for kind, words in comparisons:
        pairs = _with_controls(summary, summary.final_legs, kind)
        if pairs:
            sentences.append(_comparison(summary, pairs, words))
    if not sentences:
        sentences.append("No from-scratch controls were trained, so this run does not say what the transfer costs.")
    rise = _loss_rise(summary)
    return [*sentences, rise] if rise else sentences


def _comparison(summary: Summary, pairs: Sequence[Pair], words: str) -> str:
    """Compare legs with their controls, which are described in words: by ratios and by differences in nats."""
    metric = metric_name(leading_metric(summary))
    ratios = [f"{ratio:.2f} at layer {leg.layer}" for leg, ratio in _ratios(summary, pairs)]
    parts = []
    if ratios:
        parts.append(f"{metric} divided by that of {words}: {listed(ratios)}")
    else:
        parts.append(f"{metric} cannot be divided by that of {words}, which is not clearly above 0")
    gaps = []
    for leg, control in pairs:
        if is_number(leg.delta_ce) and is_number(control.delta_ce):
            gaps.append(_gap(leg, control, leg.delta_ce - control.delta_ce))
    if gaps:
        parts.append(f"in nats per token, the model's loss is {listed(gaps)}")
    return f"{'; '.join(parts)}."


def _gap(leg: LegSummary, control: LegSummary, gap: float) -> str:
    """Say how much more the model's loss rises with a leg than with its control; errors as if they were independent."""
    spread = ""
    if is_number(leg.delta_ce_se) and is_number(control.delta_ce_se):
        spread = f" ± {math.hypot(leg.delta_ce_se, control.delta_ce_se):.3f}"
    return f"{abs(gap):.3f}{spread} {'higher' if gap > 0 else 'lower'} at layer {leg.layer}"


def _loss_rise(summary: Summary) -> str:
    """Say by how much the model's own loss rises with an SAE in place; "" if it was not measured."""
    rises = {}
    for leg in summary.final_legs:
        if is_number(leg.delta_ce):
            rises[leg.id] = leg.delta_ce
    if not rises:
        return ""
    low = summary.leg(min(rises, key=rises.__getitem__))
    high = summary.leg(max(rises, key=rises.__getitem__))
    return (
        f"With an SAE in place, the model's own loss of {low.ce_loss_without_sae:.2f} nats per token rises by "
        f"{low.delta_ce:.3f} (layer {low.layer}) to {high.delta_ce:.3f} (layer {high.layer})."
    )


# --- which layers transfer badly ------------------------------------------------------------------------------------


def transfers_badly(summary: Summary) -> list[str]:
    """Say which transferred layers fall behind, and for which the run cannot tell."""
    children = _transferred(summary)
    if not children:
        return ["Nothing was transferred in this run."]
    sentences = []
    metric = metric_name(leading_metric(summary))
    pairs = _with_controls(summary, children, "full")
    ratios = sorted(_ratios(summary, pairs), key=lambda pair: -pair[1])
    if ratios:
        sentences.append(_worst_compared(ratios, metric))
    elif pairs:
        sentences.append(
            f"The layers with a full-budget control cannot be ranked: its {metric} is not clearly above 0."
        )
    predicted = _worst_predicted(children)
    if predicted:
        sentences.append(predicted)
    alone = [leg for leg in children if not summary.control(leg, "full")]
    if alone:
        sentences.append(_without_control(alone))
    sentences.append("These comparisons use one seed per leg, so differences of about one percent mean nothing.")
    return sentences


def _worst_compared(ratios: list[tuple[LegSummary, float]], metric: str) -> str:
    """Name the leg that is furthest behind its control; `ratios` in decreasing order."""
    worst, ratio = ratios[0]
    others = [f"{other:.2f} at layer {leg.layer}" for leg, other in ratios[1:]]
    rest = f" (the others: {', '.join(others)})" if others else ""
    if ratio <= 1.05:
        return (
            f"None of the layers with a full-budget control: the worst is layer {worst.layer}, at {ratio:.2f} times "
            f"its control's {metric}{rest}."
        )
    return (
        f"Of the {len(ratios)} with a full-budget control, layer {worst.layer}: its {metric} is {ratio:.2f} times that "
        f"of its control{rest}."
    )


def _worst_predicted(legs: Sequence[LegSummary]) -> str:
    """Name the leg that did worst against a survey's prediction; "" without a survey."""
    gaps = []
    for leg in legs:
        if is_number(leg.predicted_fvu) and is_number(leg.validation_fvu):
            gaps.append((leg.validation_fvu / leg.predicted_fvu, leg.layer))
    if not gaps:
        return ""
    ratio, layer = max(gaps, key=lambda gap: gap[0])
    return (
        f"Compared with the survey's prediction, layer {layer} is worst: its FVU is {ratio:.2f} times the predicted "
        "one, on the same validation rows."
    )


def _without_control(legs: Sequence[LegSummary]) -> str:
    """Say what is known about transferred legs that have no control with the full budget."""
    layers = sorted({leg.layer for leg in legs})
    subject = f"Layers {listed(layers)} have" if len(layers) > 1 else f"Layer {layers[0]} has"
    text = (
        f"{subject} no control with the full budget, so this run cannot tell whether a high loss there comes from the "
        "transfer or from the layer itself."
    )
    if len(legs) == 1:
        return text
    highest = max(legs, key=lambda leg: leg.balanced_fvu or 0)
    text += (
        f" Among these layers, balanced FVU is highest at layer {highest.layer} ({decimal(highest.balanced_fvu, 4)})"
    )
    scores = {leg.layer: leg.ce_loss_score for leg in legs if is_number(leg.ce_loss_score)}
    if scores:
        lowest = min(scores, key=scores.__getitem__)
        text += f", and the CE score is lowest at layer {lowest} ({scores[lowest]:.4f})"
    return f"{text}."


def other_signs(summary: Summary, measures: Measures | None) -> list[str]:
    """Say what else indicates a hard transfer: where features share fewest tokens with their parent features."""
    shares = []
    hops = {summary.first_of(leg).id for leg in _transferred(summary)}
    for row in (measures.transferability or ()) if measures else ():
        if row.leg in hops and not row.snapshot and is_number(row.transferability):
            shares.append((row.transferability, row.layer))
    if len(shares) < 3:
        return []
    shares.sort(key=lambda pair: pair[0])
    least = [f"{100 * share:.0f} % at layer {layer}" for share, layer in shares[:2]]
    most, most_layer = shares[-1]
    return [
        "Another sign is feature transferability, the share of tokens that features have in common with the parent "
        f"features they started from. It is lowest with {listed(least)}, and highest with {100 * most:.0f} % at layer "
        f"{most_layer}. It says how much had to change, not how good the result is."
    ]
