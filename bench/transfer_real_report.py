"""What `transfer_real.py` measured, as docs/transfer-real.json and as tables in docs/transfer.md."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any, get_args

from scipy.stats import spearmanr

from saerelay.files import write_json, write_text
from saerelay.runs.dictionaries import read_info
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.quality import LegSummary, Summary
from saerelay.sae.spec import Method
from saerelay.spec import format_count
from saerelay.views.text import flops

METHODS = get_args(Method)
SUITES = (
    "scratch-twice",
    "hub",
    "shared-untrained",
    "shared",
    "two-shared",
    "alternate",
    "alternate-quarter",
    "alternate-twice",
    "chain",
    "auto",
)


@dataclass(frozen=True)
class Hop:
    """A hop between neighbours, as it was measured."""

    part: int
    """Which part of the study it belongs to."""
    seed: int
    source: int
    target: int
    method: str
    tokens: int
    delta_ce: float
    error: float
    chosen: str
    """The method that was taken, where several were tried."""

    @property
    def is_backward(self) -> bool:
        """Whether it comes from the layer above."""
        return self.source > self.target


@dataclass(frozen=True)
class Results:
    """All that is finished."""

    scratch: dict[tuple[int, int, int, int], LegSummary]
    """By part, seed, layer and tokens."""
    hops: list[Hop]
    random: dict[int, float]
    """ΔCE of a random dictionary, refitted, by layer."""
    suites: dict[tuple[str, int], Summary]
    """By name and seed."""
    legs: list[LegSummary]
    """Every SAE that was measured, whatever its job; no random dictionaries."""

    @property
    def full(self) -> int:
        """The full budget."""
        return max(tokens for *_, tokens in self.scratch)

    @property
    def equal(self) -> int:
        """As many tokens as the usual hop looks at."""
        return min(tokens for *_, tokens in self.scratch)

    @property
    def seeds(self) -> list[int]:
        """Seeds whose legs from scratch are there."""
        return sorted({seed for _, seed, *_ in self.scratch})

    @property
    def whole_seeds(self) -> set[int]:
        """Seeds whose hops were measured in all parts, and so at every layer."""
        parts = {hop.part for hop in self.hops}
        measured = {(hop.part, hop.seed) for hop in self.hops}
        return {seed for seed in self.seeds if all((part, seed) in measured for part in parts)}

    def where(self, keep: Callable[[int, int], bool]) -> "Results":
        """The hops and legs from scratch whose part and seed are kept."""
        hops = [hop for hop in self.hops if keep(hop.part, hop.seed)]
        return replace(self, hops=hops, scratch={key: leg for key, leg in self.scratch.items() if keep(*key[:2])})

    def control(self, hop: Hop, tokens: int) -> LegSummary:
        """The leg from scratch at a hop's target, of the same part and seed."""
        return self.scratch[hop.part, hop.seed, hop.target, tokens]

    def ratio(self, hop: Hop) -> float:
        """ΔCE over that of the full budget from scratch."""
        return hop.delta_ce / delta(self.control(hop, self.full))


def delta(leg: LegSummary) -> float:
    """ΔCE of a leg."""
    assert leg.delta_ce is not None
    return leg.delta_ce


def read(parts: Sequence[Path]) -> Results:
    """Everything that is finished, in all parts of the study."""
    scratch: dict[tuple[int, int, int, int], LegSummary] = {}
    hops: list[Hop] = []
    legs: list[LegSummary] = []
    suites: dict[tuple[str, int], Summary] = {}
    random: dict[int, float] = {}
    found = [(part, path) for part, out in enumerate(parts) for path in sorted(out.glob("*/summary.json"))]
    for part, path in found:
        job = path.parent.name
        summary = Summary.load(path)
        if job.startswith("random"):
            random |= {leg.layer: delta(leg) for leg in summary.legs}
            continue
        legs += summary.legs
        seed = int(job.rpartition("-s")[2]) if re.search(r"-s\d$", job) else 0
        if job.startswith("scratch"):
            scratch |= {(part, seed, leg.layer, leg.tokens): leg for leg in summary.legs}
        elif job.startswith(("hops", "budgets")):
            for leg in summary.legs:
                hops += read_hops(RunDirectory(path.parent), part, seed, leg)
        elif job.startswith("suite"):
            suites[re.sub(r"-s\d$", "", job.removeprefix("suite-")), seed] = summary
    hops = [hop for hop in hops if (hop.part, hop.seed) in {key[:2] for key in scratch}]
    return Results(scratch, hops, random, suites, legs)


