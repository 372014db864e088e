"""A finished run made of nothing: every file that a report reads, random but in shape, and with hostile tokens.

All files are made from the types that the commands write, so that they cannot differ from what is written in earnest.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saerelay.analysis.session import Session
from saerelay.analysis.suite import Suite, load
from saerelay.analysis.summary import summarise
from saerelay.data.corpus import Corpus, CorpusFacts
from saerelay.files import write_text
from saerelay.planning.compile import compile_plan
from saerelay.planning.facts import ModelFacts, TokenFacts
from saerelay.planning.leg import Hop, Leg
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.across_layers import Matrix, MatrixCell, MatrixQuestion
from saerelay.runs.documents.circuits import Circuit, CircuitLeg, CircuitQuestion, Circuits
from saerelay.runs.documents.interpretation import (
    AnswerCost,
    AskedModel,
    Interpretation,
    InterpretedLatent,
    MeanScore,
)
from saerelay.runs.documents.judging import Agreement, JudgeTally, LayerTally, OriginTally, Scores
from saerelay.runs.documents.latents import FeatureFacts, LineageDocument, LineageLeg, LineageLink
from saerelay.runs.documents.quality import Density, Evaluation, EvaluationMetrics, EvaluationQuestion, Summary
from saerelay.runs.documents.training import DictionaryInfo, TrainingLine
from saerelay.runs.features import Features
from saerelay.views.report.sources import ReportSources
from saerelay.workflows.report import report_sources

F, CONTEXT, SEQUENCES, V = 600, 24, 8, 101
FACTS = ModelFacts(
    name="<i>model",
    revision="",
    family="gpt_neox",
    dtype="float32",
    device="cpu",
    n_layers=3,
    d_model=16,
    d_attn_z=16,
    tokens=TokenFacts(vocab_size=V, max_context=64, bos_token_id=0, eos_token_id=0),
    has_lm_head=True,
    layer_params=3000,
    model_params=25000,
)
HOSTILE = {
    1: "<script>alert(1)</script>",
    2: "&lt;b&gt; & co",
    3: "\u202eright to left\u200f",
    4: "\ud800lone\udfff",
    5: "x" * 10_000,
    6: "שלום",
    7: "\n\t\x00 \x1b",
    8: '"><img src=x onerror=alert(2)>',
    9: "</script><script>alert(3)</script>\u2028",
}
"""Token texts that a page must show and not obey."""
EXPLANATION = "fires on <script>alert(5)</script> <img src=x onerror=alert(6)> \u202eand \x1b[2J " + "y" * 300
KNOWN = (1, 123)
"""Layer and latent that fires on, and only on, the token `needle`."""


def token_text(token: int) -> str:
    """What the run's tokens look like."""
    return HOSTILE.get(token, "needle" if token == V - 1 else f" w{token}")


def fake_run(root: Path) -> Suite:
    """Three layers, the middle one from scratch, and controls; features, lineage, matrix and explanations."""
    sections: dict[str, Any] = {
        "sites": {"layers": [0, 1, 2]},
        "dictionary": {"n_latents": F, "k": 4},
        "plan": {"root_tokens": 8192, "transfer_tokens": 2048, "moment_tokens": 1024, "controls": [0]},
        "data": {"context": CONTEXT},
        "train": {"batch_tokens": 96},
    }
    plan = compile_plan(Recipe.parse(sections, source="test"), FACTS)
    paths, rng = RunDirectory(root), np.random.default_rng(0)
    plan.save(paths.plan)
    test = fake_tokens(paths, rng)
    fake_training(paths, plan)
    for leg in plan.legs:
        fake_evaluation(paths, leg, test)
        fake_features(paths, leg, test, rng)
    suite = load(root)
    fake_lineage(suite, rng)
    fake_matrix(suite, rng)
    fake_interpretations(suite)
    return suite


