"""Figures draw from small documents, say what they must, and do without what is missing."""

import io
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from saerelay.planning.compile import compile_plan
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import Role
from saerelay.planning.leg_spec import ControlKind
from saerelay.planning.recipe import Recipe
from saerelay.runs.documents.across_layers import (
    Attribution,
    Attributions,
    Matrix,
    MatrixCell,
    MatrixQuestion,
    Measures,
    MeasuresQuestion,
    OffsetMean,
    Similarity,
    Transferability,
    TransferScore,
)
from saerelay.runs.documents.circuits import Circuit, CircuitLeg, CircuitQuestion, Circuits
from saerelay.runs.documents.cost import ControlCost, ScratchCost, SuiteCost
from saerelay.runs.documents.latents import LineageDocument, LineageLink
from saerelay.runs.documents.quality import LegSummary, Origin, Summary
from saerelay.runs.documents.training import TrainingLine
from saerelay.views import figures as f
from saerelay.views.figures.across_layers import Cells, heat_map
from saerelay.views.figures.page import _KIND_OF_ORIGIN, KINDS, kind_of
from saerelay.views.labels import ORIGINS, few_documents, misleading_fvu
from saerelay.views.tables.across_layers import measures_tables
from saerelay.views.tables.quality import notes

METHODS = ("identity", "affine")
COST = SuiteCost(
    lm_tokens=3000, lm_tokens_held_out=0, lm_tokens_unique=3000, survey=None, sae_samples=5000, flops=2e12,
    lm_flops=1e12, flops_dense_equivalent=4e12, seconds=10.0, seconds_lm=5.0,
    from_scratch=ScratchCost(
        tokens=2000, lm_tokens=2000, sae_samples=16000, flops=4e12, lm_flops=1e12, seconds_estimate=20.0
    ),
    controls=ControlCost(sae_samples=0, flops=0.0, seconds=0.0),
)  # fmt: skip


