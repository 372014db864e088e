"""Tables for people: a plan before it runs, a suite's quality after."""

import unicodedata
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saerelay.analysis.endpoint import Endpoint
from saerelay.analysis.interpret import Estimate
from saerelay.planning.choose import Choice
from saerelay.planning.cost import Cost
from saerelay.planning.plan import Plan
from saerelay.planning.survey import Survey
from saerelay.spec import format_count


def survey_table(survey: Survey) -> Table:
    """One row a layer: what was measured of it, and of the hops to it from its neighbours."""
    table = Table(box=None, pad_edge=False, title="survey", title_justify="left")
    columns = ("layer", "norm", "pilot FVU", "R² from below", "above", "angle", "above ", "FVU after hop", "above  ")
    for name in columns:
        table.add_column(name, justify="right")
    layers, hops = [layer.layer for layer in survey.layers], {(hop.source, hop.target): hop for hop in survey.hops}
    for i, layer in enumerate(survey.layers):
        near = [hops.get((layers[j], layer.layer)) if 0 <= j < len(layers) else None for j in (i - 1, i + 1)]
        row = [f"{layer.layer}", f"{layer.rms_norm:.4g}", f"{layer.fvu:.4f}"]
        for name in ("r2", "angle", "fvu"):
            row += ["-" if hop is None else f"{getattr(hop, name):.4f}" for hop in near]
        table.add_row(*row)
    return table


def choice_lines(survey: Survey, choice: Choice) -> list[Text]:
    """What a choice rests on, and what it is predicted to take."""
    taken, long = survey.cost, ", ".join(map(str, sorted({survey.hub, *survey.long.ends})))
    return [
        Text(
            f"Predicted: every layer at no more than {choice.ratio:.3f} times the FVU of scratch with root_tokens, on "
            f"validation rows. Basis: pilots of {format_count(survey.pilot_tokens)} tokens at all layers and of "
            f"{format_count(survey.long.long_tokens)} at layers {long}, hops of the pilots without training."
        ),
        Text(
            f"The survey took {duration(taken.seconds)}, {flops(taken.flops)}, {format_count(taken.sae_samples)} "
            f"activations, {format_count(taken.lm_tokens)} tokens of the language model; what follows comes on top. "
            f"The bound, the language model alone: {flops(choice.cost.lm_flops)}, {duration(choice.seconds_lm)}."
        ),
    ]


def matrix_tables(matrix: dict[str, Any]) -> list[Text | Table]:
    """FVU, and ΔCE where it was measured, of every leg on every layer; one titled table a metric and method."""
    cells = [cell for cell in matrix["cells"] if not cell["snapshot"]]
    home = {cell["leg"]: cell for cell in cells if cell["source"] == cell["target"]}
    shown: list[Text | Table] = []
    for name, metric in (("fvu", "FVU"), ("delta_ce", "ΔCE (nats per token)")):
        for method in dict.fromkeys(cell["method"] for cell in cells):
            if any(cell[name] is None for cell in cells):
                continue
            table = Table(box=None, pad_edge=False)
            table.add_column("SAE")
            for layer in matrix["layers"]:
                table.add_column(f"on {layer}", justify="right")
            for leg, own in home.items():
                row = {c["target"]: f"{c[name]:.3f}" for c in cells if (c["leg"], c["method"]) == (leg, method)}
                row[own["source"]] = f"[bold]{own[name]:.3f}[/bold]"
                table.add_row(leg, *(row.get(layer, "-") for layer in matrix["layers"]))
            how = "as it is (zero-shot)" if method == "identity" else f"after a closed-form hop: {method}"
            shown += [Text(f"\n{metric} of each SAE on the activations of each layer, {how}"), table]
    n_tokens, fitted = format_count(matrix["n_tokens"]), format_count(matrix["map_tokens"])
    shown.append(Text(f"\n{n_tokens} held-out tokens; maps fitted on {fitted} training tokens. Bold: at home."))
    return shown


