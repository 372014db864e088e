"""Quality of our SAEs as `sae_lens.evals.run_evals` measures it on their SAELens export, beside our own.

SAELens runs the Hugging Face model (its HookedProxyLM) on the same held-out sequences, without the BOS in front.
Sequences with a second BOS, between documents, are left out: SAELens would leave out that position, too. Where SAEBench
is installed, too (`pip install --no-deps sae-bench==0.6.0 tabulate`), its core evaluation reads the same SAE as a
custom one: its L0 and CE score are compared; its explained variance is known to be wrong.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import saerelay as sr
from saerelay.analysis.metrics import held_out, measure
from saerelay.analysis.suite import Suite
from saerelay.data.corpus import Corpus
from saerelay.demo import MODEL_DIR
from saerelay.interop import write_dictionary
from saerelay.interop.names import site_named
from saerelay.interop.origin import Origin
from saerelay.lm.model import load_model
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import DataSpec, EvaluateSpec, ModelSpec, PlanSpec, SitesSpec
from saerelay.sae.spec import DictionarySpec

BATCH = 8
NAMES = ("explained_variance", "l0", "ce_loss_score", "ce_loss_with_sae", "ce_loss_with_ablation", "mse", "cossim")


def compare_evals(directory: Path | None) -> list[dict[str, Any]]:
    """A row for each leg of a finished run (a causal model in float32, data.outlier_norm = 0), or of tiny ones."""
    if directory:
        return compare_suite(sr.load(directory))
    rows = []
    for architecture in ("topk", "batchtopk", "jumprelu", "relu"):
        run = sr.Run(
            model=ModelSpec(dtype="float32"),
            sites=SitesSpec(layers=[2, 5]),
            data=DataSpec(epochs=2, outlier_norm=0),
            dictionary=DictionarySpec(architecture=architecture, n_latents=768, k=16, target_l0=16),
            plan=PlanSpec(root_tokens=60_000, transfer_tokens=20_000, moment_tokens=20_000, refit_tokens=10_000),
            evaluate=EvaluateSpec(tokens=16_384),
        )
        with tempfile.TemporaryDirectory() as scratch:
            rows += compare_suite(sr.train_run(run, Path(scratch) / "run"))
    return rows


def compare_suite(suite: Suite) -> list[dict[str, Any]]:
    """A row for each leg."""
    plan = suite.plan
    test = held_out(plan, Corpus.open(suite.directory.tokens).test, plan.recipe.evaluate.tokens)
    sequences = test[(test == plan.facts.tokens.bos_token_id).sum(axis=1) == 1]
    sequences = sequences[: len(sequences) // BATCH * BATCH]
    dictionaries = {leg.id: (leg.site, suite[leg.id]) for leg in suite.legs}
    ours = measure(plan, load_model(plan), sequences, dictionaries, ce=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_directory(plan)))
    paths = {site_named(name): name for name, _ in skeleton.named_modules()}
    rows = []
    for leg in suite.legs:
        origin = Origin(
            model=plan.facts.name, site=leg.site, module_path=paths[leg.site], context=plan.recipe.data.context,
            prepend_bos=plan.recipe.data.prepend_bos,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            write_dictionary(Path(scratch), suite[leg.id], origin, "saelens")
            theirs = saelens_metrics(Path(scratch), plan, sequences)
        row: dict[str, Any] = {"leg": leg.id, "architecture": suite[leg.id].architecture, "tokens": sequences.size}
        for name in NAMES:
            row[name] = [getattr(ours[leg.id], name), theirs[name]]
        off = {name: abs(a - b) for name in NAMES[:3] for a, b in [row[name]]}
        if "saebench_l0" in theirs:
            row |= {f"saebench_{name}": theirs[f"saebench_{name}"] for name in NAMES[:3]}
            off |= {f"saebench_{name}": abs(row[name][0] - theirs[f"saebench_{name}"]) for name in NAMES[1:3]}
        rows.append(row | {"off": off, "ok": max(off.values()) < 1e-3})
    return rows


def saelens_metrics(directory: Path, plan: Plan, sequences: Any) -> dict[str, float]:
    """What SAELens says of the SAE in a directory."""
    from datasets import Dataset
    from sae_lens import SAE, ActivationsStore, run_evals
    from sae_lens.evals import EvalConfig
    from sae_lens.load_model import load_model as load_theirs
    from sae_lens.training.activation_scaler import ActivationScaler

    sae = SAE.load_from_disk(directory)
    check_saebench_interface(sae)
    hook = sae.cfg.metadata.hook_name = sae.cfg.metadata.hf_hook_name
    model = load_theirs("AutoModelForCausalLM", model_directory(plan), "cpu", {"dtype": torch.float32}, [hook])
    dataset = Dataset.from_dict({"tokens": sequences.astype(int).tolist()})
    store = ActivationsStore.from_sae(model, sae, dataset, streaming=False, total_tokens=1)
    n_batches = len(sequences) // BATCH
    config = EvalConfig(
        batch_size_prompts=BATCH, n_eval_reconstruction_batches=n_batches, n_eval_sparsity_variance_batches=n_batches,
        compute_ce_loss=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
    )  # fmt: skip
    bos = [plan.facts.tokens.bos_token_id]
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=bos)
    found = {name: value for group in metrics.values() for name, value in group.items()}
    if find_spec("sae_bench"):
        store = ActivationsStore.from_sae(model, sae, dataset, streaming=False, total_tokens=1)
        bench = saebench_metrics(sae, hook, model, store, n_batches, set(bos))
        found |= {f"saebench_{name}": value for name, value in bench.items()}
    return found


def model_directory(plan: Plan) -> str:
    """What Hugging Face loads the run's model by."""
    return str(MODEL_DIR) if plan.facts.name == "demo" else plan.facts.name


