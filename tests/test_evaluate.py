"""Quality against its definitions, computed the slow way; sharing changes nothing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saerelay.analysis.logits import CleanStates
from saerelay.analysis.metrics import measure
from saerelay.analysis.progress import Done, ProgressDisplay
from saerelay.analysis.sums import density
from saerelay.errors import ModelError, RunDirectoryError
from saerelay.lm.facts import read_facts
from saerelay.lm.model import LanguageModel
from saerelay.planning.compile import compile_plan
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

torch.set_num_threads(1)
LAYERS = [2, 5]


@pytest.fixture(scope="module")
def setting() -> tuple[Plan, LanguageModel, np.ndarray, dict[str, tuple[Site, Dictionary]]]:
    sections = {"model": {"dtype": "float32", "device": "cpu"}, "sites": {"layers": LAYERS}, "data": {"context": 32}}
    run = Recipe.parse(sections | {"dictionary": {"n_latents": 64, "k": 8}}, source="test")
    plan = compile_plan(run, read_facts(run.model))
    rng = np.random.default_rng(0)
    sequences = rng.integers(1, 4096, size=(6, 32)).astype(np.uint16)
    sequences[:, 0] = 0
    model = LanguageModel.load(run.model)
    dictionaries = {}
    for layer in LAYERS:
        x = model.harvest(torch.from_numpy(sequences.astype(np.int64)), [Site(layer)])[Site(layer)].flatten(0, 1)
        U, S, Vt = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
        W = torch.cat([Vt[:32], -Vt[:32]])
        for k in (4, 16):
            sae = Dictionary(architecture="topk", k=k, W_enc=W, b_enc=-W @ x.mean(dim=0), W_dec=W, b_dec=x.mean(dim=0))
            dictionaries[f"L{layer}k{k}"] = (Site(layer), sae)
    return plan, model, sequences, dictionaries


def slowly(model: LanguageModel, tokens: torch.Tensor, site: Site, sae: Dictionary) -> dict[str, float]:
    """Every metric from whole tensors, one forward at a time (field definitions: SAELens 6.54)."""
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False
    x = model.harvest(tokens, [site])[site]
    rows = x[keep].double()
    z = sae.encode(x[keep]).double()
    x_hat = sae(x[keep]).double()

    def replaced(h: torch.Tensor) -> torch.Tensor:
        return torch.where(keep[..., None], sae(h), h)

    clean = model.logits(tokens).double().log_softmax(-1)
    with model.splice(site, replaced):
        with_sae = model.logits(tokens).double().log_softmax(-1)
    with model.splice(site, torch.zeros_like):
        zero = model.logits(tokens).double().log_softmax(-1)

    def ce(log_p: torch.Tensor) -> torch.Tensor:
        return -log_p[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)

    def kl(log_q: torch.Tensor) -> float:
        return float((clean.exp() * (clean - log_q)).sum(-1)[keep].mean())

    inner = keep[:, :-1]
    ce_clean, ce_sae, ce_zero = (float(ce(p)[inner].mean()) for p in (clean, with_sae, zero))
    error = (rows - x_hat).square().sum(1).mean()
    variance = rows.square().sum(1).mean() - rows.mean(0).square().sum()
    deltas = ((ce(with_sae) - ce(clean)) * inner).sum(1) / inner.sum(1)
    return {
        "l0": float((z != 0).sum(1).double().mean()),
        "l1": float(z.sum(1).mean()),
        "mse": float(error),
        "fvu": float(error / variance),
        "explained_variance": float(1 - error / variance),
        "cossim": float(torch.nn.functional.cosine_similarity(rows, x_hat).mean()),
        "l2_ratio": float((x_hat.norm(dim=1) / rows.norm(dim=1)).mean()),
        "frac_alive": float((z != 0).any(0).double().mean()),
        "ce_loss_without_sae": ce_clean,
        "ce_loss_with_sae": ce_sae,
        "ce_loss_with_ablation": ce_zero,
        "delta_ce": ce_sae - ce_clean,
        "delta_ce_se": float(deltas.std() / len(deltas) ** 0.5),
        "ce_loss_score": (ce_zero - ce_sae) / (ce_zero - ce_clean),
        "kl_div_with_sae": kl(with_sae),
        "kl_div_with_ablation": kl(zero),
        "kl_div_score": (kl(zero) - kl(with_sae)) / kl(zero),
    }


def test_every_metric_is_its_definition(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model, sequences, dictionaries = setting
    monkeypatch.setattr("saerelay.analysis.metrics.BATCH_TOKENS", 2 * 32)
    results = measure(plan, model, sequences, dictionaries, ce=True)
    tokens = torch.from_numpy(sequences.astype(np.int64))
    for key, (site, sae) in dictionaries.items():
        for name, value in slowly(model, tokens, site, sae).items():
            assert getattr(results[key], name) == pytest.approx(value, rel=2e-4, abs=1e-6), (key, name)
        assert results[key].n_tokens == 6 * 31


def test_sharing_forwards_changes_nothing(setting) -> None:
    plan, model, sequences, dictionaries = setting
    together = measure(plan, model, sequences, dictionaries, ce=True)
    for key, value in dictionaries.items():
        alone = measure(plan, model, sequences, {key: value}, ce=True)[key].model_dump()
        shared = together[key].model_dump()
        for name in ("density", "left_out"):
            assert alone.pop(name) == shared.pop(name)
        assert alone.pop("sequence_delta_ce") == pytest.approx(shared.pop("sequence_delta_ce"))
        assert alone == pytest.approx(shared)


def test_where_vocabulary_and_rows_are_cut_changes_nothing(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model, sequences, dictionaries = setting
    whole = measure(plan, model, sequences, dictionaries, ce=True)
    monkeypatch.setattr("saerelay.analysis.logits.ROWS", 50)
    monkeypatch.setattr("saerelay.analysis.logits.PART", 300)
    monkeypatch.setattr("saerelay.analysis.logits.PARTS", 3)
    monkeypatch.setattr("saerelay.analysis.logits.STRIPE", 16)
    monkeypatch.setattr("saerelay.analysis.metrics.STATES_BYTES", 1)  # one dictionary at a time
    cut = measure(plan, model, sequences, dictionaries, ce=True)
    for key, metrics in whole.items():
        for name in ("ce_loss_with_sae", "ce_loss_with_ablation", "kl_div_with_sae", "kl_div_with_ablation"):
            assert getattr(cut[key], name) == pytest.approx(getattr(metrics, name), rel=1e-6), (key, name)


def test_logits_of_any_size_have_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of the vocabulary whose largest logits lie further apart than exp can hold."""
    monkeypatch.setattr("saerelay.analysis.logits.PART", 1)
    states = torch.tensor([[[-200.0, 900.0, 3.0], [950.0, -400.0, 940.0]]])
    changed = torch.tensor([[[0.0, 850.0, 847.0], [948.0, 949.0, 0.0]]])
    tokens = torch.tensor([[0, 1]])
    clean = CleanStates(EveryLogit(), states, tokens, keep=torch.ones(1, 2, dtype=torch.bool))  # type: ignore[arg-type]
    row = torch.tensor([5.0, 7.0, 6.0])
    p = states.double().log_softmax(-1)
    for loss, logits in zip(clean.losses([changed], [row]), (states, changed, row.expand(1, 2, 3)), strict=True):
        q = logits.double().log_softmax(-1)
        assert loss.ce.tolist() == [pytest.approx([-float(q[0, 0, 1])], abs=1e-6)]
        assert loss.kl[0].tolist() == pytest.approx((p.exp() * (p - q)).sum(-1)[0].tolist(), abs=1e-3)


