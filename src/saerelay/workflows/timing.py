"""Predict how long a plan takes on this machine, from a forward pass and a few steps of each shape of leg.

For `saerelay plan --timing`.
"""

import time
from collections.abc import Callable, Sequence

import torch

from saerelay.lm.model import LanguageModel
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.planning.ranks import Speeds
from saerelay.training.device import STEPS_BEFORE_RECORDING
from saerelay.training.engine import Trainee
from saerelay.training.state import first_state

REPEATS = 5


def measured_speeds(plans: Sequence[Plan], model: LanguageModel) -> list[Speeds]:
    """Measure how fast this machine runs some plans for one model."""
    seconds_by_shape: dict[tuple, float] = {}
    speeds = []
    for plan in plans:
        steps = {}
        for leg in plan.legs:
            widths = (plan.facts.width(leg.site), plan.facts.width(leg.site_out))
            shape = (*widths, leg.is_transcoder, leg.schedule.batch_tokens, leg.dictionary)
            if shape not in seconds_by_shape:
                seconds_by_shape[shape] = _step_seconds(plan, leg, model.device)
            steps[leg.id] = seconds_by_shape[shape]
        speeds.append(Speeds(lm=_forward_seconds(plan, model), steps=steps))
    return speeds


def plan_seconds(plan: Plan, speeds: Speeds) -> dict[str, float]:
    """Return the seconds that a plan should take: for the language model, for training steps, and in total.

    The language model stops at the deepest open site of each block.
    """
    lm = 0.0
    for n_blocks, sites in plan.stretches():
        if sites:
            lm += n_blocks * plan.block_tokens * speeds.lm * plan.share_of_depth(sites)
    steps = sum(leg.budget_tokens * speeds.steps[leg.id] for leg in plan.legs)
    return {"lm": lm, "steps": steps, "total": lm + steps}


def _forward_seconds(plan: Plan, model: LanguageModel) -> float:
    """Measure the seconds per token of the language model, up to the plan's deepest site."""
    context = plan.recipe.data.context
    shape = (max(1, plan.lm_batch_tokens // context), context)
    tokens = torch.randint(plan.facts.tokens.vocab_size, shape, device=model.device)
    seconds = _median_seconds(lambda: model.harvest(tokens, [plan.deepest]), model.device)
    return seconds / tokens.numel()


def _step_seconds(plan: Plan, leg: Leg, device: torch.device) -> float:
    """Measure the seconds per token of a leg's training step."""
    batch = leg.schedule.batch_tokens
    x = torch.randn(4 * batch, plan.facts.width(leg.site), device=device)
    target = None
    if leg.is_transcoder:
        target = torch.randn(4 * batch, plan.facts.width(leg.site_out), device=device)
    probe = leg.changed(budget_tokens=10**9).changed(hop=None)
    train = plan.recipe.train
    trainee = Trainee(probe, train, first_state(probe, train, x, target=target))
    goal = None if target is None else target[:batch]
    if device.type == "cuda":  # until the step is recorded as a CUDA graph
        for _ in range(STEPS_BEFORE_RECORDING + 1):
            trainee.step(x[:batch], goal)
    return _median_seconds(lambda: trainee.step(x[:batch], goal), device) / batch


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a few calls, after one call that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        _finish(device)
        began = time.perf_counter()
        call()
        _finish(device)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[REPEATS // 2]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
