"""The document of a whole suite: quality of every leg, and the bill."""

import math
from typing import Any

from saerelay.data.corpus import Corpus
from saerelay.files import read_json
from saerelay.planning.cost import plan_cost
from saerelay.planning.survey import Survey
from saerelay.runs.suite import PublishedSuite

SCHEMA_VERSION = 1
SHOWN = (
    "l0 l1 fvu explained_variance mse cossim l2_ratio delta_ce delta_ce_se ce_loss_score ce_loss_without_sae "
    "ce_loss_with_sae ce_loss_with_ablation kl_div_score kl_div_with_sae kl_div_with_ablation frac_alive"
).split()


def summary(suite: PublishedSuite) -> dict[str, Any]:
    """The document of `summary.json` and `saerelay eval --json`; see docs/run-directory.md."""
    plan, paths = suite.plan, suite.directory
    legs = []
    for leg in suite.legs:
        document = read_json(paths.evaluation(leg.id))
        info = suite.info(leg)
        legs.append(
            {
                "id": leg.id,
                "role": leg.role,
                "control_of": leg.control_of or None,
                "control_kind": leg.control_kind or None,
                "layer": leg.layer,
                "module": leg.module,
                "architecture": leg.dictionary.architecture,
                "method": leg.method,
                "parent": leg.parent or None,
                "tokens": info.tokens,
                "moment_tokens": leg.moment_tokens,
                "refit_tokens": leg.refit_tokens,
                "n_latents": leg.dictionary.n_latents,
                "lr": info.lr,
                "seed": leg.seed,
                "seconds": info.seconds,
                "goal_fvu": leg.goal_fvu,
                "predicted_fvu": leg.predicted_fvu,
                "validation_fvu": info.validation_fvu,
                "n_eval_tokens": document["metrics"]["n_tokens"],
            }
            | {name: document["metrics"].get(name) for name in SHOWN}
            | {
                "snapshots": [
                    {"tokens": int(age), **{name: metrics.get(name) for name in SHOWN}}
                    for age, metrics in sorted(document["snapshots"].items(), key=lambda item: int(item[0]))
                ]
            }
        )
    return {
        "schema": SCHEMA_VERSION,
        "model": plan.facts.name,
        "revision": plan.facts.revision,
        "data": Corpus.open(paths.tokens).facts.source,
        "legs": legs,
        "cost": cost(suite, {leg["id"]: leg["seconds"] for leg in legs}, {leg["id"]: leg["tokens"] for leg in legs}),
    }


def cost(suite: PublishedSuite, seconds: dict[str, float], tokens: dict[str, int]) -> dict[str, Any]:
    """What the suite took, without its controls, which are counted apart, and what all layers from scratch would have.

    `seconds` are those of each leg's own steps, `tokens` those it saw before it ended. The wall-clock of all layers
    from scratch is an estimate from the legs that were trained from scratch, and the language model's time per token.
    """
    plan, paths = suite.plan.ended_after(tokens), suite.directory
    plain, everything = plan_cost(plan.without_controls()), plan_cost(plan)
    took = read_json(paths.cost) if paths.cost.is_file() else {}
    spent, positions = took.get("seconds", {"total": math.nan, "lm": math.nan}), took.get("positions", {})
    controls = sum(seconds[leg.id] for leg in suite.legs if leg.role == "control")
    scratch = [leg.id for leg in suite.legs if not leg.parent]
    sites = {leg.site for leg in plan.legs}
    n_seen = sum(tokens[leg_id] for leg_id in scratch)
    each = plan.run.plan.root_tokens * sum(seconds[leg_id] for leg_id in scratch) / n_seen if scratch else math.nan
    share = min(1.0, plan.run.plan.root_tokens / everything.lm_tokens)
    return {
        "lm_tokens": plain.lm_tokens,
        "lm_tokens_held_out": positions.get("held_out", 0),
        "survey": Survey.load(paths.survey).cost.model_dump() if paths.survey.is_file() else None,
        "lm_tokens_unique": min(plain.lm_tokens, Corpus.open(paths.tokens).train.size),
        "sae_samples": plain.sae_samples,
        "flops": plain.flops,
        "flops_dense_equivalent": plain.flops_dense_equivalent,
        "flops_all_from_scratch": plain.flops_all_from_scratch,
        "seconds": spent["total"] - controls,
        "seconds_lm": spent["lm"],
        "seconds_all_from_scratch_estimate": each * len(sites) + share * spent["lm"],
        "controls": {
            "sae_samples": everything.sae_samples - plain.sae_samples,
            "flops": everything.flops - plain.flops,
            "seconds": controls,
        },
    }
