"""The document about a whole suite: the quality of every leg, and the cost of the suite."""

import math
from collections.abc import Mapping

from saerelay.analysis.metrics import held_out
from saerelay.analysis.similarity import share_found_again
from saerelay.data.corpus import Corpus
from saerelay.planning.cost import Cost, plan_cost
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.planning.survey import Survey, SurveyCost
from saerelay.runs.documents.cost import ControlCost, ScratchCost, SuiteCost
from saerelay.runs.documents.quality import (
    Evaluation,
    EvaluationMetrics,
    LegSummary,
    Metrics,
    SnapshotSummary,
    Summary,
)
from saerelay.runs.documents.training import DictionaryInfo, RunCost
from saerelay.runs.suite import PublishedSuite

NO_COST = Cost(
    lm_tokens=0,
    sae_samples=0,
    flops=0.0,
    lm_flops=0.0,
    flops_dense_equivalent=0.0,
    memory_bytes=0.0,
    disk_bytes=0.0,
    cache_bytes=0.0,
)
"""The cost of nothing."""


def summarise(suite: PublishedSuite, corpus: Corpus) -> Summary:
    """Return the content of summary.json, from the eval/<id>.json of all published legs, which must exist."""
    facts = suite.plan.facts
    in_suite = {leg.id for leg in suite.one_per_site}
    evaluation = Evaluation.load(suite.directory.evaluation(suite.legs[0].id))
    n_sequences = len(held_out(suite.plan, corpus.test, evaluation.asked.tokens))
    return Summary(
        model=facts.name,
        revision=facts.revision,
        data=corpus.facts.source,
        legs=[leg_summary(suite, leg, in_suite=leg.id in in_suite) for leg in suite.legs],
        left_out=evaluation.metrics.left_out,
        n_sequences=n_sequences,
        n_documents=corpus.facts.test_documents if n_sequences == len(corpus.test) else 0,
        cost=suite_cost(suite, corpus),
    )


def leg_summary(suite: PublishedSuite, leg: Leg, *, in_suite: bool) -> LegSummary:
    """Return a leg's row."""
    evaluation = Evaluation.load(suite.directory.evaluation(leg.id))
    info = suite.info(leg)
    first = suite.plan.first_of(leg)
    successor = suite.successor(leg)
    repeat_of = suite.plan.repeat_of(leg)
    snapshots = []
    for age, metrics in sorted(evaluation.snapshots.items()):
        snapshots.append(SnapshotSummary(tokens=age, **shown_metrics(metrics)))
    return LegSummary(
        id=leg.id,
        role=leg.role,
        control_of=(leg.control_of if successor else suite.compared_with(leg)) or None,
        control_kind=leg.control_kind,
        layer=leg.layer,
        module=leg.module,
        module_out=leg.module_out,
        architecture=leg.dictionary.architecture,
        method=suite.method(leg),
        parent=leg.parent or None,
        n_latents=leg.dictionary.n_latents,
        target_l0=leg.dictionary.l0,
        lr=leg.schedule.lr if info.lr is None else info.lr,
        seed=leg.seed,
        repeat_of=repeat_of or None,
        found_again=_found_again(suite, leg, repeat_of),
        origin=suite.origin(leg),
        made=suite.made(leg),
        continued_by=successor.id if successor else None,
        continues=None if first == leg else first.id,
        in_suite=in_suite,
        tokens=info.tokens,
        tokens_before=suite.tokens_before(leg),
        moment_tokens=leg.moment_tokens,
        refit_tokens=leg.refit_tokens,
        seconds=info.seconds,
        goal_fvu=leg.goal.goal_fvu,
        predicted_fvu=leg.goal.predicted_fvu,
        validation_fvu=info.validation_fvu,
        n_eval_tokens=evaluation.metrics.n_tokens,
        snapshots=snapshots,
        **shown_metrics(evaluation.metrics),
    )


def _found_again(suite: PublishedSuite, leg: Leg, repeat_of: str) -> float | None:
    """Return the share of a repeat's latents that the leg it repeats has as well; None for other legs."""
    if repeat_of not in set(suite):
        return None
    return share_found_again(suite.dictionary(leg).W_dec, suite[repeat_of].W_dec)


def shown_metrics(metrics: EvaluationMetrics) -> dict[str, float | None]:
    """Return the metrics that summary.json and matrix.json show, by name."""
    return {name: getattr(metrics, name) for name in Metrics.model_fields}