def measures_tables(measures: dict[str, Any]) -> list[Table]:
    """What each transferred leg shares with its parent and with scratch, how far it came, and what offsets cost."""
    hops = (row for row in _finished(measures["similarity"]) if row["kind"] == "hop")
    hop = {row["leg"]: row for row in hops if row["leg"] == row["target"]}
    shared = {row["leg"]: row for row in _finished(measures["transferability"] or [])}
    scores = _finished(measures["transfer_scores"] or [])
    attributed = _finished((measures["dla"] or {"legs": []})["legs"])
    kept = Table(box=None, pad_edge=False, title="what transfers, and direct logit attribution", title_justify="left")
    for name in ("leg", "parent", "MMCS", "folded", "transferability", "top logits", "bottom logits", "tokens", "DLA"):
        kept.add_column(name, justify="left" if name in ("leg", "parent") else "right")
    effects = {row["leg"]: f"{row['mean']:.3g} ± {row['standard_error'] or 0:.2g}" for row in attributed}
    for leg in dict.fromkeys([*effects, *hop]):
        own, parent = shared.get(leg), hop.get(leg)
        row = [parent["source"], _number(parent["mmcs"]), _number(parent["mmcs_folded"])] if parent else ["", "-", "-"]
        for name in ("transferability", "top_logits", "bottom_logits", "top_tokens"):
            row.append("-" if own is None or own[name] is None else f"{own[name]:.1%}")
        kept.add_row(leg, *row, effects.get(leg, "-"))
    kept.caption, kept.caption_justify = (
        "MMCS: of the parent's latents with the leg's. See docs/run-directory.md.",
        "left",
    )
    if measures["dla"]:
        kept.caption += f" DLA: {measures['dla']['n_prompts']} prompts, {measures['dla']['prompts']}."
    title = "normalised transfer score: 0 is zero-shot, 1 is scratch"
    scored = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for name in ("leg", "zero-shot by", "scratch", "its tokens", "FVU", "CE score"):
        scored.add_column(name, justify="left" if name in ("leg", "zero-shot by", "scratch") else "right")
    for row in scores:
        values = [_number(row["fvu"]), _number(row["ce_loss_score"])]
        scored.add_row(row["leg"], row["method"], row["scratch"], format_count(row["scratch_tokens"]), *values)
    means = [row for row in measures["offsets"] or [] if row["metric"] == "fvu" and row["tokens"] is None]
    offsets = sorted({row["offset"] for row in means})
    title = "mean FVU by offset (layer used on − layer trained at), untrained"
    apart = Table(box=None, pad_edge=False, title=title, title_justify="left")
    apart.add_column("method")
    for offset in offsets:
        apart.add_column(f"{offset:+d}" if offset else "0", justify="right")
    for method in dict.fromkeys(row["method"] for row in means):
        found = {row["offset"]: row["mean"] for row in means if row["method"] == method}
        apart.add_row(method, *(_number(found.get(offset)) for offset in offsets))
    return [table for table in (kept, scored, apart) if table.row_count]


def estimate_text(expected: Estimate, endpoint: Endpoint, prices: tuple[float, float]) -> Text:
    """What an interpretation will take, before it is asked for."""
    known = f" ({expected.n_known:,} are answered already)" if expected.n_known else ""
    most = "no bound on" if expected.tokens_out < 0 else f"at most {expected.tokens_out:,}"
    lines = [
        f"{expected.n_latents:,} latents, {expected.n_requests:,} requests: {endpoint.model} at {endpoint.url}{known}",
        f"about {expected.tokens_in:,} tokens in (one for three bytes), {most} tokens out, repetitions aside",
    ]
    if any(prices):
        lines.append(f"at most ${expected.cost:.2f}, at ${prices[0]:g} and ${prices[1]:g} for a million tokens")
    return Text("\n".join(visible(line, 500) for line in lines))


def prompts_text(prompts: dict[str, list[dict[str, str]]]) -> Text:
    """One question of each kind, safe for a terminal."""
    lines = []
    for kind, messages in prompts.items():
        for message in messages:
            lines += [f"\n--- {kind}: {message['role']}", *message["content"].split("\n")]
    return Text("\n".join(visible(line, 100_000) if line[:1] != "\n" else line for line in lines))


