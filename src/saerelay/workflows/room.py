"""Whether this machine has room for a plan: memory for its training state and its blocks, disk for what it writes.

`settle` asks for memory while it compiles a plan; `launch` asks for disk before it takes the run's directory.
"""

import os
import shutil

import torch

from saerelay.errors import PlanError, RunDirectoryError
from saerelay.planning.cost import disk_bytes
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.runs.directory import RunDirectory, read_plan


def memory_allowed(recipe: Recipe, facts: ModelFacts) -> float:
    """Return the bytes that the training state of all live legs may take."""
    gib = recipe.train.memory_gib
    return 0.7 * device_memory(facts.device) if gib == "auto" else gib * 2**30


def device_memory(device: str) -> float:
    """Return the total memory of a device in bytes, free or not."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def check_block(plan: Plan) -> None:
    """Raise PlanError if one block's activations cannot fit into memory even for a single leg.

    Several legs may be trained by as many ranks, each of which has the memory of a device of its own.
    """
    bytes_per_value = 2 if plan.recipe.data.cache else plan.facts.bytes_per_value
    n_values = [sum(map(plan.facts.width, plan.sites_of(leg, leg.start, leg.end))) for leg in plan.legs]
    needed = bytes_per_value * plan.block_tokens * max(n_values)
    memory = device_memory(plan.facts.device)
    if needed > memory:
        raise PlanError(
            f"activations of one leg in a block of {plan.block_tokens:,} tokens take {needed / 2**30:,.0f} GiB, but "
            f"{plan.facts.device} has {memory / 2**30:,.0f} GiB of memory; lower data.block_tokens or, where that is "
            '"auto", train.batch_tokens or data.context'
        )


def check_disk(plan: Plan, paths: RunDirectory) -> None:
    """Refuse to begin or to extend a run if the disk cannot hold it; a resumed run was checked when it was begun."""
    begun = {leg.id for leg in read_plan(paths.root).legs} if paths.plan.is_file() else set[str]()
    legs = [leg for leg in plan.legs if leg.id not in begun]
    if not legs:
        return
    needed = disk_bytes(plan, legs)
    free = shutil.disk_usage(paths.root).free
    if needed > free:
        what, remedy = "run", "choose another --out, or lower n_latents or the number of snapshots"
        if begun:
            what, remedy = "extension", "or add fewer legs or snapshots"
        raise RunDirectoryError(
            f"{paths.root}: the {what} needs up to {needed / 2**30:.1f} GiB on disk, but {free / 2**30:.1f} GiB are "
            f"free; free space, {remedy}"
        )
