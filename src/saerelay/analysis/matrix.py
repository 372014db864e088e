"""Every dictionary of a suite at every layer: unchanged (zero-shot, Ghilardi et al. 2024), and after closed-form hops.

A cell is a dictionary at a site, measured like any other: `metrics.measure` shares among all cells the results that do
not depend on the dictionary, and starts the language model at the patched layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

from torch import Tensor

from saerelay.analysis.metrics import Placed, measure, wants_ce
from saerelay.analysis.session import Session
from saerelay.analysis.site_maps import SitePair
from saerelay.analysis.summary import shown_metrics
from saerelay.data.stream import gather_rows
from saerelay.errors import RecipeError
from saerelay.planning.plan import Plan
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.documents.across_layers import CarryingMethod, Matrix, MatrixCell, MatrixQuestion
from saerelay.runs.documents.quality import EvaluationMetrics
from saerelay.runs.documents.training import DictionaryInfo
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.maps import AnyMoments, PairedMoments, map_between
from saerelay.sae.moments import Moments
from saerelay.sae.spec import Method
from saerelay.sae.transfer import carry, refit_in
from saerelay.sae.units import Balance, Units
from saerelay.site import ModuleKind, Site

METHODS: tuple[str, ...] = get_args(CarryingMethod)
MATRIX_TOKENS = 8_192
"""Default number of held-out tokens per cell, unless the recipe evaluates on fewer."""
REFIT_ROWS = 32_768
"""Rows on which decoders are refitted; L0 is matched on the first of them."""
CELL_BYTES = 4 * 2**30
"""Most bytes of the folded dictionaries that are measured in one pass over the tokens."""


@dataclass(frozen=True)
class Cell:
    """A leg, or a snapshot of it, carried to a site."""

    leg: str
    tokens: int
    """Age of the leg or snapshot."""
    snapshot: bool
    source: Site
    target: Site
    method: str
    module_out: ModuleKind | None = None
    """The module that a transcoder reconstructs."""

    @property
    def source_out(self) -> Site:
        """The site it reconstructs where it was trained."""
        return self.source.at(self.module_out)

    @property
    def target_out(self) -> Site:
        """The site it reconstructs where it is carried to."""
        return self.target.at(self.module_out)

    @property
    def version(self) -> tuple[str, int, bool]:
        """The dictionary that is carried: the same for all cells of a leg, or of a snapshot."""
        return self.leg, self.tokens, self.snapshot


def matrix(
    session: Session, *, methods: Sequence[str] = ("identity", "affine"), tokens: int = 0, snapshots: bool = False
) -> Matrix:
    """Measure the legs of the suite at all its sites; writes matrix.json, unless it already answers the question.

    `methods` are methods of a transfer, or "affine+refit"; with `snapshots`, the legs' snapshots are measured as well.
    Raises RecipeError for an unknown method or if there is nothing to measure, and RunDirectoryError if only controls
    are finished.
    """
    if not methods:
        raise RecipeError(f"no method is given; choose some of: {', '.join(METHODS)}")
    for method in methods:
        if method not in METHODS:
            raise RecipeError(f'unknown method "{method}"; expected one of: {", ".join(METHODS)}')
    session.suite.check_has_final_legs()
    asked = question(session, methods, tokens, snapshots)
    path = session.suite.directory.matrix
    current = session.team.once(lambda: Matrix.load_current(path, asked))
    if current is not None:
        return current

    cells = [cell for method in methods for cell in cells_of(session.suite, method, snapshots)]
    if not cells:
        raise RecipeError(
            f'nothing to measure: no SAE has another layer to be carried to; add "identity" to the methods '
            f"({', '.join(methods)}), which measures each SAE at its own layer"
        )
    ordered = [cell for part in parts(cells, session.plan) for cell in part]
    measured: dict[Cell, EvaluationMetrics] = {}
    for of_rank in session.team.gather(measure_cells(session, session.deal(ordered), asked)):
        measured |= of_rank
    document = document_of(session, asked, {cell: measured[cell] for cell in ordered})
    if session.team.leads:
        document.save(path)
    return document


def document_of(session: Session, asked: MatrixQuestion, metrics: Mapping[Cell, EvaluationMetrics]) -> Matrix:
    """Return the matrix as written to matrix.json."""
    facts = session.plan.facts
    return Matrix(
        model=facts.name,
        revision=facts.revision,
        module=session.suite.modules,
        n_tokens=next(iter(metrics.values())).n_tokens,
        map_tokens=session.maps.tokens,
        asked=asked,
        layers=asked.layers,
        cells=[matrix_cell(cell, measured) for cell, measured in metrics.items()],
    )


def matrix_again(session: Session) -> Matrix | None:
    """Return a run's matrix, measured again if its legs have changed since; None if it has none."""
    old = Matrix.load_if_any(session.suite.directory.matrix)
    if old is None:
        return None
    return matrix(session, methods=old.asked.methods, tokens=old.asked.tokens, snapshots=old.has_snapshots)


def current_matrix(session: Session) -> Matrix | None:
    """Return a run's matrix.json, if it is about the run's present legs; else None."""
    old = Matrix.load_if_any(session.suite.directory.matrix)
    if old is None:
        return None
    asked = question(session, old.asked.methods, old.asked.tokens, old.has_snapshots)
    return old if old.is_current(asked) else None