def read_hops(run: RunDirectory, part: int, seed: int, leg: LegSummary) -> Iterator[Hop]:
    """A leg from a neighbour, and its snapshots; its id is L5-L6-METHOD-TOKENS.

    What `budgets` trains by the method that was chosen counts as `auto`.
    """
    source, target, method, _ = leg.id.split("-")
    facts = read_info(run.leg(leg.id)).hop
    chosen = facts.method if facts else method
    if run.root.name.startswith("budgets"):
        method = "auto"
    for version in (leg, *leg.snapshots):
        assert version.delta_ce is not None
        yield Hop(
            part=part,
            seed=seed,
            source=int(source[1:]),
            target=int(target[1:]),
            method=method,
            tokens=version.tokens,
            delta_ce=version.delta_ce,
            error=version.delta_ce_se or math.nan,
            chosen=chosen,
        )


# --- tables ---------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def zero_shot_table(results: Results) -> str:
    """ΔCE of every method without training, pair by pair, at seed 0; the one that was chosen is bold."""
    zero = {(h.source, h.target, h.method): h for h in results.hops if h.seed == 0 and h.tokens == 0}
    rows = []
    automatic = [hop for hop in usual_hops(results, 0) if hop.seed == 0]
    for hop in sorted(automatic, key=lambda hop: (hop.target, hop.source)):
        row = [f"{hop.source} → {hop.target}"]
        for method in METHODS:
            text = f"{zero[hop.source, hop.target, method].delta_ce:.3f}"
            row.append(f"**{text}**" if hop.chosen == method else text)
        row.append(f"{results.random[hop.target]:.2f}" if hop.target in results.random else "-")
        for tokens in (results.equal, results.full):
            row.append(f"{delta(results.control(hop, tokens)):.3f}")
        rows.append(row)
    names = ["copy", *METHODS[1:], "random dictionary"]
    names += [f"from scratch, {format_count(tokens)}" for tokens in (results.equal, results.full)]
    return table(["hop", *names], rows)


def choice_regret(results: Results) -> dict[str, float]:
    """How much worse than the best method the chosen one is, zero-shot: over all pairs, and at worst."""
    zero = {(h.source, h.target, h.method): h.delta_ce for h in results.hops if h.seed == 0 and h.tokens == 0}
    chosen = {(h.source, h.target): h.chosen for h in results.hops if h.seed == 0 and h.method == "auto"}
    regret = {}
    for (source, target), method in chosen.items():
        if method in METHODS:
            best = min(zero[source, target, other] for other in METHODS)
            regret[f"{source}-{target}"] = zero[source, target, method] / best
    return regret


def usual_hops(results: Results, tokens: int) -> list[Hop]:
    """What `auto` gave after some tokens."""
    return [hop for hop in results.hops if hop.method == "auto" and hop.tokens == tokens]


def better_neighbours(results: Results, hops: Sequence[Hop]) -> list[Hop]:
    """Of both directions to a layer, the hop with the lower ratio, seed by seed."""
    best: dict[tuple[int, int], Hop] = {}
    for hop in hops:
        key = (hop.seed, hop.target)
        if key not in best or results.ratio(hop) < results.ratio(best[key]):
            best[key] = hop
    return list(best.values())


