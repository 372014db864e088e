"""What the report's first page says, computed from the run's documents: what was trained, saved and lost, and where."""

import math
from typing import Any

from saerelay.planning.plan import Leg, Plan
from saerelay.spec import format_count
from saerelay.views.tables import duration, flops

Document = dict[str, Any]
NAMES = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "relu": "ReLU"}


def story(plan: Plan, summary: Document, measures: Document | None = None) -> Document:
    """Everything the page's template names: facts, answers as sentences, and rows of its table and of the plan."""
    return {
        "model": summary["model"],
        "title": f"Sparse autoencoders for {_layers(plan, summary)} of {summary['model']}",
        "caption": caption(summary),
        "trained": trained(plan, summary),
        "tiles": tiles(summary),
        "price": price(summary),
        "saved": saved(summary),
        "lost": lost(summary),
        "badly": transfers_badly(summary) + other_signs(measures),
        "surveyed": any(leg["predicted_fvu"] for leg in summary["legs"]),
        "rows": quality_rows(summary),
        "plan_rows": plan_rows(plan),
        "plan_tokens": format_count(plan.n_tokens),
    }


def _layers(plan: Plan, summary: Document) -> str:
    n = len({leg["layer"] for leg in summary["legs"]})
    return "one layer" if n == 1 else f"{'all ' if n == plan.facts.n_layers else ''}{n} layers"


def _suite(summary: Document) -> list[Document]:
    legs = [leg for leg in summary["legs"] if leg["role"] != "control"]
    return sorted(legs, key=lambda leg: (leg["layer"], leg["module"], leg["id"]))


def control(summary: Document, leg: Document, kind: str) -> Document | None:
    """The from-scratch control of a leg, of one kind ("full" or "equal_tokens")."""
    ids = (leg["id"], kind)
    return next((c for c in summary["legs"] if (c["control_of"], c["control_kind"]) == ids), None)


def caption(summary: Document) -> str:
    """What every figure says below it: model, data, tokens, dictionaries, L0, seed."""
    legs = _suite(summary)
    kinds = ", ".join(sorted({f"{NAMES[leg['architecture']]}, {leg['n_latents']} latents" for leg in legs}))
    modules = ", ".join(sorted({leg["module"] for leg in legs}))
    l0 = sum(leg["l0"] for leg in legs) / len(legs)
    seeds = ", ".join(str(seed) for seed in sorted({leg["seed"] for leg in legs}))
    return (
        f"{summary['model']} ({modules}); {summary.get('data') or 'its data'}, test split, "
        f"{legs[0]['n_eval_tokens']:,} tokens; {kinds}, mean L0 {l0:.3g}; seed {seeds}."
    )


def trained(plan: Plan, summary: Document) -> str:
    """Which dictionaries were made, how, from what."""
    legs = _suite(summary)
    roots, children = [leg for leg in legs if not leg["parent"]], [leg for leg in legs if leg["parent"]]
    first, data = legs[0], plan.recipe.data
    parts = [
        f"A {NAMES[first['architecture']]} sparse autoencoder with {first['n_latents']:,} latents for each layer of "
        f"{summary['model']} ({plan.facts.family}, {plan.facts.n_layers} layers, {plan.facts.d_model} wide, "
        f"{format_count(plan.facts.model_params)} parameters)."
    ]
    if roots:
        parts.append(
            f"{_at_layers(roots)} trained from scratch on {format_count(max(leg['tokens'] for leg in roots))} tokens."
        )
    if children:
        methods = ", ".join(
            sorted({f"{leg['method']}{' with a decoder refit' if leg['refit_tokens'] else ''}" for leg in children})
        )
        parts.append(
            f"{_at_layers(children)} transferred ({methods}) and trained on "
            f"{format_count(max(leg['tokens'] for leg in children))} tokens each."
        )
    parts.append(f"Text: {summary.get('data') or 'as in run.toml'}, in sequences of {data.context} tokens.")
    parts.append(f"Measured on {first['n_eval_tokens']:,} tokens of documents that training never saw.")
    return " ".join(parts)