def question(session: Session, methods: Sequence[str], tokens: int, snapshots: bool) -> MatrixQuestion:
    """Return the question of a matrix: which legs, at which ages, at which layers, by which methods, on what tokens."""
    suite = session.suite
    wanted = tokens or min(session.plan.recipe.evaluate.tokens, MATRIX_TOKENS)
    ages = {}
    for leg in suite.suite_legs:
        ages[leg.id] = [suite.info(leg).tokens]
        if snapshots:
            ages[leg.id] += suite.directory.ages(leg)
    return MatrixQuestion(
        tokens=session.n_held_out(wanted),
        methods=sorted(methods),
        ce=wants_ce(session.plan),
        dictionaries=suite.digest(suite.suite_legs, snapshots=snapshots),
        layers=sorted({leg.layer for leg in suite.legs}),
        legs=ages,
    )


def cells_of(suite: PublishedSuite, method: str, snapshots: bool) -> Iterator[Cell]:
    """Yield all cells of a method: every leg of the suite at the sites of its own kind.

    At its own site, where there is nothing to carry, a leg counts under the method "identity".
    """
    for leg in suite.suite_legs:
        age = suite.info(leg).tokens
        targets = sorted({other.site for other in suite.legs if other.kind == leg.kind})
        for target in targets:
            if target == leg.site and method != "identity":
                continue
            yield Cell(leg.id, age, False, leg.site, target, method, leg.module_out)
            for snapshot_age in suite.directory.ages(leg) if snapshots else ():
                yield Cell(leg.id, snapshot_age, True, leg.site, target, method, leg.module_out)


def measure_cells(session: Session, cells: Sequence[Cell], asked: MatrixQuestion) -> dict[Cell, EvaluationMetrics]:
    """Measure some cells, part by part, so that the folded dictionaries of each part fit in memory."""
    if not cells:
        return {}
    plan = session.plan
    sequences = session.held_out(asked.tokens)
    rows: Mapping[Site, Tensor] = {}
    if set(asked.methods) != {"identity"}:
        rows, _ = gather_rows(plan, session.maps.stream, REFIT_ROWS)

    measured: dict[Cell, EvaluationMetrics] = {}
    for part in parts(cells, plan):
        dictionaries = dictionaries_of(session, part, rows)
        placed = {}
        for i, cell in enumerate(part):
            placed[str(i)] = Placed(cell.target, dictionaries[i], cell.target_out)
        metrics = measure(plan, session.model, sequences, placed, ce=asked.ce, display=session.display)
        for i, cell in enumerate(part):
            measured[cell] = metrics[str(i)]
    return measured


def dictionaries_of(session: Session, cells: Sequence[Cell], rows: Mapping[Site, Tensor]) -> list[Dictionary]:
    """Return the dictionary of each cell; `rows` (n, D) of each site are only needed for those that are carried."""
    pairs: set[SitePair] = set()
    for cell in cells:
        if cell.method != "identity":
            pairs.add((cell.source, cell.target))
            pairs.add((cell.source_out, cell.target_out))
    moments = dict(session.maps.moments(sorted(pairs)))
    versions = {cell.version: load_version(session.suite, cell) for cell in cells}  # a version has many cells
    balance = session.plan.recipe.train.optimizer.balance
    dictionaries = []
    for cell in cells:
        dictionary, info = versions[cell.version]
        if cell.method != "identity":
            dictionary = carried_to(cell, dictionary, info.l0, moments, rows, balance)
        dictionaries.append(dictionary)
    return dictionaries


def parts(cells: Sequence[Cell], plan: Plan) -> list[list[Cell]]:
    """Divide cells, ordered by target, into parts whose dictionaries take at most `CELL_BYTES`."""
    cut: list[list[Cell]] = [[]]
    size = 0
    for cell in sorted(cells, key=lambda cell: (cell.target, cell.source)):
        n_bytes = 8 * plan.leg(cell.leg).dictionary.n_latents * plan.facts.width(cell.target)
        if cut[-1] and size + n_bytes > CELL_BYTES:
            cut.append([])
            size = 0
        cut[-1].append(cell)
        size += n_bytes
    return cut


def load_version(suite: PublishedSuite, cell: Cell) -> tuple[Dictionary, DictionaryInfo]:
    """Return the dictionary that a cell carries, with its JSON document."""
    paths = suite.directory
    return read_dictionary(paths.snapshot(cell.leg, cell.tokens) if cell.snapshot else paths.leg(cell.leg))


def carried_to(
    cell: Cell,
    dictionary: Dictionary,
    l0: float | None,
    moments: Mapping[SitePair, Moments],
    rows: Mapping[Site, Tensor],
    balance: Balance,
) -> Dictionary:
    """Return a cell's dictionary: folded through the map, with its L0 kept, and its decoder refitted if asked.

    `rows` (n, D) are activations by site.
    """
    method, _, refitted = cell.method.partition("+")
    x = rows[cell.target]
    y = None  # what a transcoder reconstructs
    units = Units.fitted_to(x, balance)
    of_map: AnyMoments = moments[cell.source, cell.target]
    if cell.target_out != cell.target:
        y = rows[cell.target_out]
        units = replace(units, target=Units.fitted_to(y, balance))
        of_map = PairedMoments(of_map, moments[cell.source_out, cell.target_out])

    between = map_between(cast(Method, method), dictionary.d_model, of_map, balance)
    carried = carry(dictionary, between, x, units, l0=l0).dictionary
    return refit_in(units, carried, x, y) if refitted else carried


def matrix_cell(cell: Cell, metrics: EvaluationMetrics) -> MatrixCell:
    """Return a cell as written to matrix.json."""
    return MatrixCell(
        leg=cell.leg,
        tokens=cell.tokens,
        snapshot=cell.snapshot,
        method=cast(CarryingMethod, cell.method),
        source=cell.source.layer,
        target=cell.target.layer,
        **shown_metrics(metrics),
    )
