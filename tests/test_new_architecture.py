"""A new architecture is one class and a place in a list: this one trains, resumes, is published, read and exported."""

from pathlib import Path
from types import ModuleType
from typing import ClassVar, final

import pytest
import torch
from torch import Tensor

import saerelay as sr
from saerelay.interop import load_dictionary
from saerelay.sae import architectures
from saerelay.sae.architectures import Architecture
from saerelay.sae.kernels import Codes, sparse_step
from saerelay.sae.loss import training_loss
from saerelay.sae.spec import DictionarySpec
from saerelay.workflows.share import export_run


@final
class NearTop(Architecture):
    """Every pre-activation above a share of its token's largest."""

    name: ClassVar[str] = "neartop"
    title: ClassVar[str] = "NearTop"

    share: float = 0.5

    def activate(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        return pre.relu() * (pre > self.share * pre.amax(dim=-1, keepdim=True))

    def match_l0(self, dictionary: sr.Dictionary, x: Tensor, l0: float) -> sr.Dictionary:
        return dictionary  # its L0 follows from the activations

    def select(self, pre: Tensor, ops: ModuleType) -> Codes:
        return ops.nonzero_codes(self.activate(pre.float(), None))


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "ARCHITECTURES", [*architectures.ARCHITECTURES, NearTop])
    monkeypatch.setattr("saerelay.sae.spec.ARCHITECTURES", [*architectures.ARCHITECTURES])


def recipe(model: Path) -> sr.Recipe:
    sections = {
        "model": {"name": str(model)},
        "sites": {"layers": [0, 1, 2]},
        "data": {"tokens": str(model.parent / "ids.npy"), "context": 16},
        "dictionary": {"architecture": "neartop", "share": 0.4, "n_latents": 64},
        "plan": {"root_tokens": 4096, "transfer_tokens": 1024, "moment_tokens": 1024, "refit_tokens": 512},
        "train": {"batch_tokens": 64, "checkpoint_every": 1024},
        "evaluate": {"tokens": 512},
    }
    return sr.Recipe.parse(sections, source="test")


@pytest.fixture
def model(tiny_model: Path) -> Path:
    import numpy as np

    ids = np.random.default_rng(0).integers(1, 101, (400, 64)).astype(np.uint16)
    np.save(tiny_model.parent / "ids.npy", ids)
    return tiny_model


def test_its_sparse_step_equals_autograd() -> None:
    spec = DictionarySpec.parse({"architecture": "neartop", "n_latents": 50}).sized(12)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sae = sr.Dictionary(architecture="neartop", W_enc=draw(50, 12), b_enc=draw(50), W_dec=draw(50, 12), b_dec=draw(12))
    x = draw(33, 12)
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in sae.tensors().items()}
    training_loss(spec, sae.with_tensors(parameters), x).total.backward()
    step = sparse_step(spec, sae, x)
    gradients = {name: torch.empty_like(tensor) for name, tensor in sae.tensors().items() if name != "b_dec"}
    step.gradients(slice(0, 50), gradients)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, parameters[name].grad, rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]


def test_it_goes_the_whole_way(model: Path, tmp_path: Path) -> None:
    suite = sr.train_run(recipe(model), tmp_path / "run")
    assert {suite[leg].architecture for leg in suite} == {"neartop"}
    resumed = sr.train_run(recipe(model), tmp_path / "run", resume=True)
    (shared, *_) = export_run(str(tmp_path / "run"), tmp_path / "exported", "saerelay")
    exported, _ = load_dictionary(tmp_path / "exported" / shared.folder)
    x = torch.randn(20, 32)
    assert torch.equal(exported(x), resumed[resumed.one_per_site[0].id](x))
    assert 0 < float((exported.encode(x) > 0).float().mean()) < 0.5
    summary = sr.evaluate_run(suite)
    assert all(leg["architecture"] == "neartop" and leg["fvu"] < 1 for leg in summary["legs"])