def leg(
    leg_id: str, role: Role, layer: int, parent: str | None, head: bool = True, kind: ControlKind | None = None
) -> LegSummary:
    """A leg whose FVU grows with its layer; `head`: of a model with a language-model head."""
    return LegSummary(
        id=leg_id, role=role, control_of=f"L{layer}-from-L0" if kind else None, control_kind=kind, layer=layer,
        module="resid_post", architecture="topk", method="affine" if parent else None, parent=parent, n_latents=64,
        lr=1e-3, seed=7, origin="from below" if parent else "scratch",
        made=f"affine from {parent}" if parent else "from scratch", in_suite=role != "control", tokens=1_500_000,
        moment_tokens=0, refit_tokens=0, seconds=1.0, n_eval_tokens=12_345, snapshots=[], l0=24.0,
        fvu=0.1 + layer / 10, balanced_fvu=0.2 + layer / 10, frac_alive=0.9,
        delta_ce=0.2 if head else None, delta_ce_se=0.01 if head else None,
        ce_loss_score=0.99 if head else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Documents:
    """A run of a hub at layer 0 and its children: everything but the plan."""

    summary: Summary
    matrix: Matrix
    measures: Measures
    lineage: LineageDocument
    circuits: Circuits
    training: list[TrainingLine]


def documents(layers: int = 3, controls: bool = True, head: bool = True) -> Documents:
    """The documents of a run of so many layers, with or without controls and a language-model head."""
    legs = [leg("L0", "root", 0, None, head)]
    legs += [leg(f"L{i}-from-L0", "transfer", i, "L0", head) for i in range(1, layers)]
    suite = [one.id for one in legs]
    if controls:
        for i in range(1, layers):
            legs.append(leg(f"L{i}-equal_tokens", "control", i, None, head, "equal_tokens"))
            legs.append(leg(f"L{i}-full", "control", i, None, head, "full"))
    lines = [
        TrainingLine(cursor=n, leg=one.id, age=1000 * n, fvu=1 / n) for one in legs for n in range(1, 4)
    ]  # fmt: skip
    return Documents(
        summary=Summary(model="some/$model$_a", revision="", data="dataset cows", legs=legs, cost=COST),
        matrix=matrix_of(suite, head),
        measures=measures_of(suite, [one.id for one in legs], controls, head),
        lineage=lineage_of(suite, controls),
        circuits=circuits_of(legs),
        training=lines,
    )


def matrix_of(suite: list[str], head: bool) -> Matrix:
    """Cells whose FVU grows with the distance from home."""
    cells = []
    for s, leg_id in enumerate(suite):
        for t in range(len(suite)):
            for method in METHODS if s != t else METHODS[:1]:
                cell = MatrixCell(
                    leg=leg_id, tokens=9, snapshot=False, source=s, target=t, method=method,
                    fvu=0.1 + 2.5 * abs(s - t), l0=24.0, delta_ce=0.3 if head else None,
                )  # fmt: skip
                cells.append(cell)
    asked = MatrixQuestion(tokens=8_000, methods=[*METHODS], ce=head, layers=[], legs={})
    layers = [*range(len(suite))]
    return Matrix(model="m", module="resid_post", n_tokens=8_000, map_tokens=9, asked=asked, layers=layers, cells=cells)


def measures_of(suite: list[str], legs: list[str], controls: bool, head: bool) -> Measures:
    """Similarities, transferabilities, scores, offsets and attributions of a run."""
    span = range(len(suite))
    similarity = [
        Similarity(
            kind="suite", leg=suite[t], tokens=9, snapshot=False, source=suite[s], target=suite[t], source_layer=s,
            target_layer=t, mmcs=0.4 + s / 100, mmcs_folded=0.8 + s / 100,
        )
        for s in span for t in span if s != t
    ]  # fmt: skip
    hops: list[dict[str, Any]] = []
    for i in span[1:]:
        hops.append({"leg": suite[i], "layer": i, "tokens": 9, "snapshot": False, "parent": "L0", "parent_layer": 0})
    shares = {"transferability": 0.4, "top_logits": 0.4, "bottom_logits": 0.4, "top_tokens": 0.4, "n_latents": 9}
    score: dict[str, Any] = {"method": "identity", "scratch_kind": "full", "scratch_tokens": 9, "fvu": 1.2}
    score |= {"explained_variance": 1.2, "ce_loss_score": None}
    offsets = [
        OffsetMean(metric="fvu", method=m, offset=o, tokens=None, mean=0.1 + abs(o) * 3, n=2)
        for m in METHODS for o in range(1 - len(suite), len(suite))
    ]  # fmt: skip
    attributed = [
        Attribution(leg=one, layer=0, tokens=9, snapshot=False, mean=3.0, standard_error=0.5, scores=[3.0], latents=[1])
        for one in legs
    ]
    return Measures(
        model="m",
        module="resid_post",
        n_tokens=12_000,
        map_tokens=9,
        asked=MeasuresQuestion(tokens=12_000, prompts=None, matrix=None, legs={}),
        n_matrix_tokens=8_000,
        similarity=similarity,
        transferability=[Transferability(**hop, **shares) for hop in hops] if head else None,
        transfer_scores=[TransferScore(**hop, **score, scratch=f"L{hop['layer']}-full") for hop in hops if controls],
        offsets=offsets,
        dla=Attributions(prompts="sums.jsonl", n_prompts=5, legs=attributed) if head else None,
    )


def lineage_of(suite: list[str], controls: bool) -> LineageDocument:
    """Ten latents, of which five were kept, and one has each other status."""
    links = []
    for kind in ("hop", "depth", *(["control"] if controls else [])):
        for i, target in enumerate(suite[1:], start=1):
            link = LineageLink(
                kind=kind, source="L0", target=target, source_layer=0, target_layer=i, by="index", partner=None,
                decoder_cosine=[0.9] * 10, encoder_cosine=[0.9] * 10, correlation=[0.9] * 10, status="kkkkkdrxb-",
            )  # fmt: skip
            links.append(link)
    return LineageDocument(
        model="m", n_sequences=1, kept_above=0.9, replaced_below=0.1, alive_above=2, legs={}, n_tokens=777,
        map_tokens=9, links=links,
    )  # fmt: skip


def circuits_of(legs: list[LegSummary]) -> Circuits:
    """Circuits of 4 latents, and of 9, whose faithfulness is not known."""
    judged = [
        Circuit(k=4, faithfulness=0.8, faithfulness_se=0.1, completeness=0.3, completeness_se=0.1),
        Circuit(k=9, faithfulness=None, faithfulness_se=None, completeness=0.3, completeness_se=0.1),
    ]
    rows = [
        CircuitLeg(
            leg=one.id, layer=one.layer, module=one.module, role=one.role, parent=one.parent,
            control_of=one.control_of, control_kind=one.control_kind, tokens=9, n_latents=64, circuits=judged,
            latents=[], effects=[], m_empty=[], m_kept=[], m_ablated=[],
        )
        for one in legs
    ]  # fmt: skip
    return Circuits(
        asked=CircuitQuestion(task="$sums$", prompts="0", n_prompts=61, seed=0, method="attribution", k=[4, 9]),
        description="", model="m", revision="", dtype="float32", n_found_on=30, n_judged_on=31, n_tokens=[3, 3],
        means="of each position", accuracy=1.0, accuracy_needed=0.7, m=1.0, m_se=0.1, clean=[], legs=rows,
        differences=[],
    )  # fmt: skip


def drawn(d: Documents, theme: f.Theme) -> Iterator[tuple[str, Figure]]:
    """Every figure of a run."""
    summary, measures = d.summary, d.measures
    yield "quality", f.quality_figure(summary, theme=theme)
    yield "matrix", f.matrix_figure(summary, d.matrix, "fvu", "identity", theme=theme)
    yield "matrix_ce", f.matrix_figure(summary, d.matrix, "ce_loss_score", "affine", theme=theme)
    yield "raw", f.similarity_figure(summary, measures, folded=False, theme=theme)
    yield "folded", f.similarity_figure(summary, measures, theme=theme)
    yield "transferability", f.transferability_figure(summary, measures, theme=theme)
    yield "scores", f.transfer_score_figure(summary, measures, theme=theme)
    yield "scores_ce", f.transfer_score_figure(summary, measures, "ce_loss_score", theme=theme)
    yield "attribution", f.attribution_figure(summary, measures, theme=theme)
    yield "circuits", f.circuits_figure(summary, d.circuits, theme=theme)
    yield "circuits of 9", f.circuits_figure(summary, d.circuits, 9, theme=theme)
    yield "offsets", f.offsets_figure(summary, measures, theme=theme)
    for kind in ("hop", "depth", "control"):
        yield kind, f.lineage_figure(summary, d.lineage, kind, theme=theme)
    yield "training", f.training_figure(summary, d.training, theme=theme)


def words(figure: Figure) -> str:
    """All text of a figure, none of it too small, without line breaks."""
    figure.draw_without_rendering()
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 7  # type: ignore[attr-defined]
    return " ".join(" ".join(text.get_text().split()) for text in figure.findobj(Text))  # type: ignore[attr-defined]


def n_marks(figure: Figure) -> int:
    """How many points, bars and cells of a figure hold data; plain lines do not count."""
    n = 0
    for axis in figure.axes[:2]:
        n += sum(len(line.get_xdata()) for line in axis.lines if line.get_marker() not in ("None", "", None))  # type: ignore[arg-type]
        n += len(axis.patches)
        n += sum(np.ma.count(image.get_array()) for image in axis.images)
    return n


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_says_of_what_it_is(theme: f.Theme) -> None:
    said = {name: words(figure) for name, figure in drawn(documents(), theme)}
    for name, text in said.items():
        for part in ("some/$model$_a", "dataset cows", "mean L0 24", "seed 7", "64 latents"):
            assert part in text, (name, part)
    tokens = {
        "quality": "12,345",
        "matrix": "8,000",
        "raw": "12,000",
        "scores": "8,000",
        "hop": "777",
        "offsets": "8,000",
    }
    for name, n in tokens.items():
        assert f"test split, {n} tokens" in said[name], name
    assert "training split" in said["training"] and "test split" not in said["training"]
    assert "mean over dimensions" in said["quality"] and "standard error" in said["quality"]
    assert "copied unchanged" in said["matrix"] and "transferred by affine map" in said["matrix_ce"]
    assert "not comparable" in said["raw"] and "affine map" in said["folded"]
    assert "30.3 %" in said["transferability"] and "28.8 %" in said["transferability"]
    assert "(transferred − zero-shot) / (from scratch − zero-shot)" in said["scores"]
    assert "sums.jsonl" in said["attribution"] and "5 prompts" in said["attribution"]
    assert "4 latents: $sums$" in said["circuits"] and "judged on 31 others" in said["circuits of 9"]
    assert "above 0.9" in said["hop"] and "more than 2 times" in said["hop"] and "L1-full" not in said["hop"]


MARKS = {
    "quality": 2 * 7,
    "matrix": 9,
    "matrix_ce": 0,
    "raw": 6,
    "folded": 6,
    "transferability": 2,
    "scores": 2,
    "scores_ce": 0,
    "attribution": 7,
    "circuits": 2 * 7,
    "circuits of 9": 7,
    "offsets": 2 * 5,
    "hop": 2 * 5,
    "depth": 2 * 5,
    "control": 2 * 5,
    "training": 0,
}
"""Points, bars and cells of every figure of seven legs on three layers."""
ONE_LAYER = {
    "quality": 2,
    "matrix": 1,
    "raw": 0,
    "folded": 0,
    "transferability": 0,
    "scores": 0,
    "attribution": 1,
    "circuits": 2,
    "circuits of 9": 1,
    "offsets": 2,
    "hop": 0,
    "depth": 0,
    "control": 0,
}
NO_CONTROLS = {
    "quality": 2 * 3,
    "scores": 0,
    "attribution": 3,
    "circuits": 2 * 3,
    "circuits of 9": 3,
    "control": 0,
}
NO_HEAD = {"quality": 7, "transferability": 0, "attribution": 0}


def test_every_figure_draws_its_data() -> None:
    """As many points, bars and cells as the documents have values."""
    marks = {name: n_marks(figure) for name, figure in drawn(documents(), "light")}
    assert marks == MARKS
    (axis, _) = f.training_figure(documents().summary, documents().training).axes
    assert sum(len(line.get_xdata()) for line in axis.lines) == 7 * 3  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "changed_marks"),
    [({"layers": 1}, ONE_LAYER), ({"controls": False}, NO_CONTROLS), ({"head": False}, NO_HEAD)],
    ids=["one layer", "no controls", "no head"],
)
def test_what_is_missing_is_left_out_of_the_figure_and_nothing_else(
    without: dict[str, Any], changed_marks: dict[str, int], tmp_path: Path
) -> None:
    figures = dict(drawn(documents(**without), "light"))
    assert {name: n_marks(figure) for name, figure in figures.items()} == {**MARKS, **changed_marks}
    for name, figure in figures.items():
        f.save(figure, tmp_path / f"{name}.svg")
        ET.fromstring((tmp_path / f"{name}.svg").read_text())
    if "layers" in without:
        assert figures["matrix"].axes[0].texts[0].get_text() == "0.100"
    if "controls" in without:
        assert "control" not in words(figures["quality"])
    if "head" in without:
        assert "ΔCE" not in words(figures["quality"])