def saebench_metrics(sae: Any, hook: str, model: Any, store: Any, n_batches: int, bos: set[int]) -> dict[str, float]:
    """What SAEBench's core evaluation says of a custom SAE with our weights."""
    from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig
    from sae_bench.evals.core.main import CoreEvalConfig, run_evals

    cfg = CustomSAEConfig("demo", sae.cfg.d_in, sae.cfg.d_sae, int(hook.rsplit(".", 1)[1]), hook, dtype="float32")
    custom = SimpleNamespace(
        cfg=cfg, W_enc=sae.W_enc, W_dec=sae.W_dec, b_enc=sae.b_enc, b_dec=sae.b_dec, device=sae.device, dtype=sae.dtype,
        encode=sae.encode, decode=sae.decode,
    )  # fmt: skip
    config = CoreEvalConfig(
        batch_size_prompts=BATCH, n_eval_reconstruction_batches=n_batches, n_eval_sparsity_variance_batches=n_batches,
        compute_ce_loss=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
    )  # fmt: skip
    metrics, _ = run_evals(custom, store, model, config, ignore_tokens=bos)
    return {name: value for group in metrics.values() for name, value in group.items()}


def check_saebench_interface(sae: Any) -> None:
    """What SAEBench asks of a custom SAE: shapes of the weights, unit decoder rows, encode, decode and forward."""
    d_in, d_sae = sae.cfg.d_in, sae.cfg.d_sae
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    for name, shape in shapes.items():
        if tuple(getattr(sae, name).shape) != shape:
            raise AssertionError(f"{name} has shape {tuple(getattr(sae, name).shape)}, expected {shape}")
    norms = sae.W_dec.norm(dim=1)
    if (norms - 1).abs().max() > 1e-4:
        raise AssertionError(f"decoder norms from {norms.min()} to {norms.max()}")
    x = torch.randn(2, 3, d_in)
    torch.testing.assert_close(sae(x), sae.decode(sae.encode(x)))
