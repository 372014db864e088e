"""A plan before it runs: its legs, its cost, and the results of a survey."""

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saerelay.planning.batches import usual_batch
from saerelay.planning.choose import Choice
from saerelay.planning.cost import Cost
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.planning.ranks import Spread
from saerelay.planning.survey import Survey, SurveyedHop
from saerelay.runs.suite import method_of
from saerelay.spec import few_of, format_count
from saerelay.views.text import duration, flops


def survey_table(survey: Survey) -> Table:
    """Show the survey with one row per layer: its own measurements, and those of the hops from its neighbours."""
    table = Table(box=None, pad_edge=False, title="survey", title_justify="left")
    columns = (
        "layer",
        "RMS norm",
        "pilot FVU",
        "R² from below",
        "R² from above",
        "angle/π from below",
        "angle/π from above",
        "hop FVU from below",
        "hop FVU from above",
    )
    for name in columns:
        table.add_column(name, justify="right")
    layers = [layer.layer for layer in survey.layers]
    hops = {(hop.source, hop.target): hop for hop in survey.hops}
    for i, layer in enumerate(survey.layers):
        below = hops.get((layers[i - 1], layer.layer)) if i > 0 else None
        above = hops.get((layers[i + 1], layer.layer)) if i + 1 < len(layers) else None
        row = [f"{layer.layer}", f"{layer.rms_norm:.4g}", f"{layer.fvu:.4f}"]
        for name in ("r2", "angle", "fvu"):
            row += [_hop_number(below, name), _hop_number(above, name)]
        table.add_row(*row)
    return table


def _hop_number(hop: SurveyedHop | None, name: str) -> str:
    return "-" if hop is None else f"{getattr(hop, name):.4f}"


def choice_lines(survey: Survey, choice: Choice) -> list[Text]:
    """Say what a choice is based on, and what it is predicted to cost."""
    cost = survey.cost
    long_layers = ", ".join(str(layer) for layer in sorted({survey.hub, *survey.long.ends}))
    return [
        Text(
            f"Predicted: at every layer, the FVU on validation rows is at most {choice.ratio:.3f} times that of an SAE "
            f"trained from scratch on root_tokens. Basis: pilots of {format_count(survey.pilot_tokens)} tokens at all "
            f"layers, pilots of {format_count(survey.long.long_tokens)} tokens at layers {long_layers}, and hops of "
            "the pilots without training."
        ),
        Text(
            f"The survey took {duration(cost.seconds)}, {flops(cost.flops)}, {format_count(cost.sae_samples)} "
            f"activations and {format_count(cost.lm_tokens)} tokens of the language model. The costs below include "
            "neither it nor controls; each leg counts with the tokens that it is predicted to need, of which it may "
            f"get more. Lower bound, the language model alone: {flops(choice.cost.lm_flops)}, "
            f"{duration(choice.seconds_lm)}."
        ),
    ]


def plan_table(plan: Plan, reference: dict[int, float] | None = None) -> Table:
    """Show a plan with one row per leg: what is trained where, from which parent, when, on how many tokens.

    With `reference`, the FVU that each layer would have from scratch, predicted FVUs and their ratios to it are shown.
    Tokens per step are shown where legs differ in them.
    """
    batches_differ = len({leg.schedule.batch_tokens for leg in plan.legs}) > 1
    table = Table(box=None, pad_edge=False, caption_justify="left")
    for name in ("leg", "role", "from", "method"):
        table.add_column(name, overflow="fold")
    numbers = ["trains from", "tokens", "latents", "lr"]
    if batches_differ:
        numbers.append("batch")
    if reference:
        numbers += ["predicted FVU", "ratio to scratch"]
    for name in numbers:
        table.add_column(name, justify="right")
    for leg in plan.legs:
        row = [
            leg.id,
            _role(plan, leg),
            escape(leg.parent) or "scratch",
            method_of(leg),
            format_count(leg.fold_at),
            format_count(leg.budget_tokens),
            str(leg.dictionary.n_latents),
            learning_rate(leg),
        ]
        if batches_differ:
            row.append(str(leg.schedule.batch_tokens))
        if reference and leg.goal.predicted_fvu:
            row += [f"{leg.goal.predicted_fvu:.4f}", f"{leg.goal.predicted_fvu / reference[leg.layer]:.3f}"]
        table.add_row(*row)
    notes = [note for note in (rate_note(plan), inherited_note(plan)) if note]
    table.caption = escape("\n".join(notes)) or None
    return table


def rate_note(plan: Plan) -> str:
    """Say what "≤" before a learning rate means; "" if the plan has none."""
    if not any(_is_bound(leg) for leg in plan.legs):
        return ""
    return "≤: the better a hop's map explains its layer, the lower the rate that training begins with."


def inherited_note(plan: Plan) -> str:
    """Say which legs have the dictionary of a parent outside the plan, rather than the recipe's; "" if none has."""
    kept: dict[str, list[str]] = {}
    tiers = plan.recipe.plan.tier.tiers
    for leg in plan.legs:
        if leg.parent not in plan.externals or leg.method == "random":
            continue
        dictionary = plan.recipe.dictionary.sized(plan.facts.width(leg.site))
        if leg.dictionary.l0 in tiers:  # asked for, too
            dictionary = dictionary.with_l0(leg.dictionary.l0)
        has = _shape(leg)
        asked = _shape(leg.changed(dictionary=dictionary))
        if has != asked:
            kept.setdefault(f"{has} (in the recipe: {asked})", []).append(leg.id)
    if not kept:
        return ""
    shapes = "; ".join(f"{few_of(ids)}: {shape}" for shape, ids in kept.items())
    return (
        "An SAE from outside the plan keeps its architecture, size and L0, unless a leg in [[plan.legs]] sets others. "
        f"{shapes}"
    )


