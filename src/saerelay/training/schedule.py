"""A leg's schedules: learning rate, warm-up of the penalty, checks of its goal. Functions of the leg's age alone."""

import math

from saerelay.planning.leg import Leg
from saerelay.planning.recipe import OptimizerSpec

FIRST_CHECK = 0.25
"""Share of the budget before which a goal is not checked."""
N_CHECKS = 16
"""Number of checks of a goal that would fit into a whole budget."""


def learning_rate(leg: Leg, optimizer: OptimizerSpec, budget: int, age: int) -> float:
    """Learning rate of a leg's step at `age` under a budget: linear warm-up, constant, linear decay to zero."""
    rise = 1.0
    if optimizer.warmup:
        rise = (age + leg.schedule.batch_tokens) / (optimizer.warmup * budget)
    fall = 1.0
    if optimizer.decay:
        fall = (budget - age) / (optimizer.decay * budget)
    return leg.schedule.lr * min(1.0, rise, fall)


def parameter_rates(optimizer: OptimizerSpec, width: int) -> dict[str, float]:
    """Rates of the latents' parameters, as shares of the learning rate, which is the decoder's.

    By default the biases' rate does not fall with the width, as it should not (Yang et al. 2022, table 8).
    """
    bias = math.sqrt(width) / 5 if optimizer.bias_lr == "auto" else optimizer.bias_lr
    return {"W_enc": optimizer.encoder_lr, "b_enc": bias, "threshold": bias, "r_mag": 1.0, "W_dec": 1.0}


def penalty_warmth(optimizer: OptimizerSpec, budget: int, age: int) -> float:
    """Share of the sparsity penalty's weight in force at `age`: a linear warm-up."""
    whole = optimizer.sparsity_warmup * budget
    return min(1.0, age / whole) if whole else 1.0


def goal_is_due(leg: Leg, optimizer: OptimizerSpec, batch_tokens: int, age: int) -> bool:
    """Whether a leg's goal is checked at `age`: from a quarter of its budget on, until its decay begins."""
    if not leg.goal.goal_fvu:
        return False
    budget = leg.budget_tokens
    every = batch_tokens * max(1, budget // (N_CHECKS * batch_tokens))
    first = max(FIRST_CHECK, optimizer.warmup, optimizer.sparsity_warmup) * budget
    last = (1 - optimizer.decay) * budget
    return age % every == 0 and first <= age < last
