"""Every dictionary of a suite on every layer: as it is (zero-shot, Ghilardi et al. 2024), and after closed-form hops.

A cell is a dictionary at a site, measured like any other: `evaluate.measure` shares among all cells what does not
change with the dictionary, and starts the language model at the patched layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast, get_args

from rich.console import Console
from torch import Tensor

from saerelay.analysis.evaluate import held_out, measure, wants_ce
from saerelay.analysis.site_maps import Pair, SiteMaps
from saerelay.analysis.summary import SHOWN
from saerelay.data.corpus import Corpus
from saerelay.data.stream import gather_rows
from saerelay.errors import RecipeError
from saerelay.files import finite, read_json, write_json
from saerelay.lm.model import LanguageModel, load_model
from saerelay.planning.plan import Plan
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.documents.training import DictionaryInfo
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.moments import Moments
from saerelay.sae.spec import Method
from saerelay.sae.transfer import carry, fold, map_between, refit
from saerelay.site import Site

SCHEMA_VERSION = 1
HOPS: tuple[str, ...] = (*get_args(Method), "affine+refit")
MATRIX_TOKENS = 8_192
"""Held-out tokens of each cell, unless told otherwise or the recipe evaluates on fewer."""
REFIT_ROWS = 32_768
CELL_BYTES = 4 * 2**30
"""Folded dictionaries measured in one pass over the tokens stay under this."""


@dataclass(frozen=True)
class Cell:
    """A leg, or a snapshot of it, carried to a layer."""

    leg: str
    tokens: int
    """Its age."""
    snapshot: bool
    source: Site
    target: Site
    method: str

    @property
    def origin(self) -> tuple[str, int, bool]:
        """What is carried: the same for all cells of a leg, or of a snapshot."""
        return self.leg, self.tokens, self.snapshot


def matrix_run(
    suite: PublishedSuite,
    model: LanguageModel | None = None,
    *,
    methods: Sequence[str] = ("identity", "affine"),
    tokens: int = 0,
    snapshots: bool = False,
    maps: SiteMaps | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the suite's legs, without controls, at all its sites; writes matrix.json and returns what is in it.

    `methods` are those of a transfer, or "affine+refit"; `snapshots` adds the legs' snapshots. What was measured
    before, with the same arguments, is read. Raises RecipeError for an unknown method.
    """
    for method in methods:
        if method not in HOPS:
            raise RecipeError(f'no method "{method}"; one of: {", ".join(HOPS)}')
    plan, paths, corpus = suite.plan, suite.directory, Corpus.open(suite.directory.tokens)
    tokens = min(tokens or min(plan.run.evaluate.tokens, MATRIX_TOKENS), int(corpus.test.size))
    cells = [cell for method in methods for cell in cells_of(suite, method, snapshots)]
    asked = {"tokens": tokens, "methods": sorted(methods), "ce": wants_ce(plan), "n_cells": len(cells)}
    if paths.matrix.is_file() and (found := read_json(paths.matrix)).get("asked") == asked:
        return found
    model = model or load_model(plan)
    maps = maps or SiteMaps.of(suite, model, console)
    rows = gather_rows(plan, maps.stream, REFIT_ROWS)[0] if needs_rows(suite, methods) else {}
    results = dict[Cell, dict[str, Any]]()
    for part in parts(cells, plan):
        moments = dict(maps.moments(sorted({(c.source, c.target) for c in part if c.method != "identity"})))
        at_home = {origin: load_origin(suite, *origin) for origin in {cell.origin for cell in part}}
        carried = {
            str(i): (cell.target, carried_to(cell, *at_home[cell.origin], moments, rows.get(cell.target)))
            for i, cell in enumerate(part)
        }
        measured = measure(plan, model, held_out(plan, corpus.test, tokens), carried, ce=asked["ce"], console=console)
        results |= {cell: measured[str(i)] for i, cell in enumerate(part)}
    document = {
        "schema": SCHEMA_VERSION,
        "asked": asked,
        "model": plan.facts.name,
        "revision": plan.facts.revision,
        "split": "test",
        "ablation": "zero, all positions",
        "n_tokens": next(iter(results.values()))["n_tokens"],
        "map_tokens": maps.tokens,
        "module": plan.run.sites.module,
        "layers": [site.layer for site in suite.sites],
        "cells": [cell_document(cell, result) for cell, result in results.items()],
    }
    write_json(paths.matrix, document)
    return finite(document)


def cells_of(suite: PublishedSuite, method: str, snapshots: bool) -> Iterator[Cell]:
    """All cells of a method; a leg at home, where there is nothing to carry it over, counts as the identity's."""
    for leg, target in product(suite.final_legs, suite.sites):
        if target == leg.site and method != "identity":
            continue
        yield Cell(leg.id, suite.info(leg).tokens, False, leg.site, target, method)
        for age in suite.directory.ages(leg) if snapshots else ():
            yield Cell(leg.id, age, True, leg.site, target, method)


def needs_rows(suite: PublishedSuite, methods: Sequence[str]) -> bool:
    """Whether some hop looks at activations of its target, besides their moments."""
    moved = any(leg.dictionary.architecture != "topk" for leg in suite.final_legs) and set(methods) != {"identity"}
    return moved or "affine+refit" in methods


def parts(cells: Sequence[Cell], plan: Plan) -> list[list[Cell]]:
    """The cells by target, cut where their dictionaries would take more than `CELL_BYTES`."""
    found, size = [list[Cell]()], 0
    for cell in sorted(cells, key=lambda cell: (cell.target, cell.source)):
        own = 8 * plan.leg(cell.leg).dictionary.n_latents * plan.facts.width(cell.target)
        if found[-1] and size + own > CELL_BYTES:
            found.append([])
            size = 0
        found[-1].append(cell)
        size += own
    return found


def load_origin(suite: PublishedSuite, leg: str, tokens: int, snapshot: bool) -> tuple[Dictionary, DictionaryInfo]:
    """What is carried, and what its JSON says of it."""
    return read_dictionary(suite.directory.snapshot(leg, tokens) if snapshot else suite.directory.leg(leg))


def carried_to(
    cell: Cell, dictionary: Dictionary, info: DictionaryInfo, moments: dict[Pair, Moments], rows: Tensor | None
) -> Dictionary:
    """A cell's dictionary: folded through the map, at the L0 it has at home, with its decoder refitted if asked.

    `rows` (B, D) of the target may be missing where nothing looks at them.
    """
    if cell.method == "identity":
        return dictionary
    method, _, refitted = cell.method.partition("+")
    between = map_between(cast(Method, method), dictionary.d_model, moments[cell.source, cell.target])
    if rows is None:
        return fold(dictionary, between)
    folded = carry(dictionary, between, rows, info.l0)
    return refit(folded, rows.split(4096)) if refitted else folded


def cell_document(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """A cell as matrix.json has it."""
    place = {"leg": cell.leg, "tokens": cell.tokens, "snapshot": cell.snapshot, "method": cell.method}
    place |= {"source": cell.source.layer, "target": cell.target.layer}
    return place | {name: result.get(name) for name in SHOWN}