def extended_run(suite: Suite, root: Path, legs: list[str]) -> Suite:
    """A copy of a fake run in which some legs were continued: each has as many tokens again."""
    shutil.copytree(suite.directory.root, root)
    paths = RunDirectory(root)
    plan = suite.plan
    for leg_id in legs:
        leg = plan.leg(leg_id)
        hop = Hop(parent=leg_id, method="identity", fork_at_tokens=leg.budget_tokens)
        more = leg.changed(id=f"{leg_id}+more", hop=hop)
        plan = plan.changed(legs=[*plan.legs, more])
        shutil.copytree(paths.leg(leg_id), paths.leg(more.id))
        shutil.copy(paths.evaluation(leg_id), paths.evaluation(more.id))
    plan.save(paths.plan)
    return load(root)


def fake_tokens(paths: RunDirectory, rng: np.random.Generator) -> np.ndarray:
    """Random tokens; those of the test split, with the needle and the hostile ones."""
    paths.tokens.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        tokens = rng.integers(0, V - 1, size=(SEQUENCES, CONTEXT)).astype(np.uint16)
        if split == "test":
            tokens[0, 10] = V - 1
            tokens[1, :9] = range(1, 10)
        np.save(paths.tokens / f"{split}.npy", tokens)
    CorpusFacts(
        source="<b>text</b>", context=CONTEXT, prepend_bos=False, n_documents=9, train_sequences=SEQUENCES,
        validation_sequences=SEQUENCES, test_sequences=SEQUENCES, complete=True,
    ).save(paths.tokens / "corpus.json")  # fmt: skip
    return np.asarray(Corpus.open(paths.tokens).test)


def fake_training(paths: RunDirectory, plan: Plan) -> None:
    """Published dictionaries without weights, and a log of two lines each."""
    lines = []
    for n in (1024, 2048):
        for leg in plan.legs:
            line = TrainingLine(
                cursor=n, leg=leg.id, age=n, loss=1 / n, fvu=1 / n, l0=4.0, n_dead=0, learning_rate=1e-3, seconds=1.0
            )
            lines.append(line.model_dump_json() + "\n")
    write_text(paths.metrics, "".join(lines))
    for leg in plan.legs:
        info = DictionaryInfo(
            architecture="topk", k=4, d_model=16, n_latents=F, tokens=leg.budget_tokens, seconds=2.0, lr=leg.schedule.lr
        )
        info.save(paths.leg(leg.id) / "dictionary.json")


def fake_evaluation(paths: RunDirectory, leg: Leg, test: np.ndarray) -> None:
    """The quality of a leg: the deeper, the worse."""
    density = Density(log10_edges=[-1.0, 0.0], counts=[F], never=0, freq_over_1_percent=1.0, freq_over_10_percent=0.0)
    metrics = EvaluationMetrics(
        n_tokens=test.size,
        density=density,
        l0=4.0,
        fvu=0.1 + leg.layer / 100,
        balanced_fvu=0.2 + leg.layer / 100,
        frac_alive=0.9,
        delta_ce=0.1,
        delta_ce_se=0.01,
        ce_loss_score=0.98,
        ce_loss_without_sae=2.5,
    )
    asked = EvaluationQuestion(tokens=test.size, ce=True, ages=[])
    Evaluation(asked=asked, leg=leg.id, metrics=metrics, snapshots={}).save(paths.evaluation(leg.id))