def interpret_tables(document: dict[str, Any]) -> list[Table | Text]:
    """Scores of explanations by leg, and by where legs began: means over latents, ± standard error."""
    by_leg = Table(box=None, pad_edge=False, title="explanations: balanced accuracy", title_justify="left")
    for name in ("layer", "leg", "origin", "explained", "failed", "too rare", "detection", "fuzzing", "cost"):
        by_leg.add_column(name, justify="left" if name in ("leg", "origin") else "right")
    for leg in document["legs"]:
        began = f"{leg['origin']} ({escape(leg['parent'])})" if leg["parent"] else leg["origin"]
        counts = [str(leg[name]) for name in ("n_explained", "n_failed", "n_rare")]
        usd = "-" if leg["cost"]["usd"] is None else f"${leg['cost']['usd']:.4f}"
        by_leg.add_row(str(leg["layer"]), escape(leg["leg"]), began, *counts, *_scores(leg), usd)
    by_origin = Table(box=None, pad_edge=False, title="by origin", title_justify="left")
    for name in ("origin", "legs", "explained", "detection", "fuzzing"):
        by_origin.add_column(name, justify="left" if name == "origin" else "right")
    for row in document["origins"]:
        by_origin.add_row(row["origin"], str(row["n_legs"]), str(row["n_explained"]), *_scores(row))
    note = (
        "Means over latents ± standard error; 0.5 is chance. Detection: in which texts does it fire? Fuzzing: are "
        "the marked tokens those it fires on? Cost: of all answers these rest on, whenever they were paid for."
    )
    failed = sum(leg["n_failed_questions"] for leg in document["legs"])
    return [
        by_leg,
        Text(),
        by_origin,
        Text(note + (f" {failed} questions have no answer that counts." if failed else "")),
    ]


def _scores(row: dict[str, Any]) -> list[str]:
    shown = []
    for score in (row["detection"], row["fuzzing"]):
        error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.3f}"
        shown.append(_number(score["mean"]) + error)
    return shown


def _finished(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if not row["snapshot"]]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def circuit_tables(document: dict[str, Any]) -> list[Text | Table]:
    """Faithfulness and completeness of each leg's circuits, and of transferred legs minus those from scratch."""
    asked, sizes = document["asked"], document["asked"]["k"]
    head = (
        f"{visible(asked['task'])}: {document['model']} is right on {document['accuracy']:.1%} of {asked['n_prompts']} "
        f"prompts, mean logit difference {document['m']:.3g} ± {document['m_se']:.2g}. Circuits of K latents found on "
        f"{document['n_found_on']} prompts by {asked['method']}, judged on the other {document['n_judged_on']}."
    )
    titles = (
        "faithfulness: 1 is the model's",
        "completeness: 0 is best",
        "faithfulness: transferred − from scratch",
    )
    names = (("leg", "∅"), ("leg", "∅"), ("leg", "scratch"))
    tables = [Table(box=None, pad_edge=False, title=f"\n{title}", title_justify="left") for title in titles]
    for table, columns in zip(tables, names, strict=True):
        for name in (*columns, *(f"K = {size}" for size in sizes)):
            table.add_column(name, justify="left" if name in ("leg", "scratch") else "right")
    for row in document["legs"]:
        empty = f"{sum(row['m_empty']) / len(row['m_empty']):.2f}"
        for table, name in zip(tables, ("faithfulness", "completeness"), strict=False):
            table.add_row(row["leg"], empty, *(_with_error(circuit, name) for circuit in row["circuits"]))
    pairs = dict[tuple[str, str], list[str]]()
    for row in document["differences"]:
        name = (row["leg"] or "mean", row["scratch"] or f"all {row['kind']}")
        pairs.setdefault(name, []).append(_with_error(row, "faithfulness"))
    for name, cells in pairs.items():
        tables[2].add_row(*name, *cells)
    end = Text(
        "\n∅: mean logit difference with all latents ablated: each at its mean over prompts; the reconstruction "
    )
    end.append("error stays. ±: standard error over prompts.")
    return [Text(head), *(table for table in tables if table.row_count), end]


def _with_error(row: dict[str, Any], name: str) -> str:
    return "-" if row[name] is None else f"{row[name]:.2f} ± {row[f'{name}_se']:.2f}"


def plan_table(plan: Plan, reference: dict[int, float] | None = None) -> Table:
    """One row a leg: what is trained where, from whom, when, with how many tokens.

    With the FVU that each layer would have from scratch, predictions stand beside it.
    """
    table = Table(box=None, pad_edge=False)
    right = ("starts at", "tokens", "latents", "lr", "FVU", "ratio")
    for name in ("leg", "role", "from", "method", *right[: 6 if reference else 4]):
        table.add_column(name, justify="right" if name in right else "left")
    for leg in plan.legs:
        predicted = [""] * 2 if reference else []
        if reference and leg.goal.predicted_fvu:
            predicted = [f"{leg.goal.predicted_fvu:.4f}", f"{leg.goal.predicted_fvu / reference[leg.layer]:.3f}"]
        table.add_row(
            leg.id,
            leg.role if leg.role != "control" else f"control ({(leg.control_kind or '').replace('_', ' ')})",
            escape(leg.parent) or "scratch",
            f"{leg.method}{' + refit' if leg.refit_tokens else ''}" if leg.method else "",
            format_count(leg.fold_at),
            format_count(leg.budget_tokens),
            str(leg.dictionary.n_latents),
            f"{leg.schedule.lr:.1e}",
            *predicted,
        )
    return table