def _at_layers(legs: list[Document]) -> str:
    layers = _listed(sorted({leg["layer"] for leg in legs}))
    return f"Layer {layers} was" if len(legs) == 1 else f"Layers {layers} were"


def _listed(items: list[Any]) -> str:
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def tiles(summary: Document) -> list[Document]:
    """The three prices of the suite, each beside that of all layers from scratch."""
    cost, legs = summary["cost"], _suite(summary)
    survey = cost["survey"] or {"seconds": 0.0, "flops": 0.0, "sae_samples": 0}
    roots = [leg["tokens"] for leg in summary["legs"] if not leg["parent"]]
    samples = len({(leg["layer"], leg["module"]) for leg in legs}) * max(roots, default=0)
    pairs = (
        ("Time", "wall-clock", cost["seconds"], survey["seconds"], cost["seconds_all_from_scratch_estimate"], duration),
        ("Compute", "operations executed", cost["flops"], survey["flops"], cost["flops_all_from_scratch"], flops),
        ("Samples", "activations seen by SAEs", cost["sae_samples"], survey["sae_samples"], samples, format_count),
    )
    found = []
    for name, what, ours, surveyed, theirs, shown in pairs:
        if known(ours) and known(theirs) and theirs > 0:
            spent = ours + surveyed
            found.append(
                {
                    "name": name,
                    "what": what,
                    "ratio": f"{max(theirs / spent, spent / theirs):.1f}",
                    "less": theirs >= spent,
                    "ours": shown(spent),
                    "theirs": shown(theirs),
                    "share": round(100 * min(1.0, spent / theirs), 1),
                }
            )
    return found


def price(summary: Document) -> str:
    """At what quality the suite is as much cheaper as its tiles say."""
    children = [leg for leg in _suite(summary) if leg["parent"]]
    ratios = sorted(leg["fvu"] / c["fvu"] for leg in children if (c := control(summary, leg, "full")))
    if not children:
        return ""
    if not ratios:
        return "Not at equal quality, perhaps: no transferred layer has a control with the full budget to compare with."
    span = f"{ratios[0]:.2f}" if len(ratios) == 1 else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return (
        f"Not at equal quality: FVU is {span} times that of from-scratch controls with the full budget, at the "
        f"{len(ratios)} of {len(children)} transferred layers that have one."
    )


def other_signs(measures: Document | None) -> list[str]:
    """What else tells of a hard transfer: where features share fewest tokens with those that they started as."""
    rows = [row for row in (measures or {}).get("transferability") or [] if not row["snapshot"]]
    if len(rows) < 3:
        return []
    rows.sort(key=lambda row: row["transferability"])
    least = [f"{100 * row['transferability']:.0f} % at layer {row['layer']}" for row in rows[:2]]
    return [
        f"Another sign: features share fewest tokens with those they started as ({_listed(least)}; at most "
        f"{100 * rows[-1]['transferability']:.0f} %, layer {rows[-1]['layer']}). That says how much had to change, not "
        "how good the result is."
    ]


def known(value: float | None) -> bool:
    """Whether a number is one."""
    return value is not None and math.isfinite(value)


def saved(summary: Document) -> str:
    """What the suite took, beside all layers from scratch; what is counted and what is not."""
    cost = summary["cost"]
    survey = cost["survey"]
    spent = (cost["seconds"] or math.nan) + (survey["seconds"] if survey else 0)
    theirs = cost["seconds_all_from_scratch_estimate"]
    sentences = []
    if known(spent) and known(theirs):
        sentences.append(
            f"The suite took {duration(spent)}; all its layers from scratch, each at the full budget, would have taken "
            f"an estimated {duration(theirs)}"
            + (f", {theirs / spent:.1f} times as long." if theirs > spent else ": nothing was saved.")
        )
        sentences.append(
            "That estimate is the time per token of the legs that were trained from scratch in this run, plus the "
            "language model's forward passes, once for all layers."
        )
    if survey:
        sentences.append(f"The survey that chose the plan is in it ({duration(survey['seconds'])}).")
    apart = cost["controls"]["seconds"]
    if apart:
        sentences.append(f"The controls took another {duration(apart)}, which is not counted; nor is evaluation.")
    else:
        sentences.append("Evaluation is not counted.")
    return " ".join(sentences)