def fake_features(paths: RunDirectory, leg: Leg, test: np.ndarray, rng: np.random.Generator) -> None:
    """Latent 0 is silent, 1 fires on the hostile tokens, 2 on all tokens, and KNOWN on the needle."""
    E, before, after = 3, 4, 2
    sequence = np.stack([rng.permutation(SEQUENCES)[:E] for _ in range(F)]).astype(np.int32)
    position = rng.integers(11, CONTEXT, (F, E)).astype(np.int32)
    window = rng.random((F, E, before + 1 + after)) * (rng.random((F, E, before + 1 + after)) < 0.3)
    window[:, :, before] = np.sort(1 + rng.random((F, E)))[:, ::-1]
    sequence[0] = -1
    sequence[1], position[1] = 1, [3, 5, 8]
    if leg.layer == KNOWN[0]:
        sequence[KNOWN[1]], position[KNOWN[1]] = [0, -1, -1], 10
    fired = rng.integers(1, 20, F).astype(np.int32)
    fired[0] = 0
    fired[2] = test.size
    facts = FeatureFacts(
        leg=leg.id, layer=leg.layer, n_sequences=SEQUENCES, n_tokens=test.size, n_examples=E, context=CONTEXT,
        window_before=before, window_after=after, histogram_first_edge=-2.0,
    )  # fmt: skip
    Features(
        facts=facts,
        n_fired=torch.from_numpy(fired),
        max_activation=torch.from_numpy(window[:, 0, before] * (fired > 0)).float(),
        mean_activation=torch.from_numpy(rng.random(F)).float(),
        histogram=torch.from_numpy(rng.integers(0, 3, (F, 6)).astype(np.int32)),
        example_sequence=torch.from_numpy(sequence),
        example_position=torch.from_numpy(position),
        example_window=torch.from_numpy(window).half(),
        top_logits=torch.from_numpy(rng.integers(0, 60, (F, 10)).astype(np.int32)),
        top_logits_values=torch.from_numpy(rng.random((F, 10))).float(),
        bottom_logits=torch.from_numpy(rng.integers(0, 60, (F, 10)).astype(np.int32)),
        bottom_logits_values=torch.from_numpy(-rng.random((F, 10))).float(),
    ).save(paths.features(leg.id))


def fake_lineage(suite: Suite, rng: np.random.Generator) -> None:
    """By index from layer to layer, by a permutation to the controls."""
    legs = suite.one_per_site
    pairs: list[tuple[Any, Leg, Leg]] = [("depth", a, b) for a, b in zip(legs, legs[1:], strict=False)]
    pairs += [("control", suite.leg(leg.control_of), leg) for leg in suite.legs if leg.control_of]
    links = []
    for kind, source, target in pairs:
        correlation: list[float | None] = rng.random(F).round(4).tolist()
        correlation[0] = None
        link = LineageLink(
            kind=kind,
            source=source.id,
            target=target.id,
            source_layer=source.layer,
            target_layer=target.layer,
            by="assignment" if kind == "control" else "index",
            partner=rng.permutation(F).tolist() if kind == "control" else None,
            decoder_cosine=rng.random(F).round(4).tolist(),
            encoder_cosine=rng.random(F).round(4).tolist(),
            correlation=correlation,
            status="-" + "".join(rng.choice(list("kdrxb"), F - 1)),
        )
        links.append(link)
    LineageDocument(
        model="fake", n_sequences=SEQUENCES, n_tokens=192, map_tokens=1024, kept_above=0.7, replaced_below=0.3,
        alive_above=0, legs={leg.id: LineageLeg(layer=leg.layer, n_latents=F) for leg in suite.legs}, links=links,
    ).save(suite.directory.lineage)  # fmt: skip


def fake_matrix(suite: Suite, rng: np.random.Generator) -> None:
    """Every leg of the suite on every layer, copied and carried."""
    cells = []
    for source in suite.one_per_site:
        for target in suite.one_per_site:
            for method in ("identity",) if source is target else ("identity", "affine"):
                cell = MatrixCell(
                    leg=source.id, tokens=source.budget_tokens, snapshot=False, method=method, source=source.layer,
                    target=target.layer, fvu=float(rng.random()), l0=4.0,
                )  # fmt: skip
                cells.append(cell)
    legs = {leg.id: [leg.budget_tokens] for leg in suite.one_per_site}
    asked = MatrixQuestion(tokens=192, methods=["affine", "identity"], ce=True, layers=[0, 1, 2], legs=legs)
    Matrix(
        model="fake", module="resid_post", n_tokens=192, map_tokens=1024, asked=asked, layers=[0, 1, 2], cells=cells
    ).save(suite.directory.matrix)


