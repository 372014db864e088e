"""Training steps of this tool and of those it is compared with, behind one small class: `step`, `l0`, `inference`.

Each adapter does what its tool's own training loop does for one batch of raw activations, with that tool's defaults
(gradient clipping, dead-latent bookkeeping, schedulers, normalisation), and nothing of its logging, evaluation or
checkpoints. Where a tool lets its user choose, every choice that may be faster is a contestant of its own:

- SAELens (`SAETrainer.step`): float32, bf16 autocast, each also with `compile_sae`, and for TopK
  `use_sparse_activations`, which works only with `rescale_acts_by_decoder_norm=False` (else its backward raises).
  Weights in bf16 (`dtype`) are left out: Adam's steps round away in them.
- dictionary_learning (`trainer.update`): float32; on a GPU also bf16 autocast, which its `trainSAE` ignores elsewhere.
- sparsify (the hook and the step of `Trainer.fit`; TopK only): its default optimizer and precision.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor

from saerelay.planning.leg import Leg, Schedule
from saerelay.planning.recipe import TrainSpec
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.spec import DictionarySpec
from saerelay.training.engine import Trainee
from saerelay.training.state import first_state

Inference = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Raw activations (B, D) to their reconstruction (B, D) and the number of active latents of each row (B)."""


@dataclass(frozen=True)
class Task:
    """What all contestants are asked to train."""

    kind: str
    d_model: int
    n_latents: int
    k: int
    batch: int
    device: str
    lr: float
    steps: int
    warmup: float = 0.02
    decay: float = 0.3
    dead_after_steps: int = 1000
    """Steps without firing after which a latent is dead."""

    def share(self, fraction: float) -> int:
        """A share of all steps, at least one."""
        return max(1, round(fraction * self.steps))


@dataclass(frozen=True, eq=False)
class Start:
    """A dictionary in mid-training, for raw activations, and a bool (F) of its dead latents."""

    dictionary: Dictionary
    dead: Tensor


class Contestant:
    """One tool with one setting; subclasses give `step`, `codes` or `l0`, and `inference`."""

    def step(self, x: Tensor) -> None:
        """One training step on raw activations (B, D), as the tool's own loop takes it."""
        raise NotImplementedError

    def l0(self, x: Tensor) -> float:
        """Mean number of active latents, as selected in training, on x (B, D)."""
        raise NotImplementedError

    def n_dead(self) -> int:
        """Latents that the tool counts as dead."""
        raise NotImplementedError

    def inference(self, x: Tensor) -> Inference:
        """The finished SAE through the tool's own inference path; x are raw training rows, for calibration."""
        raise NotImplementedError


def count(z: Tensor) -> Tensor:
    """Active latents of each row."""
    return (z != 0).sum(dim=-1)


@torch.no_grad()
def calibrate(threshold: Tensor, encode: Callable[[Tensor], Tensor], x: Tensor, k: int) -> None:
    """Set a threshold (in place) to where mean L0 on x (B, D) is k; `encode` reads it."""
    threshold.zero_()
    largest = encode(x).flatten().topk(k * x.shape[0] + 1, sorted=False).values
    threshold.fill_(float(largest.min()))


# --- this tool ------------------------------------------------------------------------------------------------------