def test_measures_without_a_matrix_have_figures_without_points() -> None:
    d = documents()
    alone = d.measures.changed(transfer_scores=None, offsets=None, n_matrix_tokens=None)
    assert n_marks(f.transfer_score_figure(d.summary, alone)) == n_marks(f.offsets_figure(d.summary, alone)) == 0


def test_numbers_are_in_their_cells() -> None:
    figure = f.matrix_figure(documents().summary, documents().matrix, "fvu", "affine")
    (axis, _) = figure.axes
    cells = {text.get_position(): text.get_text() for text in axis.texts}
    assert cells[0, 0] == "0.100" and cells[2, 0] == "5.10" and cells[0, 2] == "5.10" and cells[1, 0] == "2.60"
    assert axis.get_ylabel() == "SAE of layer" and len(cells) == 9
    assert not f.matrix_figure(documents(13).summary, documents(13).matrix).axes[0].texts


def test_numbers_fit_into_the_smallest_cells_that_have_them() -> None:
    d = documents(10)
    figure = f.matrix_figure(d.summary, d.matrix)
    figure.draw_without_rendering()
    axis = figure.axes[0]
    cell = axis.transData.transform((1, 0))[0] - axis.transData.transform((0, 0))[0]
    assert len(axis.texts) == 100
    assert max(text.get_window_extent().width for text in axis.texts) < cell