def suite_cost(suite: PublishedSuite, corpus: Corpus) -> SuiteCost:
    """Return the cost of the suite, of its controls and repeats separately, and of all layers trained from scratch.

    Several ranks train legs at the same time, so that each leg takes its share of the run's time.
    """
    infos = {leg.id: suite.info(leg) for leg in suite.legs}
    run = RunCost.load_if_any(suite.directory.cost)
    plan = plan_so_far(suite, {leg_id: info.tokens for leg_id, info in infos.items()})
    everything = plan_cost(plan)
    cost = NO_COST
    ids_of_suite: set[str] = set()
    if suite.final_legs:
        plan_of_suite = plan.without_controls()
        cost = plan_cost(plan_of_suite)
        ids_of_suite = {leg.id for leg in plan_of_suite.legs}

    n_ranks = run.ranks if run else 1
    control_seconds = sum(info.seconds for leg_id, info in infos.items() if leg_id not in ids_of_suite) / n_ranks
    return SuiteCost(
        lm_tokens=cost.lm_tokens,
        lm_tokens_held_out=run.positions.held_out if run else 0,
        lm_tokens_unique=min(cost.lm_tokens, corpus.train.size),
        survey=survey_cost(suite),
        sae_samples=cost.sae_samples,
        flops=cost.flops,
        lm_flops=cost.lm_flops,
        flops_dense_equivalent=cost.flops_dense_equivalent,
        seconds=(run.seconds.total if run else math.nan) - control_seconds,
        processor_seconds=run.seconds.processor if run else None,
        seconds_lm=run.seconds.lm if run else math.nan,
        from_scratch=scratch_cost(suite, plan, infos, run, everything.lm_flops),
        controls=ControlCost(
            sae_samples=everything.sae_samples - cost.sae_samples,
            flops=everything.flops - cost.flops,
            seconds=control_seconds,
        ),
    )


def scratch_cost(
    suite: PublishedSuite, plan: Plan, infos: Mapping[str, DictionaryInfo], run: RunCost | None, lm_flops: float
) -> ScratchCost:
    """Return the cost of training all layers of a plan from scratch, beside a run whose language model took `lm_flops`.

    The time is an estimate: for every layer, the time per token of the legs that were trained from scratch, plus the
    time of the language model's operations, at the speed that the run had.
    """
    root_tokens = plan.recipe.plan.root_tokens
    cost = NO_COST
    n_legs = 0
    if suite.final_legs:
        all_from_scratch = plan.all_from_scratch()
        legs = [leg for leg in all_from_scratch.legs if leg.id in infos]
        cost = plan_cost(all_from_scratch.changed(legs=legs))
        n_legs = len(legs)

    seconds_per_leg = math.nan
    trained_from_scratch = [infos[leg.id] for leg in suite.legs if not leg.parent]
    if trained_from_scratch:
        n_ranks = run.ranks if run else 1
        seconds = sum(info.seconds for info in trained_from_scratch) / n_ranks
        tokens = sum(info.tokens for info in trained_from_scratch)
        seconds_per_leg = root_tokens * seconds / tokens
    lm_seconds = run.seconds.lm if run else math.nan
    return ScratchCost(
        tokens=root_tokens,
        reuse=plan.recipe.plan.root_reuse,
        lm_tokens=cost.lm_tokens,
        sae_samples=cost.sae_samples,
        flops=cost.flops,
        lm_flops=cost.lm_flops,
        seconds_estimate=seconds_per_leg * n_legs + lm_seconds * cost.lm_flops / lm_flops,
    )


def plan_so_far(suite: PublishedSuite, trained: Mapping[str, int]) -> Plan:
    """Return the plan as it was run: the published legs, with the tokens on which they were `trained`, by id.

    A parent that is not published counts up to where its child began.
    """
    tokens = dict(trained)
    for leg in suite.legs:
        while leg.hop and suite.plan.has(leg.parent) and leg.parent not in trained:
            tokens[leg.parent] = max(tokens.get(leg.parent, 0), leg.hop.fork_at_tokens)
            leg = suite.plan.leg(leg.parent)
    ended = suite.plan.ended_after(tokens)
    return ended.changed(legs=[leg for leg in ended.legs if leg.id in tokens])


def survey_cost(suite: PublishedSuite) -> SurveyCost | None:
    """Return the cost of the survey behind a run; None without a survey."""
    path = suite.directory.survey
    return Survey.load(path).cost if path.is_file() else None