def _shape(leg: Leg) -> str:
    """Return the architecture, size and L0 of a leg's dictionary, in words."""
    dictionary = leg.dictionary
    l0 = "" if dictionary.l0 is None else f", {dictionary.l0:.0f} active"
    return f"{dictionary.architecture}, {dictionary.n_latents} latents{l0}"


def _is_bound(leg: Leg) -> bool:
    """Whether the fit of the hop's map may lower the learning rate when training begins."""
    return leg.hop is not None and leg.schedule.lr_by_map


def learning_rate(leg: Leg) -> str:
    """Return the largest learning rate; "≤" if the fit of the hop's map may lower it when training begins."""
    at_most = "≤ " if _is_bound(leg) else ""
    return f"{at_most}{leg.schedule.lr:.1e}"


def _role(plan: Plan, leg: Leg) -> str:
    if plan.stays_as(plan.first_of(leg)) == "tier":
        return f"tier ({leg.dictionary.l0:g} active)"
    if leg.control_kind is None:
        return leg.role
    return f"control ({leg.control_kind.replace('_', ' ')})"


def time_basis(plan: Plan) -> str:
    """Say what the time of a surveyed plan is extrapolated from.

    On a GPU long legs take larger batches than the pilots, which take less time per token.
    """
    basis = "from the survey's pilots"
    if plan.batch_tokens > usual_batch(plan.recipe):
        basis += f", whose steps take {usual_batch(plan.recipe)} tokens; with up to {plan.batch_tokens} it may be less"
    return basis


def plan_facts(plan: Plan, cost: Cost, seconds: dict[str, float] | None, basis: str = "from a few steps") -> Table:
    """Show the cost of a plan; `basis` says what its time is extrapolated from."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("language model reads", f"{format_count(cost.lm_tokens)} tokens")
    legs = "1 leg" if len(plan.legs) == 1 else f"{len(plan.legs)} legs"
    controls = ", controls included" if any(leg.control for leg in plan.legs) else ""
    table.add_row("SAEs train on", f"{format_count(cost.sae_samples)} activations, over {legs}{controls}")
    table.add_row(
        "operations",
        f"{flops(cost.flops)} executed ({flops(cost.flops_dense_equivalent)} if dense), "
        f"{flops(cost.lm_flops)} of them by the language model",
    )
    if seconds:
        has_fits = any(leg.moment_tokens or leg.refit_tokens for leg in plan.legs)
        fits = "; maps between layers and refits of decoders take further time" if has_fits else ""
        table.add_row(
            "time",
            f"{duration(seconds['total'])} on this machine (language model {duration(seconds['lm'])}, "
            f"SAE steps {duration(seconds['steps'])}; extrapolated {basis}){fits}",
        )
    else:
        table.add_row("time", "not measured; --timing loads the model's weights and times a few steps")
    table.add_row("memory", f"{cost.memory_bytes / 2**30:.2f} GiB of weights, training state and activations")
    table.add_row("disk", f"{cost.disk_bytes / 2**30:.2f} GiB")
    if cost.cache_bytes:
        table.add_row(
            "cache",
            f"up to {cost.cache_bytes / 2**30:.2f} GiB of activations in {escape(plan.recipe.data.cache)} "
            f"(less if part of it is cached already, or is read again); {cache_pays(cost, seconds)}",
        )
    return table


def cache_pays(cost: Cost, seconds: dict[str, float] | None) -> str:
    """Say above which reading speed a cache is faster than computing activations again, by time or by operations.

    >>> cost = Cost.model_construct(cache_bytes=4e9, lm_flops=8e12)
    >>> cache_pays(cost, {"lm": 2.0})
    'reading is faster than computing above 2.0 GB/s per process'
    >>> cache_pays(cost, None)
    'reading is faster than computing above 500 MB/s for each TFLOP/s of the language model'
    """
    beats = "reading is faster than computing above"
    if seconds:
        return f"{beats} {cost.cache_bytes / seconds['lm'] / 1e9:.1f} GB/s per process"
    megabytes = cost.cache_bytes / cost.lm_flops * 1e12 / 1e6
    return f"{beats} {megabytes:.0f} MB/s for each TFLOP/s of the language model"


def spread_table(plan: Plan, spread: Spread) -> Group:
    """Show which rank trains which legs, the memory it needs, and what several ranks gain."""
    table = Table(box=None, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("memory", justify="right")
    table.add_column("trains")
    for rank, share in enumerate(spread.ranks):
        legs = ", ".join(share.legs) or "nothing (it only runs the language model)"
        table.add_row(str(rank), f"{share.memory_bytes / 2**30:.2f} GiB", legs)
    per_token = spread.exchange_bytes / plan.n_tokens
    who = "All ranks run the language model"
    degree = plan.recipe.model.tensor_parallel
    if degree > 1:
        who = f"Groups of {degree} ranks hold and run the language model together"
    lines = [f"{who}; ranks exchange {per_token / 1e3:.1f} kB of activations per token."]
    if spread.seconds and spread.seconds_of_one:
        lines.append(
            f"If each rank is as fast as this machine: {duration(spread.seconds)} "
            f"({format_count(int(plan.n_tokens / spread.seconds))} tokens/s), against "
            f"{duration(spread.seconds_of_one)} for a single rank; the exchange is not counted"
        )
    return Group(table, *lines)