def test_a_score_is_drawn_from_0_on_and_says_so_if_some_are_below() -> None:
    """Far below 0 means as little as just below it, so such values must not compress the others."""
    cells: Cells = {(0, 0): 0.9, (0, 1): -40.0, (1, 0): 0.5, (1, 1): None}
    for is_score, low in ((True, 0.0), (False, -40.0)):
        figure = heat_map("light", "facts", "title", "definition", cells, "metric", is_score=is_score)
        (image,) = figure.axes[0].images
        assert image.norm.vmin == low and image.norm.vmax == 0.9
        assert image.colorbar and image.colorbar.extend == ("min" if is_score else "neither")


def test_a_metric_of_great_range_has_a_logarithmic_scale() -> None:
    for high, is_logarithmic in ((2.9, False), (3.1, True)):
        cells: Cells = {(0, 0): 0.1, (0, 1): high}
        figure = heat_map("light", "facts", "title", "definition", cells, "metric")
        assert isinstance(figure.axes[0].images[0].norm, LogNorm) == is_logarithmic


def test_shares_of_a_link_fill_its_bar() -> None:
    (axis,) = f.lineage_figure(documents().summary, documents().lineage).axes
    widths = [round(patch.get_width(), 6) for patch in axis.patches]  # type: ignore[attr-defined]
    assert widths == [55.555556] * 2 + [11.111111] * 8