def plan_facts(plan: Plan, cost: Cost, seconds: dict[str, float] | None) -> Table:
    """What a plan takes."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("language model reads", f"{format_count(cost.lm_tokens)} tokens")
    table.add_row("SAEs train on", f"{format_count(cost.sae_samples)} activations, over {len(plan.legs)} legs")
    table.add_row(
        "operations",
        f"{flops(cost.flops)} executed ({flops(cost.flops_dense_equivalent)} if dense); "
        f"all layers from scratch: {flops(cost.flops_all_from_scratch)}",
    )
    if seconds:
        table.add_row(
            "time",
            f"{duration(seconds['total'])} here (language model {duration(seconds['lm'])}, "
            f"SAE steps {duration(seconds['steps'])}; from a short timing)",
        )
    table.add_row("memory", f"{cost.memory_bytes / 2**30:.2f} GiB of weights, training state and activations")
    table.add_row("disk", f"{cost.disk_bytes / 2**30:.2f} GiB")
    if cost.cache_bytes:
        table.add_row(
            "cache",
            f"up to {cost.cache_bytes / 2**30:.2f} GiB of activations in {escape(plan.recipe.data.cache)} "
            "(less what is there already, and what is read again)",
        )
    return table


def quality_table(summary: dict[str, Any]) -> Table:
    """A row for each leg, and its controls below it, layer by layer."""
    title = f"{escape(summary['model'])}: held-out quality of every leg"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    legs = summary["legs"]
    predicted = any(leg["predicted_fvu"] for leg in legs)
    columns = ["layer", "SAE", "tokens", "L0", "FVU", "ΔCE (nats)", "CE score", "alive"]
    for name in columns + ["predicted", "validation"] * predicted:
        table.add_column(name, justify="left" if name in ("layer", "SAE") else "right")
    shown = sorted((leg for leg in legs if leg["role"] != "control"), key=lambda leg: (leg["layer"], leg["module"]))
    for leg in shown:
        table.add_row(f"{leg['layer']}", *_quality(leg, _origin(leg), predicted), style="bold")
        for control in (other for other in legs if other["control_of"] == leg["id"]):
            kind = "equal tokens" if control["control_kind"] == "equal_tokens" else "full budget"
            table.add_row("", *_quality(control, f"  control: from scratch, {kind}", predicted), style="dim")
        for snapshot in leg["snapshots"]:
            table.add_row("", *_quality(snapshot, "  snapshot, mid-run", predicted), style="dim")
    return table


def _origin(leg: dict[str, Any]) -> str:
    if not leg["parent"]:
        return "from scratch"
    return f"{leg['method']}{' + refit' if leg['refit_tokens'] else ''} from {escape(leg['parent'])}"


def _quality(leg: dict[str, Any], origin: str, predicted: bool) -> list[str]:
    def number(name: str, digits: int) -> str:
        return "-" if leg.get(name) is None else f"{leg[name]:.{digits}f}"

    delta = number("delta_ce", 4)
    if leg.get("delta_ce_se") is not None:
        delta += f" ± {leg['delta_ce_se']:.4f}"
    alive = "-" if leg["frac_alive"] is None else f"{leg['frac_alive']:.1%}"
    tokens, own = format_count(leg["tokens"]), [number("l0", 1), number("fvu", 4), delta, number("ce_loss_score", 4)]
    return [origin, tokens, *own, alive, number("predicted_fvu", 4), number("validation_fvu", 4)][
        : 9 if predicted else 7
    ]


def cost_lines(summary: dict[str, Any]) -> list[Text]:
    """What the suite cost beside the same layers all from scratch."""
    cost = summary["cost"]
    layers = len({(leg["layer"], leg["module"]) for leg in summary["legs"]})
    seen = f"{format_count(cost['sae_samples'])} activations seen by SAEs"
    read = f"{format_count(cost['lm_tokens'])} tokens read by the language model"
    scratch = _seconds(cost["seconds_all_from_scratch_estimate"])
    lines = [
        f"This suite: {_seconds(cost['seconds'])}, {flops(cost['flops'])}, {seen}, {read}.",
        f"All {layers} layers from scratch at the full budget: {scratch} (estimated from the legs above that were), "
        f"{flops(cost['flops_all_from_scratch'])}.",
    ]
    if cost["controls"]["seconds"]:
        lines.append(
            f"Controls took another {_seconds(cost['controls']['seconds'])}, not counted above; nor is evaluation."
        )
    lines.append(
        "ΔCE: rise of the model's loss with the SAE in place, ± standard error over sequences. FVU: lower is better."
    )
    return [Text(line) for line in lines]


def _seconds(value: float | None) -> str:
    return "unknown time" if value is None or value != value else duration(value)


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(122.9), duration(4000), duration(36000)
    ('123 s', '67 min', '10.0 h')
    """
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def flops(value: float) -> str:
    """Operations, with a unit.

    >>> flops(2.1e13)
    '21 TFLOP'
    """
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e9:.3g} GFLOP"