def lost(summary: Document) -> list[str]:
    """What the saving cost in quality: against controls where there are any, and what the model loses."""
    sentences = []
    for kind, words in (
        ("full", "from-scratch controls with the full budget"),
        ("equal_tokens", "controls from scratch on as many tokens as a transfer looked at"),
    ):
        pairs = [(leg, other) for leg in _suite(summary) if (other := control(summary, leg, kind))]
        if pairs:
            ratios = [f"{leg['fvu'] / other['fvu']:.2f} at layer {leg['layer']}" for leg, other in pairs]
            text = f"FVU over that of {words}: {_listed(ratios)}"
            gaps = [_gap(leg, other) for leg, other in pairs if known(leg["delta_ce"]) and known(other["delta_ce"])]
            if gaps:
                text += f"; the model's loss in nats per token is {_listed(gaps)}"
            sentences.append(text + ".")
    if not sentences:
        sentences.append("No from-scratch controls were trained, so this run does not say what the transfer costs.")
    deltas = [leg for leg in _suite(summary) if known(leg["delta_ce"])]
    if deltas:
        low, high = (pick(deltas, key=lambda leg: leg["delta_ce"]) for pick in (min, max))
        sentences.append(
            f"With an SAE in place, the model's own loss of {low['ce_loss_without_sae']:.2f} nats per token rises by "
            f"{low['delta_ce']:.3f} (layer {low['layer']}) to {high['delta_ce']:.3f} (layer {high['layer']})."
        )
    return sentences


def _gap(leg: Document, other: Document) -> str:
    """How much more the model loses with a leg than with its control; errors as if the two were independent."""
    gap = leg["delta_ce"] - other["delta_ce"]
    error = math.hypot(leg["delta_ce_se"] or math.nan, other["delta_ce_se"] or math.nan)
    spread = f" ± {error:.3f}" if known(error) else ""
    return f"{abs(gap):.3f}{spread} {'higher' if gap > 0 else 'lower'} at layer {leg['layer']}"


def transfers_badly(summary: Document) -> list[str]:
    """Which transferred layers fall behind, and where the run cannot tell."""
    children = [leg for leg in _suite(summary) if leg["parent"]]
    if not children:
        return ["Nothing was transferred in this run."]
    sentences = []
    compared = [(leg["fvu"] / other["fvu"], leg) for leg in children if (other := control(summary, leg, "full"))]
    if compared:
        compared.sort(key=lambda pair: -pair[0])
        ratio, worst = compared[0]
        others = [f"{r:.2f} at layer {leg['layer']}" for r, leg in compared[1:]]
        rest = f" (the others: {', '.join(others)})" if others else ""
        behind = [leg for r, leg in compared if r > 1.05]
        if not behind:
            sentences.append(
                f"None of those with a full-budget control: layer {worst['layer']} is the worst, at {ratio:.2f} times "
                f"its control's FVU{rest}."
            )
        else:
            sentences.append(
                f"Of {len(compared)} that can be judged, layer {worst['layer']}: its FVU is {ratio:.2f} times that of "
                f"its control with the full budget{rest}."
            )
    predicted = [leg for leg in children if known(leg["predicted_fvu"]) and known(leg["validation_fvu"])]
    if predicted:
        gaps = [(leg["validation_fvu"] / leg["predicted_fvu"], leg) for leg in predicted]
        ratio, worst = max(gaps, key=lambda pair: pair[0])
        sentences.append(
            f"Against what the survey predicted, layer {worst['layer']} came out worst: {ratio:.2f} times the "
            "predicted FVU, on the same validation rows."
        )
    alone = [leg for leg in children if not control(summary, leg, "full")]
    if alone:
        layers = sorted({leg["layer"] for leg in alone})
        highest = max(alone, key=lambda leg: leg["fvu"])
        text = (
            f"Layer{'s' if len(layers) > 1 else ''} {_listed(layers)} ha{'ve' if len(layers) > 1 else 's'} no control "
            "with the full budget: whether a high FVU there is the transfer's doing or the layer's own, this run "
            "cannot tell."
        )
        if len(alone) > 1:
            text += f" Among them FVU is highest at layer {highest['layer']} ({highest['fvu']:.4f})"
            scored = [leg for leg in alone if known(leg["ce_loss_score"])]
            if scored:
                lowest = min(scored, key=lambda leg: leg["ce_loss_score"])
                text += f", and the CE score lowest at layer {lowest['layer']} ({lowest['ce_loss_score']:.4f})"
            text += "."
        sentences.append(text)
    sentences.append("Each leg was trained with one seed: a difference of a percent means nothing.")
    return sentences