class Ours(Contestant):
    """`Trainee.step`, with the encoder product in a given precision."""

    def __init__(
        self, task: Task, first: Tensor, start: Start | None, *, precision: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        keys = {"architecture": task.kind, "n_latents": task.n_latents, "k": task.k, "target_l0": task.k}
        schedule = Schedule(
            budget_tokens=task.steps * task.batch,
            batch_tokens=task.batch,
            lr=task.lr,
            dead_after_tokens=task.dead_after_steps * task.batch,
        )
        leg = Leg(
            id="bench",
            role="root",
            layer=0,
            module="resid_post",
            dictionary=DictionarySpec.parse(keys).sized(first.shape[1]),
            seed=0,
            schedule=schedule,
        )
        spec = TrainSpec.parse(
            {"batch_tokens": task.batch, "warmup": task.warmup, "decay": task.decay, "precision": precision}
        )
        state = first_state(leg, spec, first, start.dictionary if start else None)
        if start:
            state.age = 2 * schedule.dead_after_tokens
            state.last_fired.copy_(torch.where(start.dead, 0, state.age))
        self.trainee = Trainee(leg, spec, state)

    def step(self, x: Tensor) -> None:
        self.trainee.step(x)

    def l0(self, x: Tensor) -> float:
        self.trainee.look()
        self.trainee.step(x)
        progress = self.trainee.look()
        assert progress is not None, self.trainee.state.failure
        return progress.l0

    def n_dead(self) -> int:
        return int(self.trainee.dead().sum())

    def inference(self, x: Tensor) -> Inference:
        dictionary = self.trainee.canonical(x)

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            z = dictionary.encode(x)
            return dictionary.decode(z), count(z)

        return reconstruct


# --- SAELens --------------------------------------------------------------------------------------------------------


class SaeLens(Contestant):
    """`SAETrainer.step`, with activations scaled as its documentation recommends, unless `scaling` is "none"."""

    def __init__(
        self,
        task: Task,
        first: Tensor,
        start: Start | None,
        *,
        autocast: bool = False,
        compiled: bool = False,
        sparse: bool = False,
        scaling: Literal["none", "expected_average_only_in"] = "expected_average_only_in",
    ) -> None:
        import sae_lens as sl
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        common = dict(d_in=task.d_model, d_sae=task.n_latents, device=task.device, dtype="float32",
                      normalize_activations=scaling)  # fmt: skip
        torch.manual_seed(0)
        match task.kind:
            case "topk":
                how = dict(use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse)
                cfg = sl.TopKTrainingSAEConfig(k=task.k, **how, **common)
                self.sae = sl.TopKTrainingSAE(cfg)
            case "batchtopk":
                self.sae = sl.BatchTopKTrainingSAE(sl.BatchTopKTrainingSAEConfig(k=task.k, **common))
            case "jumprelu":
                aim = dict(jumprelu_sparsity_loss_mode="quadratic", target_l0=task.k, l0_warm_up_steps=task.share(0.05))
                self.sae = sl.JumpReLUTrainingSAE(sl.JumpReLUTrainingSAEConfig(**aim, **common))
            case "relu":
                warm = dict(l1_warm_up_steps=task.share(0.05))
                self.sae = sl.StandardTrainingSAE(sl.StandardTrainingSAEConfig(l1_coefficient=5.0, **warm, **common))
        cfg = SAETrainerConfig(
            total_training_samples=task.steps * task.batch,
            train_batch_size_samples=task.batch,
            lr=task.lr,
            lr_end=task.lr / 10,
            lr_warm_up_steps=task.share(task.warmup),
            lr_decay_steps=task.share(task.decay),
            device=task.device,
            autocast=autocast,
            dead_feature_window=task.dead_after_steps,
        )
        self.trainer = SAETrainer(cfg=cfg, sae=self.sae, data_provider=iter(()))
        self.kind, self.k = task.kind, task.k
        scale = 1.0
        if scaling != "none":
            scale = task.d_model**0.5 / float(first.norm(dim=-1).mean())
        self.trainer.activation_scaler.scaling_factor = scale
        if start:
            d, sae = start.dictionary, self.sae
            sae.W_enc.data.copy_(d.W_enc.T)
            sae.W_dec.data.copy_(d.W_dec)
            sae.b_enc.data.copy_(d.b_enc * scale)
            if task.kind == "jumprelu":
                sae.threshold.data.copy_(d.threshold * scale)
            self.trainer.n_forward_passes_since_fired[start.dead] = 2 * task.dead_after_steps
        if compiled:
            self.sae.training_forward_pass = torch.compile(self.sae.training_forward_pass, backend="inductor")

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def l0(self, x: Tensor) -> float:
        z = self.trainer.step(x).feature_acts
        return float(count(z.to_dense()).float().mean())

    def n_dead(self) -> int:
        return int(self.trainer.dead_neurons.sum())

    def save(self, folder: str) -> None:
        """Write the finished SAE in the tool's own format, for raw activations; training cannot go on afterwards."""
        self.sae.fold_activation_norm_scaling_factor(self.trainer.activation_scaler.scaling_factor)
        self.sae.save_inference_model(folder)

    def inference(self, x: Tensor) -> Inference:
        import sae_lens as sl

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            sae = sl.SAE.load_from_disk(folder, device=str(x.device))
        if self.kind == "batchtopk":
            calibrate(sae.threshold.data, sae.encode, x, self.k)

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            z = sae.encode(x)
            return sae.decode(z), count(z)

        return reconstruct


# --- dictionary_learning --------------------------------------------------------------------------------------------


class DictionaryLearning(Contestant):
    """`trainer.update` on activations scaled to a mean squared norm of 1, as `trainSAE(normalize_activations=True)`."""

    def __init__(self, task: Task, first: Tensor, start: Start | None, *, autocast: bool = False) -> None:
        # nnsight reads language models for it; merely importing it breaks torch.compile for the whole process.
        sys.modules.setdefault("nnsight", SimpleNamespace(LanguageModel=None))
        from dictionary_learning.trainers import BatchTopKTrainer, JumpReluTrainer, StandardTrainer, TopKTrainer

        self.dtype = torch.bfloat16 if autocast else torch.float32
        self.autocast = torch.autocast(task.device, dtype=self.dtype) if autocast else nullcontext()
        self.norm = float(first.square().sum(dim=-1).mean().sqrt())
        self.kind, self.k = task.kind, task.k
        common = dict(steps=task.steps, activation_dim=task.d_model, dict_size=task.n_latents, layer=0, lm_name="bench",
                      lr=task.lr, warmup_steps=task.share(task.warmup), decay_start=task.steps - task.share(task.decay),
                      seed=0, device=task.device)  # fmt: skip
        torch.manual_seed(0)
        match task.kind:
            case "topk" | "batchtopk":
                trainer = TopKTrainer if task.kind == "topk" else BatchTopKTrainer
                self.trainer = trainer(k=task.k, threshold_start_step=min(1000, task.steps // 2), **common)
            case "jumprelu":
                common |= dict(target_l0=float(task.k), sparsity_warmup_steps=task.share(0.05))
                self.trainer = JumpReluTrainer(**common)
            case "relu":
                self.trainer = StandardTrainer(sparsity_warmup_steps=task.share(0.05), **common)
        self.trainer.dead_feature_threshold = task.dead_after_steps * task.batch
        self.count = 0
        if start:
            self._adopt(start)
            self.count = 1001  # past its first step and with its running threshold, as almost all steps are

    def _adopt(self, start: Start) -> None:
        d, ae = start.dictionary, self.trainer.ae
        if self.kind == "jumprelu":
            ae.W_enc.data.copy_(d.W_enc.T)
            ae.W_dec.data.copy_(d.W_dec)
            ae.b_enc.data.copy_(d.b_enc / self.norm)
            ae.threshold.data.copy_(d.threshold / self.norm)
        else:
            ae.encoder.weight.data.copy_(d.W_enc)
            ae.decoder.weight.data.copy_(d.W_dec.T)
            ae.encoder.bias.data.copy_(d.b_enc / self.norm)
        if self.kind != "relu":
            self.trainer.num_tokens_since_fired[start.dead] = 2 * self.trainer.dead_feature_threshold

    def step(self, x: Tensor) -> None:
        x = x.to(self.dtype) / self.norm
        with self.autocast:
            self.trainer.update(self.count, x)
        self.count += 1

    def l0(self, x: Tensor) -> float:
        selected = {} if self.kind in ("jumprelu", "relu") else {"use_threshold": False}
        with torch.no_grad():
            return float(count(self.trainer.ae.encode(x / self.norm, **selected)).float().mean())

    def n_dead(self) -> int:
        if self.kind == "relu":
            return 0
        return int((self.trainer.num_tokens_since_fired >= self.trainer.dead_feature_threshold).sum())

    def inference(self, x: Tensor) -> Inference:
        ae = self.trainer.ae
        ae.scale_biases(self.norm)
        if self.kind == "batchtopk":
            calibrate(ae.threshold, ae.encode, x, self.k)

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            x_hat, z = ae(x, output_features=True)
            return x_hat, count(z)

        return reconstruct


# --- sparsify -------------------------------------------------------------------------------------------------------


class Sparsify(Contestant):
    """The hook and the step of `Trainer.fit`: schedule-free signum; AuxK, which it has off, only for dead latents."""

    def __init__(self, task: Task, first: Tensor, start: Start | None) -> None:
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD

        torch.manual_seed(0)
        cfg = SparseCoderConfig(num_latents=task.n_latents, k=task.k)
        self.sae = SparseCoder(task.d_model, cfg, task.device, dtype=torch.float32)
        self.sae.b_dec.data.copy_(first[: task.batch].mean(dim=0))
        self.auxk_alpha, self.dead_after = 0.0, task.dead_after_steps * task.batch
        if start:
            self.sae.encoder.weight.data.copy_(start.dictionary.W_enc)
            self.sae.W_dec.data.copy_(start.dictionary.W_dec)
            self.auxk_alpha = 1 / 32 if bool(start.dead.any()) else 0.0
        self.optimizer = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=task.lr), momentum=0.95)
        self.optimizer.train()
        self.since_fired = torch.zeros(task.n_latents, dtype=torch.long, device=task.device)
        if start:
            self.since_fired[start.dead] = 2 * self.dead_after
        self.fired = torch.zeros(task.n_latents, dtype=torch.bool, device=task.device)

    def step(self, x: Tensor) -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # as `fit` does
        self.sae.set_decoder_norm_to_unit_norm()
        dead = self.since_fired > self.dead_after if self.auxk_alpha > 0 else None
        variance = (x - x.mean(0)).pow(2).sum()
        out = self.sae(x=x, y=x, dead_mask=dead, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + self.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since_fired += x.shape[0]
        self.since_fired[self.fired] = 0
        self.fired.zero_()
        torch.set_float32_matmul_precision(before)

    def l0(self, x: Tensor) -> float:
        with torch.no_grad():
            return float(count(self.sae(x).latent_acts).float().mean())

    def n_dead(self) -> int:
        return int((self.since_fired > self.dead_after).sum())

    def inference(self, x: Tensor) -> Inference:
        self.optimizer.eval()
        self.sae.set_decoder_norm_to_unit_norm()

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.sae(x)
            return out.sae_out.float(), count(out.latent_acts)

        return reconstruct


PEERS = {"SAELens": "sae_lens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
"""Their modules: a table without one of them would flatter us."""


# --- who takes part -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A contestant that can be made anew: `make(task, first raw rows, start or None)`."""

    tool: str
    setting: str
    make: Callable[[Task, Tensor, Start | None], Contestant]
    trains_alike: bool = True
    """False where another setting of the tool computes the same numbers: left out of the quality runs."""


def entries(kind: str, device: str, *, ours_only: bool = False, compiled: bool = True) -> list[Entry]:
    """Everyone who can train dictionaries of a kind here."""
    found = [Entry("saerelay", "f32", Ours)]
    found.append(Entry("saerelay", "bf16", lambda *given: Ours(*given, precision="bfloat16")))
    if ours_only:
        return found
    for tool, module in PEERS.items():
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"{tool} is not installed; see bench/README.md, or use --ours-only")

    def saelens(setting: str, **options: bool) -> Entry:
        return Entry("SAELens", setting, lambda *given: SaeLens(*given, **options), set(options) <= {"autocast"})

    found += [saelens("f32"), saelens("autocast", autocast=True)]
    if kind == "topk":
        found.append(saelens("f32, sparse", sparse=True))
    if compiled:
        found += [saelens("f32, compiled", compiled=True), saelens("autocast, compiled", autocast=True, compiled=True)]
    found.append(Entry("dictionary_learning", "f32", DictionaryLearning))
    if device == "cuda":
        found.append(Entry("dictionary_learning", "autocast", lambda *given: DictionaryLearning(*given, autocast=True)))
    if kind == "topk":
        found.append(Entry("sparsify", "autocast" if device == "cuda" else "f32", Sparsify))
    return found


def shifted(dictionary: Dictionary, threshold: float) -> Dictionary:
    """The dictionary with a threshold on every latent: JumpReLU's and BatchTopK's own, ReLU's as a bias."""
    latents = torch.full_like(dictionary.b_enc, threshold)
    match dictionary.architecture:
        case "jumprelu" | "batchtopk":
            return replace(dictionary, threshold=latents)
        case "relu":
            return replace(dictionary, b_enc=dictionary.b_enc - latents)
        case _:
            return dictionary