# --- what judges said -------------------------------------------------------------------------------------------

_PUBLISHED = "Ghilardi et al. 2024, Pythia-160m: 83.6 % scratch, 88.1 % forward, 84.7 % backward; 32 features a layer."


def drawn_lines(key: dict[str, Any]) -> list[str]:
    """What a judging page holds, by origin, and which origin the run lacks; not for judges."""
    lines = []
    for origin in ("scratch", "forward", "backward"):
        legs = [item["leg"] for item in key["items"] if item["origin"] == origin]
        of = f"latents of {', '.join(sorted(set(legs)))}" if legs else "(there is no such leg)"
        lines.append(f"{origin:<9}{len(legs):>5} {of}")
    return [*lines, f"{len(key['items'])} latents of {key['model']}, those of seed {key['seed']}."]


def judging_tables(scores: dict[str, Any]) -> list[Table | Text]:
    """The share of latents that people find interpretable, by origin and layer, and how far judges agree."""
    title = f"{escape(scores['model'])}: share of latents found interpretable, with 95 % intervals"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for name in ("origin", "layer", "leg", "latents", "judged", "tied", "yes", "share", "interval"):
        table.add_column(name, justify="left" if name in ("origin", "leg") else "right")
    for total in scores["origins"]:
        table.add_row(total["origin"], "all", "", *_tallied(total), style="bold")
        for row in scores["layers"]:
            if row["origin"] == total["origin"]:
                table.add_row("", str(row["layer"]), escape(row["leg"]), *_tallied(row), style="dim")
    lines = []
    for row in scores["differences"]:
        layers, difference = ", ".join(map(str, row["layers"])) or "none", _share(row["difference"], "+")
        interval = f"{_share(row['low'], '+')} to {_share(row['high'], '+')}"
        lines.append(f"{row['origin']} − scratch, over the layers that have both ({layers}): {difference}, {interval}")
    for row in scores["judges"]:
        said = f"{row['n_yes']} yes, {row['n_no']} no, {row['n_skip']} skipped, {row['n_left']} left"
        lines.append(f"judge {visible(row['judge'])}: {said}; found {_share(row['share'])} interpretable")
    for row in scores["agreement"]:
        both = " and ".join(map(visible, row["judges"]))
        lines.append(
            f"{both} agree on {_share(row['raw'])} of the {row['n_latents']} that both judged; "
            f"Cohen's kappa {'-' if row['kappa'] is None else format(row['kappa'], '.2f')}"
        )
    return [table, Text(), *map(Text, [*lines, f"For comparison, another model and other judges: {_PUBLISHED}"])]


def _tallied(row: dict[str, Any]) -> list[str]:
    counts = [str(row[f"n_{name}"]) for name in ("latents", "judged", "tied", "interpretable")]
    return [*counts, _share(row["share"]), f"{_share(row['low'])} to {_share(row['high'])}"]


def _share(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1%}"


# --- one latent -------------------------------------------------------------------------------------------------

_BARS = " ▁▂▃▄▅▆▇█"
_VISIBLE = {"\n": "⏎", "\t": "⇥", " ": " "}
_LONGEST_TOKEN = 40