# --- tables -----------------------------------------------------------------------------------------------------


def quality_rows(summary: Document) -> list[Document]:
    """A row for each leg of the suite, with the places of its marks, and its controls', on a scale from 0 to 100."""
    legs = _suite(summary)
    top = {
        name: 1.05 * max((leg[name] + (leg[f"{name}_se"] or 0 if name == "delta_ce" else 0)
                          for leg in summary["legs"] if known(leg[name])), default=1.0)
        for name in ("fvu", "delta_ce")
    }  # fmt: skip
    rows = []
    for leg in legs:
        others = {kind: control(summary, leg, kind) for kind in ("equal_tokens", "full")}
        marks: Document = {}
        for name, scale in top.items():
            shown = {"transfer" if leg["parent"] else "root": leg} | {k: c for k, c in others.items() if c}
            marks[name] = [
                {
                    "kind": kind,
                    "x": round(100 * one[name] / scale, 2),
                    "low": round(100 * (one[name] - (one.get(f"{name}_se") or 0)) / scale, 2),
                    "high": round(100 * (one[name] + (one.get(f"{name}_se") or 0)) / scale, 2),
                    "value": one[name],
                }
                for kind, one in shown.items()
                if known(one[name])
            ]
        full = others["full"]
        rows.append(
            leg
            | {
                "origin": _origin(leg),
                "tokens_shown": format_count(leg["tokens"]),
                "marks": marks,
                "ratio": leg["fvu"] / full["fvu"] if full else None,
                "controls": [
                    other | {"tokens_shown": format_count(other["tokens"])} for other in others.values() if other
                ],
            }
        )
    return rows


def _origin(leg: Document) -> str:
    if not leg["parent"]:
        return "from scratch"
    return f"{leg['method']}{' + refit' if leg['refit_tokens'] else ''} from {leg['parent']}"


def plan_rows(plan: Plan) -> list[Document]:
    """The legs as a tree, parents first, each with its life on the axis of tokens in percent."""
    ids = {leg.id for leg in plan.legs}
    rows = []

    def visit(leg: Leg, depth: int) -> None:
        at = {name: 100 * value / plan.n_tokens for name, value in
              (("start", leg.start), ("fold", leg.fold_at), ("end", leg.end))}  # fmt: skip
        budget = "full budget" if leg.control_kind == "full" else "equal tokens"
        rows.append(
            {
                "id": leg.id,
                "depth": depth,
                "layer": leg.layer,
                "role": leg.role,
                "budget": budget if leg.role == "control" else "",
                "parent": leg.parent if leg.parent not in ids else "",
                "how": f"{leg.method}{' + refit' if leg.refit_tokens else ''}" if leg.method else "from scratch",
                "tokens": format_count(leg.budget_tokens),
                "moments": format_count(leg.moment_tokens) if leg.moment_tokens else "",
                "lr": f"{leg.schedule.lr:.1e}",
            }
            | {name: round(value, 2) for name, value in at.items()}
        )
        for child in sorted((other for other in plan.legs if other.parent == leg.id), key=lambda child: child.layer):
            visit(child, depth + 1)

    tops = [leg for leg in plan.legs if leg.parent not in ids]
    for leg in sorted(tops, key=lambda leg: (leg.role == "control", leg.layer)):
        visit(leg, 0)
    return rows
