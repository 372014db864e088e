"""Figures draw from small documents, say what they must, and do without what is missing."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from saerelay.planning.compile import compile_plan
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import Run
from saerelay.views import figures as f

METHODS = ("identity", "affine")


def leg(leg_id: str, role: str, layer: int, parent: str | None, head: bool, kind: str = "") -> dict[str, Any]:
    found = {"id": leg_id, "role": role, "layer": layer, "module": "resid_post", "parent": parent, "seed": 7}
    found |= {"control_of": f"L{layer}-from-L0" if kind else None, "control_kind": kind or None}
    found |= {"architecture": "topk", "n_latents": 64, "tokens": 1_500_000, "n_eval_tokens": 12_345, "l0": 24.0}
    return found | {"fvu": 0.1 + layer / 10, "delta_ce": 0.2 if head else None, "delta_ce_se": 0.01 if head else None}


def documents(layers: int = 3, controls: bool = True, head: bool = True) -> dict[str, Any]:
    """A run of a hub at layer 0 and its children: everything but the plan."""
    legs = [leg("L0", "root", 0, None, head)]
    legs += [leg(f"L{i}-from-L0", "transfer", i, "L0", head) for i in range(1, layers)]
    suite = [one["id"] for one in legs]
    if controls:
        legs += [
            leg(f"L{i}-{k}", "control", i, None, head, k) for i in range(1, layers) for k in ("equal_tokens", "full")
        ]
    summary = {"model": "some/$model$_a", "revision": "", "data": "dataset cows", "legs": legs}
    metrics = [
        {"leg": one["id"], "age": 1000 * n, "fvu": 1 / n} for one in legs for n in range(1, 4) if one["role"] != "late"
    ]
    span = range(layers)
    cells = [
        {"leg": suite[s], "tokens": 9, "snapshot": False, "source": s, "target": t, "method": m}
        | {"fvu": 0.1 + 2.5 * abs(s - t), "l0": 24.0, "delta_ce": 0.3 if head else None, "ce_loss_score": None}
        for s in span for t in span for m in (METHODS if s != t else METHODS[:1])
    ]  # fmt: skip
    named = {"tokens": 9, "snapshot": False}
    pairs = [(s, t) for s in span for t in span if s != t]
    similarity = [
        named | {"kind": "suite", "leg": suite[t], "source": suite[s], "target": suite[t], "source_layer": s}
        | {"target_layer": t, "mmcs": 0.4 + s / 100, "mmcs_folded": 0.8 + s / 100}
        for s, t in pairs
    ]  # fmt: skip
    hops = [named | {"leg": suite[i], "layer": i, "parent": "L0", "parent_layer": 0} for i in span[1:]]
    scores = {"method": "identity", "scratch_kind": "full", "scratch_tokens": 9, "fvu": 1.2, "ce_loss_score": None}
    measures = {
        "n_tokens": 12_000,
        "n_matrix_tokens": 8_000,
        "similarity": similarity,
        "transferability": [hop | {"transferability": 0.4} for hop in hops] if head else None,
        "transfer_scores": [hop | scores | {"scratch": f"L{hop['layer']}-full"} for hop in hops] if controls else [],
        "offsets": [
            {"metric": "fvu", "method": m, "offset": o, "tokens": None, "mean": 0.1 + abs(o) * 3, "n": 2}
            for m in METHODS for o in range(1 - layers, layers)
        ],  # fmt: skip
        "dla": {"prompts": "sums.jsonl", "n_prompts": 5, "legs": [
            named | {"leg": one["id"], "layer": one["layer"], "mean": 3.0, "standard_error": 0.5} for one in legs
        ]} if head else None,
    }  # fmt: skip
    links = [
        {"kind": kind, "source": "L0", "target": suite[i], "source_layer": 0, "target_layer": i, "by": "index"}
        | {"status": "kkkkkdrxb-"}
        for kind in ("hop", "depth", *(["control"] if controls else [])) for i in span[1:]
    ]  # fmt: skip
    lineage = {
        "n_tokens": 777,
        "map_tokens": 9,
        "kept_above": 0.9,
        "replaced_below": 0.1,
        "alive_above": 2,
        "links": links,
    }
    matrix = {"n_tokens": 8_000, "cells": cells}
    judged = [
        {"k": k, "faithfulness": 0.8, "faithfulness_se": 0.1, "completeness": 0.3, "completeness_se": 0.1}
        for k in (4, 9)
    ]
    judged[1] |= {"faithfulness": None, "faithfulness_se": None}
    circuits = {
        "n_found_on": 30,
        "n_judged_on": 31,
        "asked": {"n_prompts": 61, "task": "$sums$", "method": "attribution", "k": [4, 9]},
    }
    circuits["legs"] = [{"leg": one["id"], "layer": one["layer"], "circuits": judged} for one in legs]
    return {
        "circuits": circuits,
        "summary": summary,
        "metrics": metrics,
        "matrix": matrix,
        "measures": measures,
        "lineage": lineage,
    }


def drawn(d: dict[str, Any], theme: f.Theme) -> Iterator[tuple[str, Figure]]:
    """Every figure of a run."""
    summary, measures = d["summary"], d["measures"]
    yield "quality", f.quality_figure(summary, theme=theme)
    yield "matrix", f.matrix_figure(summary, d["matrix"], "fvu", "identity", theme=theme)
    yield "matrix_ce", f.matrix_figure(summary, d["matrix"], "ce_loss_score", "affine", theme=theme)
    yield "raw", f.similarity_figure(summary, measures, folded=False, theme=theme)
    yield "folded", f.similarity_figure(summary, measures, theme=theme)
    yield "transferability", f.transferability_figure(summary, measures, theme=theme)
    yield "scores", f.transfer_score_figure(summary, measures, theme=theme)
    yield "scores_ce", f.transfer_score_figure(summary, measures, "ce_loss_score", theme=theme)
    yield "attribution", f.attribution_figure(summary, measures, theme=theme)
    yield "circuits", f.circuits_figure(summary, d["circuits"], theme=theme)
    yield "circuits of 9", f.circuits_figure(summary, d["circuits"], 9, theme=theme)
    yield "offsets", f.offsets_figure(summary, measures, theme=theme)
    for kind in ("hop", "depth", "control"):
        yield kind, f.lineage_figure(summary, d["lineage"], kind, theme=theme)
    yield "training", f.training_figure(summary, d["metrics"], theme=theme)


def words(figure: Figure) -> str:
    """All text of a figure, none of it too small, without line breaks."""
    figure.draw_without_rendering()
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 7  # type: ignore[attr-defined]
    return " ".join(" ".join(text.get_text().split()) for text in figure.findobj(Text))  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_says_of_what_it_is(theme: f.Theme) -> None:
    said = {name: words(figure) for name, figure in drawn(documents(), theme)}
    for name, text in said.items():
        assert all(part in text for part in ("some/$model$_a", "dataset cows", "mean L0 24", "seed 7", "64 latents")), (
            name
        )
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
    assert "E‖x − x̂‖²" in said["quality"] and "standard error" in said["quality"]
    assert "copied as they are" in said["matrix"] and "carried by affine" in said["matrix_ce"]
    assert "not comparable" in said["raw"] and "affine map" in said["folded"]
    assert "30.3 %" in said["transferability"] and "28.8 %" in said["transferability"]
    assert "(transferred − zero-shot) / (from scratch − zero-shot)" in said["scores"]
    assert "sums.jsonl" in said["attribution"] and "5 prompts" in said["attribution"]
    assert "4 latents: $sums$" in said["circuits"] and "judged on 31 others" in said["circuits of 9"]
    assert "over 0.9" in said["hop"] and "more than 2 times" in said["hop"] and "L1-full" not in said["hop"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers", "controls", "head"])
def test_what_is_missing_does_not_break(name: str, tmp_path: Path) -> None:
    missing: dict[str, Any] = {"layers": {"layers": 1}, "controls": {"controls": False}, "head": {"head": False}}[name]
    for key, figure in drawn(documents(**missing), "light"):
        f.save(figure, tmp_path / f"{key}.svg")
    d = documents()
    d["measures"] |= {"transfer_scores": None, "offsets": None, "n_matrix_tokens": None}
    for draw in (f.transfer_score_figure, f.offsets_figure):
        f.save(draw(d["summary"], d["measures"]), tmp_path / "none.svg")


def test_numbers_are_in_their_cells() -> None:
    figure = f.matrix_figure(documents()["summary"], documents()["matrix"], "fvu", "affine")
    (axis, _) = figure.axes
    found = {text.get_position(): text.get_text() for text in axis.texts}
    assert found[0, 0] == ".100" and found[2, 0] == "5.10" and found[0, 2] == "5.10" and found[1, 0] == "2.60"
    assert axis.get_ylabel() == "SAE of layer" and len(found) == 9
    assert not f.matrix_figure(documents(13)["summary"], documents(13)["matrix"]).axes[0].texts


def test_shares_of_a_link_fill_its_bar() -> None:
    (axis,) = f.lineage_figure(documents()["summary"], documents()["lineage"]).axes
    widths = [round(patch.get_width(), 6) for patch in axis.patches]  # type: ignore[attr-defined]
    assert widths == [55.555556] * 2 + [11.111111] * 8


def test_first_of_several_legs_stands_for_a_layer() -> None:
    d = documents(2)
    d["summary"]["legs"].append(leg("L1-again", "transfer", 1, "L0", True))
    d["summary"]["legs"].append(leg("L0+2M", "root", 0, "L0", True))
    assert f._standing(d["summary"]) == {"L0+2M", "L1-from-L0"}


@pytest.mark.parametrize("preset", ["paper", "forward", "hub", "scratch"])
def test_the_plan_is_drawn(facts: ModelFacts, preset: str, tmp_path: Path) -> None:
    sections = {"data": {"context": 32}, "plan": {"preset": preset, "root_tokens": "2M", "fork_at": 0.5}}
    run = Run.parse(sections, source="test")
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
        figure = f.quality_figure(documents()["summary"], theme=theme)
        assert figure.get_size_inches()[0] == f.WIDTH
        f.save(figure, tmp_path / f"{theme}.png")
        f.save(figure, tmp_path / f"{theme}.svg")
        pixels = matplotlib.image.imread(tmp_path / f"{theme}.png")
        assert pixels.shape[1] == round(300 * f.WIDTH) and pixels[0, 0, 3] == (theme == "light")
        root = ET.fromstring((tmp_path / f"{theme}.svg").read_text())
        assert "some/$model$_a" in "".join(root.itertext())
    assert len(list(tmp_path.iterdir())) == 4
    before = (tmp_path / "light.svg").read_bytes()
    f.save(f.quality_figure(documents()["summary"]), tmp_path / "light.svg")
    assert (tmp_path / "light.svg").read_bytes() == before
