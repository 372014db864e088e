"""A finished run made of nothing: every file that a report reads, random but in shape, and with hostile tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from saerelay.analysis.features import load_features
from saerelay.analysis.suite import Suite, load
from saerelay.data.corpus import Corpus, CorpusFacts
from saerelay.files import finite, write_json, write_text
from saerelay.planning.compile import compile_plan
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import Run
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.training import DictionaryInfo

F, CONTEXT, SEQUENCES, V = 600, 24, 8, 101
FACTS = ModelFacts(
    name="<i>model</i>", revision="", family="gpt_neox", dtype="float32", device="cpu", n_layers=3, d_model=16,
    d_attn_z=16, vocab_size=V, max_context=64, bos_token_id=0, eos_token_id=0, has_lm_head=True, layer_params=3000,
    model_params=25000,
)  # fmt: skip
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
    """Three layers, the middle one from scratch, and a control; features, lineage, matrix and measures."""
    sections: dict[str, Any] = {"sites": {"layers": [0, 1, 2]}, "dictionary": {"n_latents": F, "k": 4}}
    sections |= {"plan": {"root_tokens": 8192, "transfer_tokens": 2048, "moment_tokens": 1024, "controls": [0]}}
    sections |= {"data": {"context": CONTEXT}, "train": {"batch_tokens": 96}}
    plan = compile_plan(Run.parse(sections, source="test"), FACTS)
    paths, rng = RunDirectory(root), np.random.default_rng(0)
    write_text(paths.plan, plan.to_json())
    for split in ("train", "validation", "test"):
        paths.tokens.mkdir(parents=True, exist_ok=True)
        np.save(paths.tokens / f"{split}.npy", rng.integers(0, V - 1, size=(SEQUENCES, CONTEXT)).astype(np.uint16))
    test = np.load(paths.tokens / "test.npy")
    test[0, 10] = V - 1
    test[1, :9] = range(1, 10)
    np.save(paths.tokens / "test.npy", test)
    corpus = CorpusFacts(
        source="<b>text</b>", context=CONTEXT, prepend_bos=False, n_documents=9, train_sequences=SEQUENCES,
        validation_sequences=SEQUENCES, test_sequences=SEQUENCES, complete=True,
    )  # fmt: skip
    corpus.save(paths.tokens / "corpus.json")
    Corpus.open(paths.tokens)
    lines = [
        {"cursor": n, "leg": leg.id, "age": n, "loss": 1 / n, "fvu": 1 / n, "l0": 4.0, "n_dead": 0,
         "learning_rate": 1e-3, "seconds": 1.0}
        for n in (1024, 2048) for leg in plan.legs
    ]  # fmt: skip
    write_text(paths.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    for leg in plan.legs:
        info = DictionaryInfo(
            architecture="topk", k=4, d_model=16, n_latents=F, tokens=leg.budget_tokens, seconds=2.0, lr=leg.lr
        )
        info.save(paths.leg(leg.id) / "dictionary.json")
        metrics = {"n_tokens": test.size, "l0": 4.0, "fvu": 0.1 + leg.layer / 100, "frac_alive": 0.9}
        metrics |= {"delta_ce": 0.1, "delta_ce_se": 0.01, "ce_loss_score": 0.98, "ce_loss_without_sae": 2.5}
        tokens = plan.run.evaluate.tokens
        asked = {"tokens": min(tokens, test.size), "ce": True}
        write_json(paths.evaluation(leg.id), {"asked": asked, "metrics": metrics, "snapshots": {}})
        fake_features(paths, leg.id, leg.layer, test, rng)
    suite = load(root)
    fake_lineage(suite, rng)
    fake_interpretations(suite)
    legs = suite.final_legs
    cells = [
        {"leg": a.id, "tokens": 1, "snapshot": False, "source": a.layer, "target": b.layer, "method": method,
         "fvu": float(rng.random()), "l0": 4.0}
        for a in legs for b in legs for method in ("identity", "affine") if a is not b or method == "identity"
    ]  # fmt: skip
    about = {"model": "fake", "split": "test", "n_tokens": test.size, "map_tokens": 1024, "layers": [0, 1, 2]}
    write_json(paths.matrix, about | {"module": "resid_post", "cells": cells})
    return suite


def fake_features(paths: RunDirectory, leg_id: str, layer: int, test: np.ndarray, rng: np.random.Generator) -> None:
    """Latent 0 is silent, latent 1 fires on the hostile tokens, and KNOWN on the needle."""
    E, before, after = 3, 4, 2
    sequence = np.stack([rng.permutation(SEQUENCES)[:E] for _ in range(F)]).astype(np.int32)
    position = rng.integers(11, CONTEXT, (F, E)).astype(np.int32)
    window = rng.random((F, E, before + 1 + after)) * (rng.random((F, E, before + 1 + after)) < 0.3)
    window[:, :, before] = np.sort(1 + rng.random((F, E)))[:, ::-1]
    sequence[0] = -1
    sequence[1], position[1] = 1, [3, 5, 8]
    if layer == KNOWN[0]:
        sequence[KNOWN[1]], position[KNOWN[1]] = [0, -1, -1], 10
    fired = rng.integers(1, 20, F).astype(np.int32)
    fired[0] = 0
    tensors = {
        "n_fired": fired, "max_activation": window[:, 0, before] * (fired > 0), "mean_activation": rng.random(F),
        "histogram": rng.integers(0, 3, (F, 6)).astype(np.int32), "example_sequence": sequence,
        "example_position": position, "example_window": window.astype(np.float16),
        "top_logits": rng.integers(0, 60, (F, 10)).astype(np.int32), "top_logits_values": rng.random((F, 10)),
        "bottom_logits": rng.integers(0, 60, (F, 10)).astype(np.int32), "bottom_logits_values": -rng.random((F, 10)),
    }  # fmt: skip
    facts = {"schema": 1, "leg": leg_id, "layer": layer, "n_tokens": int(test.size), "window_before": before}
    facts |= {"window_after": after, "histogram_first_edge": -2.0, "context": CONTEXT, "above": None, "below": None}
    path = paths.features(leg_id)
    path.parent.mkdir(exist_ok=True)
    floats = {"max_activation", "mean_activation", "top_logits_values", "bottom_logits_values"}
    save_file(
        {n: torch.from_numpy(np.ascontiguousarray(v)).float() if n in floats else torch.from_numpy(v.copy())
         for n, v in tensors.items()},
        path, {"facts": json.dumps(facts)},
    )  # fmt: skip
    load_features(paths, leg_id)


def fake_lineage(suite: Suite, rng: np.random.Generator) -> None:
    """By index from layer to layer, by a permutation to the control."""
    legs, links = suite.final_legs, []
    pairs = [("depth", a.id, b.id) for a, b in zip(legs, legs[1:], strict=False)]
    pairs += [("control", leg.control_of, leg.id) for leg in suite.legs if leg.control_of]
    for kind, source, target in pairs:
        lists = {name: rng.random(F).round(4).tolist() for name in ("decoder_cosine", "encoder_cosine", "correlation")}
        lists["correlation"][0] = None
        status = "-" + "".join(rng.choice(list("kdrxb"), F - 1))
        partner = rng.permutation(F).tolist() if kind == "control" else None
        layers = [suite.plan.leg(leg_id).layer for leg_id in (source, target)]
        link = {"kind": kind, "source": source, "target": target, "source_layer": layers[0], "target_layer": layers[1]}
        links.append(link | {"by": "assignment" if partner else "index", "partner": partner, "status": status} | lists)
    about = {
        "model": "fake",
        "map_tokens": 1024,
        "n_tokens": 192,
        "kept_above": 0.7,
        "replaced_below": 0.3,
        "alive_above": 0,
    }
    write_json(suite.directory.lineage, finite(about | {"links": links}))


def fake_interpretations(suite: Suite) -> None:
    """Explanations of latents 1 and 2 of two legs by a hostile model; latent 3 could not be explained."""
    for leg in suite.legs[:2]:
        score = {"mean": 0.75, "standard_error": 0.25, "n": 2}
        entry = {"explanation": None, "detection": None, "fuzzing": None}
        latents = [
            entry | {"latent": 3},
            entry | {"latent": 1, "explanation": EXPLANATION, "detection": 0.5, "fuzzing": 0.25},
        ]
        latents.append(entry | {"latent": 2, "explanation": "two", "detection": 1.0, "fuzzing": None})
        document = {"schema": 1, "leg": leg.id, "layer": leg.layer, "origin": "from above" if leg.parent else "scratch"}
        document |= {"parent": leg.parent or None, "asked": {"model": "<b>asked</b>"}, "n_explained": 2, "n_failed": 1}
        document |= {
            "n_rare": 0,
            "n_failed_questions": 0,
            "detection": score,
            "fuzzing": score | {"standard_error": None},
        }
        write_json(suite.directory.interpretation(leg.id), document | {"latents": latents})


def write_studies(suite: Suite) -> None:
    """What judges said and what a task rests on, both by hostile names."""
    share = {"share": 0.5, "low": 0.1, "high": 0.9, "n_judged": 4, "n_latents": 5, "n_tied": 1}
    scores: dict[str, Any] = {"n": 5, "seed": 0, "origins": [{"origin": "scratch"} | share]}
    scores |= {"layers": [{"layer": 1, "origin": "scratch"} | share], "judges": [{"judge": HOSTILE[1]}, {"judge": "b"}]}
    scores["agreement"] = [{"judges": [HOSTILE[8], "b"], "raw": 0.75, "kappa": None, "n_latents": 4}]
    write_json(suite.directory.judging / "scores.json", scores)
    circuit = {"k": 4, "faithfulness": 0.9, "faithfulness_se": 0.1, "completeness": None, "completeness_se": None}
    asked = {"task": "<b>sums", "method": "attribution", "n_prompts": 9, "k": [4], "seed": 0}
    rows = [{"leg": leg.id, "layer": leg.layer, "control_of": leg.control_of or None} for leg in suite.legs]
    circuits: dict[str, Any] = {"asked": asked, "n_found_on": 4, "n_judged_on": 5, "description": HOSTILE[9]}
    circuits |= {"accuracy": 0.9, "m": 2.0, "m_se": 0.1, "legs": [row | {"circuits": [circuit]} for row in rows]}
    write_json(suite.directory.circuits('"><b>sums'), circuits)