def budget_rows(results: Results) -> list[dict[str, Any]]:
    """ΔCE over that of the full budget from scratch, after as many tokens as were tried: geometric means."""
    rows = []
    targets = {h.target for h in results.hops}
    for tokens in sorted({h.tokens for h in results.hops}):
        hops = usual_hops(results, tokens)
        if {h.target for h in hops} != targets:
            continue  # not measured at every layer
        better = better_neighbours(results, hops)
        worse = [h for h in better if h.delta_ce > delta(results.control(h, results.full)) + 2 * h.error]
        beats_equal = [h for h in better if h.delta_ce < delta(results.control(h, results.equal))]
        rows.append(
            {
                "tokens": tokens,
                "seeds": sorted({h.seed for h in hops}),
                "forward": geometric_mean(results.ratio(h) for h in hops if not h.is_backward),
                "backward": geometric_mean(results.ratio(h) for h in hops if h.is_backward),
                "better": geometric_mean(results.ratio(h) for h in better),
                "worst": max(results.ratio(h) for h in better),
                "n": len(better),
                "worse_by_two_errors": len(worse),
                "better_than_equal_tokens": len(beats_equal),
            }
        )
    return rows


def budget_table(results: Results) -> str:
    """The same for people, with training from scratch on as many tokens as the usual hop looks at."""
    rows = []
    for row in budget_rows(results):
        share = row["tokens"] / results.full
        name = "no training" if not row["tokens"] else f"+ {format_count(row['tokens'])} (1/{round(1 / share)})"
        numbers = [f"{row[key]:.2f}" for key in ("forward", "backward", "better", "worst")]
        counts = [f"{row[key]} of {row['n']}" for key in ("worse_by_two_errors", "better_than_equal_tokens")]
        rows.append([name, str(len(row["seeds"])), *numbers, *counts])
    equal = [
        delta(leg) / delta(results.scratch[part, seed, layer, results.full])
        for (part, seed, layer, tokens), leg in results.scratch.items()
        if tokens == results.equal
    ]
    name = f"from scratch, {format_count(results.equal)}"
    rows.append(
        [name, str(len(results.seeds)), "-", "-", f"{geometric_mean(equal):.2f}", f"{max(equal):.2f}", "-", "-"]
    )
    columns = ["", "seeds", "forward", "backward", "better neighbour", "its worst layer"]
    columns += ["worse by two errors", "better than scratch with equal tokens"]
    return table(columns, rows)


def layer_table(results: Results) -> str:
    """ΔCE over that of the full budget from scratch, layer by layer, from the better neighbour; means over seeds."""
    layers = sorted({hop.target for hop in results.hops})
    rows = []
    for tokens in (0, max(hop.tokens for hop in results.hops if hop.part > 0)):
        better = better_neighbours(results, usual_hops(results, tokens))
        means = [geometric_mean(results.ratio(hop) for hop in better if hop.target == layer) for layer in layers]
        name = f"+ {format_count(tokens)}" if tokens else "no training"
        rows.append([name, *(f"{mean:.2f}" for mean in means)])
    return table(["layer", *map(str, layers)], rows)


def suite_rows(results: Results) -> list[dict[str, Any]]:
    """What whole suites took, and how good they are, beside every layer from scratch with the same seed."""
    rows = []
    # A suite whose roots train on each block twice compares itself with roots from scratch that do so, too.
    scratch = max((summary.cost.from_scratch for summary in results.suites.values()), key=lambda cost: cost.flops)
    for name in SUITES:
        seeds = sorted(seed for suite, seed in results.suites if suite == name)
        if not seeds:
            continue
        ratios: list[float] = []
        n_worse = 0
        for seed in seeds:
            for leg in results.suites[name, seed].suite:
                control = delta(results.scratch[0, seed, leg.layer, results.full])
                ratios.append(delta(leg) / control)
                n_worse += delta(leg) > max(1.05 * control, control + (leg.delta_ce_se or 0.0))
        cost = results.suites[name, seeds[0]].cost
        survey = cost.survey
        samples = cost.sae_samples + (survey.sae_samples if survey else 0)
        lm_tokens = cost.lm_tokens + (survey.lm_tokens if survey else 0)
        operations = cost.flops + (survey.flops if survey else 0.0)
        rows.append(
            {
                "suite": name,
                "seeds": seeds,
                "samples": samples,
                "samples_share": samples / scratch.sae_samples,
                "lm_tokens": lm_tokens,
                "lm_tokens_share": lm_tokens / scratch.lm_tokens,
                "flops": operations,
                "flops_share": operations / scratch.flops,
                "ratio": geometric_mean(ratios),
                "worst": max(ratios),
                "worse": n_worse,
                "n": len(ratios),
            }
        )
    return rows