def visible(text: str, longest: int = _LONGEST_TOKEN) -> str:
    """A token's text with everything that a terminal would not show, or would obey, as something to see.

    >>> print(visible("a\\n\\x1b[2Jb\\u202e\\ud800"))
    a⏎\\x1b[2Jb\\u202e\ufffd
    """
    shown = []
    for character in text[:longest]:
        kind = unicodedata.category(character)
        if character in _VISIBLE:
            shown.append(_VISIBLE[character])
        elif kind == "Cs":
            shown.append("\ufffd")
        elif kind[0] in "CZ":
            shown.append(character.encode("unicode_escape").decode())
        else:
            shown.append(character)
    return "".join(shown) + ("…" if len(text) > longest else "")


def latent_view(document: dict[str, Any], *, colour: bool) -> Group:
    """One latent for the terminal: how often it fires, on what, for which tokens it speaks, and what became of it.

    Tokens are shaded by activation; without `colour` the strongest of each example stands between »«.
    """
    d, leg = document, document["leg"]
    fires = f"fires on {d['n_fired'] / d['n_tokens']:.3%} of {d['n_tokens']:,} held-out tokens ({d['n_fired']:,})"
    lines: list[Any] = [Text(f"{leg}, latent {d['latent']} (layer {d['layer']} of {d['model']})", style="bold")]
    if not d["n_fired"]:
        lines.append(Text(f"never fires on {d['n_tokens']:,} held-out tokens"))
    else:
        lines.append(Text(f"{fires}, max {d['max_activation']:.3g}, mean {d['mean_activation']:.3g} where it does"))
        lines += [_histogram(d["histogram"]), Text()]
        lines += [_example(example, d["max_activation"], colour) for example in d["examples"]]
    if d.get("interpretation"):
        said = d["interpretation"]
        scores = ", ".join(f"{kind} {_number(said[kind])}" for kind in ("detection", "fuzzing"))
        lines.append(Text(f"{visible(said['model'], 80)} explains it: {visible(said['explanation'], 500)} ({scores})"))
    lines.append(Text())
    for name, label in (("top_logits", "promotes  "), ("bottom_logits", "suppresses")):
        if name in d:
            tokens = "  ".join(f"'{visible(t['token'])}' {t['value']:+.2f}" for t in d[name])
            lines.append(Text(f"{label} {tokens}"))
    for side, found in d["similar"].items():
        latents = "  ".join(f"{other['latent']} ({other['cosine']:.2f})" for other in found["latents"])
        lines.append(Text(f"most similar {side}, in {found['leg']}: {latents}"))
    return Group(*lines, Text(), _lineage_table(d))


def _histogram(histogram: dict[str, Any]) -> Text:
    counts, first = histogram["counts"], histogram["first_edge"]
    used = [i for i, count in enumerate(counts) if count]
    most, counts = max(counts), counts[used[0] : used[-1] + 1]
    bars = "".join(_BARS[-(-8 * count // most)] for count in counts)
    low, high = (2 ** (first + edge / 2) for edge in (used[0], used[-1] + 1))
    return Text(f"activations {low:.3g} {bars} {high:.3g}, in steps of √2")


def _example(example: dict[str, Any], most: float, colour: bool) -> Text:
    strongest = example["position"] - example["start"]
    line = Text(f"{example['activations'][strongest]:8.3g}  ", no_wrap=True, overflow="ellipsis")
    for i, (token, activation) in enumerate(zip(example["tokens"], example["activations"], strict=True)):
        share = min(1.0, activation / most)
        style = f"black on rgb(255,{240 - round(110 * share)},{200 - round(200 * share)})" if activation > 0 else ""
        shown = visible(token)
        if i == strongest and not colour:
            shown = f"»{shown}«"
        line.append(shown, style=f"bold {style}" if i == strongest else style)
    return line


def _lineage_table(document: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, title="lineage, from layer to layer", title_justify="left")
    for name in ("layer", "leg", "latent", "decoder cosine", "encoder cosine", "correlation", "status"):
        table.add_column(name, justify="left" if name in ("leg", "status") else "right")
    for step in document["lineage"]:
        table.add_row(*_step(step), style="bold" if step["leg"] == document["leg"] else "")
    for step in document["relatives"]:
        table.add_row(*_step(step | {"leg": f"{step['leg']} ({step['kind']})"}), style="dim")
    return table


def _step(step: dict[str, Any]) -> list[str]:
    names = ("decoder_cosine", "encoder_cosine", "correlation")
    numbers = ["" if step[name] is None else f"{step[name]:z.3f}" for name in names]
    return [str(step["layer"]), escape(step["leg"]), str(step["latent"]), *numbers, step["status"] or ""]