def test_legs_are_marked_by_where_they_come_from() -> None:
    assert [kind_of(one) for one in documents().summary.legs[:4]] == ["root", "below", "below", "equal_tokens"]
    above = leg("a", "transfer", 0, "L1").changed(origin="from above")
    continued = leg("b", "transfer", 0, "L0").changed(origin="scratch")
    assert (kind_of(above), kind_of(continued)) == ("above", "root")
    assert [kind_of(above.changed(origin=origin)) for origin in get_args(Origin)] == list(_KIND_OF_ORIGIN.values())
    assert set(get_args(Origin)) < set(ORIGINS)

    # A leg that continues another at its own layer is drawn as what it comes from.
    d = documents()
    rows = [row.changed(parent_layer=row.layer) for row in d.measures.transferability or ()]
    scores = [row.changed(parent_layer=row.layer) for row in d.measures.transfer_scores or ()]
    at_home = d.measures.changed(transferability=rows, transfer_scores=scores)
    for draw in (f.transferability_figure, f.transfer_score_figure):
        (axis,) = draw(d.summary, at_home).axes
        labels = " ".join(axis.get_legend_handles_labels()[1])
        assert ORIGINS["from below"] in labels and ORIGINS["from above"] not in labels


def test_the_legend_counts_all_tokens_of_legs_that_were_continued() -> None:
    summary = documents().summary
    legs = [row.changed(tokens_before=500_000) if row.id == "L2-from-L0" else row for row in summary.legs]
    labels = quality_labels(f.quality_figure(summary.changed(legs=legs)))
    assert f"{KINDS['below'].label}, 1.5M to 2M tokens" in labels and f"{KINDS['root'].label}, 1.5M tokens" in labels


def quality_labels(figure: Figure) -> list[str]:
    """The labels in the legend of a figure's first axes."""
    return [str(label) for label in figure.axes[0].get_legend_handles_labels()[1]]


def test_tables_of_measures_show_names_from_files_as_they_are() -> None:
    measures = documents().measures
    assert measures.dla
    hostile = measures.changed(dla=measures.dla.changed(prompts="p[bold].jsonl [/x]"))
    output = Console(width=400, file=io.StringIO())
    output.print(*measures_tables(hostile))
    assert "p[bold].jsonl [/x]" in output.file.getvalue()  # type: ignore[attr-defined]


def test_an_attribution_says_what_is_known_of_it() -> None:
    """One prompt has no standard error."""
    measures = documents().measures
    assert measures.dla
    first, second, *rest = measures.dla.legs
    rows = [first.changed(mean=0.00123, standard_error=None), second.changed(mean=None, standard_error=None), *rest]
    output = Console(width=400, file=io.StringIO())
    output.print(*measures_tables(measures.changed(dla=measures.dla.changed(legs=rows))))
    lines = output.file.getvalue().splitlines()  # type: ignore[attr-defined]
    told = {line.split()[0]: line.split()[-1] for line in lines if line.startswith((first.leg, second.leg))}
    assert told[first.leg] == "0.00123" and told[second.leg] == "-"