def suite_table(results: Results) -> str:
    """The same for people."""
    rows = []
    for row in suite_rows(results):
        rows.append(
            [
                row["suite"],
                str(len(row["seeds"])),
                f"{format_count(row['samples'])} ({row['samples_share']:.2f})",
                f"{format_count(row['lm_tokens'])} ({row['lm_tokens_share']:.2f})",
                f"{flops(row['flops'])} ({row['flops_share']:.2f})",
                f"{row['ratio']:.2f}",
                f"{row['worst']:.2f}",
                f"{row['worse']} of {row['n']}",
            ]
        )
    columns = ["suite", "seeds", "samples (÷ scratch)", "LM tokens", "operations", "ΔCE ratio", "worst layer"]
    return table([*columns, "worse by more than 5% and an error"], rows)


def correlations(results: Results) -> dict[int, dict[str, float]]:
    """Rank correlation of cheap measures with ΔCE over all SAEs of a layer."""
    found = {}
    for layer in sorted({leg.layer for leg in results.legs}):
        legs = [leg for leg in results.legs if leg.layer == layer]
        if len(legs) >= 8:
            deltas = [delta(leg) for leg in legs]
            names = ("balanced_fvu", "fvu")
            found[layer] = {name: float(spearmanr([getattr(leg, name) for leg in legs], deltas)[0]) for name in names}
            found[layer]["n"] = len(legs)
    return found


def correlation_table(results: Results) -> str:
    """The same for people."""
    found = correlations(results)
    rows = [
        ["SAEs", *(str(int(row["n"])) for row in found.values())],
        ["balanced FVU", *(f"{row['balanced_fvu']:.2f}" for row in found.values())],
        ["FVU", *(f"{row['fvu']:.2f}" for row in found.values())],
    ]
    return table(["layer", *map(str, found)], rows)


def report(parts: Sequence[Path], docs: Path) -> None:
    """Write the numbers and the tables."""
    results = read(parts)
    first_part = results.where(lambda part, _: part == 0)
    every_layer = results.where(lambda _, seed: seed in results.whole_seeds)
    numbers = {
        "full": results.full,
        "equal": results.equal,
        "seeds": results.seeds,
        "hops": [vars(hop) for hop in results.hops],
        "scratch": [
            {
                "part": part,
                "seed": seed,
                "layer": layer,
                "tokens": tokens,
                "delta_ce": delta(leg),
                "balanced_fvu": leg.balanced_fvu,
            }
            for (part, seed, layer, tokens), leg in sorted(results.scratch.items())
        ],
        "random": results.random,
        "budgets": budget_rows(first_part),
        "budgets_all_layers": budget_rows(every_layer),
        "choice_over_best": choice_regret(results),
        "suites": suite_rows(results),
        "rank_correlations": correlations(results),
    }
    write_json(docs / "transfer-real.json", numbers)
    tables = {
        "real-zero-shot": zero_shot_table(results),
        "real-budgets": budget_table(first_part),
        "real-budgets-all": budget_table(every_layer),
        "real-layers": layer_table(every_layer),
        "real-suites": suite_table(results),
        "real-correlations": correlation_table(results),
    }
    write_tables(docs / "transfer.md", tables)


def report_suites(out: Path, docs: Path) -> None:
    """Write what whole suites of all layers took and gave: a study of its own, of `scratch` and `suite` jobs."""
    results = read([out])
    layers = sorted({layer for _, _, layer, _ in results.scratch})
    numbers = {"full": results.full, "layers": layers, "suites": suite_rows(results)}
    write_json(docs / "transfer-real-suites.json", numbers)
    write_tables(docs / "transfer.md", {"real-suites-all": suite_table(results)})


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put tables between their marks in a page."""
    text = page.read_text(encoding="utf-8")
    for name, made in tables.items():
        pattern = rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)"
        text = re.sub(pattern, lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text, flags=re.DOTALL)
    write_text(page, text)