class EveryLogit:
    """A head whose states are logits; as a vocabulary of three, cut into parts of one."""

    n_tokens = 3

    @staticmethod
    def logits(states: torch.Tensor, tokens: slice) -> torch.Tensor:
        return states[..., tokens]


def test_a_head_that_gives_no_part_of_its_logits_is_measured_whole(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model, sequences, dictionaries = setting
    monkeypatch.setattr("saerelay.analysis.metrics.LOGIT_BYTES", 2 * 4 * 32 * 4096)  # two sequences per batch
    expected = measure(plan, model, sequences, dictionaries, ce=True)
    whole = LanguageModel(model.hf_model, model.facts)
    whole.head._shadow = None
    found = measure(plan, whole, sequences, dictionaries, ce=True)
    for key, metrics in expected.items():
        assert found[key].model_dump(exclude={"density", "left_out", "sequence_delta_ce"}) == pytest.approx(
            metrics.model_dump(exclude={"density", "left_out", "sequence_delta_ce"}), rel=1e-5
        )


class Counted(ProgressDisplay):
    """Counts steps without showing them."""

    def __init__(self) -> None:
        super().__init__(None)
        self.n_steps = self.n_done = 0

    @contextmanager
    def counting(self, n_steps: int, label: str) -> Iterator[Done]:
        self.n_steps = n_steps
        yield self.count

    def count(self) -> None:
        self.n_done += 1


@pytest.mark.parametrize("ce", [True, False])
def test_progress_counts_every_dictionary_of_every_batch(setting, monkeypatch: pytest.MonkeyPatch, ce: bool) -> None:
    plan, model, sequences, dictionaries = setting
    monkeypatch.setattr("saerelay.analysis.metrics.BATCH_TOKENS", 2 * 32)  # three batches
    display = Counted()
    measure(plan, model, sequences, dictionaries, ce=ce, display=display)
    assert display.n_done == display.n_steps == 3 * 4 * (2 if ce else 1)


def test_a_perfect_reconstruction_costs_nothing(setting) -> None:
    plan, model, sequences, _ = setting
    eye = torch.eye(192)
    both = torch.cat([eye, -eye])
    perfect = Dictionary(architecture="relu", W_enc=both, b_enc=torch.zeros(384), W_dec=both, b_dec=torch.zeros(192))
    result = measure(plan, model, sequences, {"p": (Site(2), perfect)}, ce=True)["p"]
    assert result.fvu == pytest.approx(0, abs=1e-10) and result.delta_ce == pytest.approx(0, abs=1e-5)
    assert result.ce_loss_score == pytest.approx(1, abs=1e-5) and result.frac_alive > 0.9


def test_predicting_the_mean_explains_nothing(setting) -> None:
    plan, model, sequences, _ = setting
    x = model.harvest(torch.from_numpy(sequences.astype(np.int64)), [Site(2)])[Site(2)][:, 1:].flatten(0, 1)
    zeros = torch.zeros(4, 192)
    mean = Dictionary(architecture="relu", W_enc=zeros, b_enc=torch.zeros(4), W_dec=zeros, b_dec=x.mean(dim=0))
    result = measure(plan, model, sequences, {"m": (Site(2), mean)}, ce=False)["m"]
    assert result.explained_variance == pytest.approx(0, abs=1e-4) and result.l0 == 0
    assert result.delta_ce is None and result.sequence_delta_ce is None


def test_density_counts_latents() -> None:
    found = density(torch.tensor([0.0, 1e-4, 0.02, 0.5], dtype=torch.float64))
    assert (found.never, sum(found.counts)) == (1, 3)
    assert (found.freq_over_1_percent, found.freq_over_10_percent) == (0.5, 0.25)


def test_ce_of_a_model_without_a_head_is_refused(setting) -> None:
    from saerelay.analysis.metrics import wants_ce

    plan = setting[0]
    headless = plan.changed(facts=plan.facts.changed(has_lm_head=False))
    asked = headless.changed(recipe=Recipe.parse({"evaluate": {"ce": True}}, source="t"))
    assert wants_ce(headless) is False
    with pytest.raises(ModelError, match="has no language-model head, so there is no cross-entropy; set evaluate.ce"):
        wants_ce(asked)


def test_damaged_dictionaries_are_named(tmp_path: Path) -> None:
    from saerelay.runs.dictionaries import publish, read_dictionary

    sae = Dictionary(
        architecture="relu", W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4), b_dec=torch.zeros(4)
    )
    publish(tmp_path / "d", sae, {"layer": 0, "module": "resid_post"})
    good: dict[str, Any] = json.loads((tmp_path / "d/dictionary.json").read_text())
    assert torch.equal(read_dictionary(tmp_path / "d")[0].W_enc, sae.W_enc)
    for change, message in (
        ({"n_latents": 5}, "W_enc has shape"),
        ({"schema": 99}, "schema 99"),
        ({"architecture": "gelu"}, 'unknown architecture "gelu"'),
    ):
        (tmp_path / "d/dictionary.json").write_text(json.dumps(good | change))
        with pytest.raises(RunDirectoryError, match=message):
            read_dictionary(tmp_path / "d")
    (tmp_path / "d/dictionary.json").write_text(json.dumps(good))
    (tmp_path / "d/dictionary.safetensors").write_bytes(b"junk")
    with pytest.raises(RunDirectoryError, match="damaged"):
        read_dictionary(tmp_path / "d")
    with pytest.raises(RunDirectoryError, match="no dictionary here"):
        read_dictionary(tmp_path / "nothing")