def test_only_legs_that_stand_for_their_layers_are_in_heat_maps() -> None:
    d = documents(2)
    other = leg("L1-again", "transfer", 1, "L0").changed(in_suite=False)
    summary = d.summary.changed(legs=[*d.summary.legs, other])
    again = [cell.changed(leg="L1-again", fvu=99.0) for cell in d.matrix.cells if cell.source == 1]
    matrix = d.matrix.changed(cells=[*d.matrix.cells, *again])
    assert "99" not in words(f.matrix_figure(summary, matrix))


@pytest.mark.parametrize("preset", ["paper", "forward", "hub", "scratch"])
def test_the_plan_is_drawn(facts: ModelFacts, preset: str, tmp_path: Path) -> None:
    sections = {"data": {"context": 32}, "plan": {"preset": preset, "root_tokens": "2M", "fork_at": 0.5}}
    run = Recipe.parse(sections, source="test")
    plan = compile_plan(run, facts)
    figure = f.plan_figure(plan)
    said = words(figure)
    assert "paper-model" in said and f"The plan: {len(plan.legs)} SAEs" in said and "2M" in said
    arrows = [text for text in figure.axes[0].texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == sum(bool(one.parent) for one in plan.legs)
    for arrow in arrows:
        assert arrow.xyann[1] in {one.fold_at + one.budget_tokens // 2 for one in plan.legs} | {arrow.xy[1]}
    f.save(figure, tmp_path / "plan.png")


@pytest.mark.slow
def test_files_are_pictures_of_one_column(tmp_path: Path) -> None:
    import matplotlib.image

    for theme in ("light", "dark"):
        figure = f.quality_figure(documents().summary, theme=theme)
        assert figure.get_size_inches()[0] == f.WIDTH
        f.save(figure, tmp_path / f"{theme}.png")
        f.save(figure, tmp_path / f"{theme}.svg")
        pixels = matplotlib.image.imread(tmp_path / f"{theme}.png")
        assert pixels.shape[1] == round(300 * f.WIDTH) and pixels[0, 0, 3] == (theme == "light")
        root = ET.fromstring((tmp_path / f"{theme}.svg").read_text())
        assert "some/$model$_a" in "".join(root.itertext())
    assert len(list(tmp_path.iterdir())) == 4
    twice = []
    for _ in range(2):
        f.save(f.quality_figure(documents().summary), tmp_path / "light.svg")
        twice.append((tmp_path / "light.svg").read_bytes())
    assert twice[0] == twice[1]


def test_layers_where_fvu_misleads_are_named() -> None:
    summary = documents().summary
    assert misleading_fvu(summary) == ""
    first, *others = summary.legs
    one_large = summary.changed(legs=[first.changed(largest_dimension=0.58), *others])
    assert f"at layer {first.layer} (58 %)" in misleading_fvu(one_large)
    large = [leg.changed(largest_dimension=0.58) for leg in summary.legs]
    assert f"at layers {first.layer} (58 %), " in misleading_fvu(summary.changed(legs=large))


def test_errors_from_few_documents_are_called_too_small() -> None:
    summary = documents().summary
    assert few_documents(summary) == ""  # not known
    assert few_documents(summary.changed(n_sequences=24, n_documents=12)) == ""
    said = few_documents(summary.changed(n_sequences=24, n_documents=2))
    assert said.startswith("The 24 held-out sequences are from 2 documents only.")
    assert said in " ".join(str(note) for note in notes(summary.changed(n_sequences=24, n_documents=2)))


def test_no_mark_of_quality_is_cut_off_at_the_edge() -> None:
    """Values that lie close together leave room above them, and a ΔCE below 0 is seen."""
    summary = documents().summary
    alike = [leg.changed(delta_ce=-0.01, delta_ce_se=0.0, balanced_fvu=0.4) for leg in summary.legs]
    loss, fvu = f.quality_figure(summary.changed(legs=alike)).axes
    assert loss.get_ylim()[0] < -0.0105 and loss.get_ylim()[1] > 0
    assert fvu.get_ylim()[0] == 0 and fvu.get_ylim()[1] > 0.42