def fake_interpretations(suite: Suite) -> None:
    """Explanations of latents 1 and 2 of two legs by a hostile model; latent 3 could not be explained."""
    score = MeanScore(mean=0.75, standard_error=0.25, n=2)
    for leg in suite.legs[:2]:
        asked = {"n_pieces": 40, "n_questions": 3, "n_failed": 0, "tokens_in": 9, "tokens_out": 9}
        latents = [
            InterpretedLatent(latent=3, explanation=None, **asked),
            InterpretedLatent(latent=1, explanation=EXPLANATION, detection=0.5, fuzzing=0.25, **asked),
            InterpretedLatent(latent=2, explanation="two", detection=1.0, **asked),
        ]
        Interpretation(
            leg=leg.id, layer=leg.layer, module=leg.module, origin=suite.origin(leg), parent=leg.parent or None,
            model="fake", asked=AskedModel(model="<b>asked</b>", endpoint="http://localhost", body={}), seed=0,
            n_tokens=192, piece_tokens=24, n_latents=3, n_explained=2, n_rare=0, n_failed=1, n_failed_questions=0,
            detection=score, fuzzing=score.changed(standard_error=None),
            cost=AnswerCost(n_questions=9, tokens_in=27, tokens_out=27, usd=None), latents=latents,
        ).save(suite.directory.interpretation(leg.id))  # fmt: skip


def write_studies(suite: Suite) -> None:
    """What judges said and what a task rests on, both by hostile names."""
    tally: dict[str, Any] = {"share": 0.5, "low": 0.1, "high": 0.9, "n_judged": 4, "n_latents": 5, "n_tied": 1}
    tally |= {"n_interpretable": 2, "origin": "scratch"}
    counts = {"n_yes": 2, "n_no": 2, "n_skip": 0, "n_left": 1, "share": 0.5, "low": 0.1, "high": 0.9}
    Scores(
        page="0" * 12, model="fake", seed=0, n=5, n_tokens=192,
        judges=[JudgeTally(judge=HOSTILE[1], **counts), JudgeTally(judge="b", **counts)],
        origins=[OriginTally(**tally)],
        layers=[LayerTally(layer=1, module="resid_post", leg="L1", kind="root", **tally)],
        differences=[],
        agreement=[Agreement(judges=[HOSTILE[8], "b"], raw=0.75, kappa=None, n_latents=4)],
    ).save(suite.directory.judging / "scores.json")  # fmt: skip
    circuit = Circuit(k=4, faithfulness=0.9, faithfulness_se=0.1, completeness=None, completeness_se=None)
    legs = [
        CircuitLeg(
            leg=leg.id, layer=leg.layer, module=leg.module, role=leg.role, parent=leg.parent or None,
            control_of=leg.control_of or None, control_kind=leg.control_kind or None, tokens=leg.budget_tokens,
            n_latents=F, circuits=[circuit], latents=[1], effects=[1.0], m_empty=[0.0], m_kept=[[1.0]],
            m_ablated=[[0.0]],
        )
        for leg in suite.legs
    ]  # fmt: skip
    Circuits(
        asked=CircuitQuestion(task="<b>sums", prompts="0", n_prompts=9, seed=0, method="attribution", k=[4]),
        description=HOSTILE[9], model="fake", revision="", dtype="float32", n_found_on=4, n_judged_on=5,
        n_tokens=[3, 3], means="of each position", accuracy=0.9, accuracy_needed=0.7, m=2.0, m_se=0.1, clean=[2.0],
        legs=legs, differences=[],
    ).save(suite.directory.circuits('"><b>sums'))  # fmt: skip


def summary_of(suite: Suite) -> Summary:
    """The summary of a fake run."""
    return summarise(suite, Corpus.open(suite.directory.tokens))


def sources_of(suite: Suite, summary: Summary | None = None) -> ReportSources:
    """What a report of a fake run shows."""
    matrix = Matrix.load_if_any(suite.directory.matrix)
    sources = report_sources(Session(suite), summary or summary_of(suite), matrix, None)
    return replace(sources, token_text=token_text)
