"""SAE maths: canonical form, training units, losses."""

from dataclasses import replace

import pytest
import torch

from saerelay.errors import DataError
from saerelay.sae.architectures import ARCHITECTURES as CLASSES
from saerelay.sae.architectures import TopK
from saerelay.sae.architectures.architecture import with_common_threshold
from saerelay.sae.dictionary import Dictionary, match_l0, unit_decoder
from saerelay.sae.initialise import initialise
from saerelay.sae.layer_normed import LayerNormed
from saerelay.sae.loss import aux_loss, k_aux, training_loss
from saerelay.sae.quality import fvu, mean_l0
from saerelay.sae.reshape import revive
from saerelay.sae.spec import DictionarySpec
from saerelay.sae.units import Units

D, F, B = 10, 40, 64
ARCHITECTURES = [architecture.name for architecture in CLASSES]


def random_dictionary(architecture: str, seed: int = 0) -> Dictionary:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Dictionary(
        architecture=architecture,
        W_enc=draw(F, D),
        b_enc=draw(F),
        W_dec=draw(F, D),
        b_dec=draw(D),
        threshold=draw(F).abs() if architecture in ("jumprelu", "gated", "batchtopk") else None,
        r_mag=draw(F) if architecture == "gated" else None,
        k=4 if architecture in ("topk", "batchtopk") else None,
    )


def activations(seed: int = 1) -> torch.Tensor:
    return 3 * torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 7


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_is_the_definition_entry_by_entry(architecture: str) -> None:
    d, x = random_dictionary(architecture), activations()
    z = d.encode(x)
    for t in range(B):
        pre = [float(d.W_enc[j] @ x[t] + d.b_enc[j]) for j in range(F)]
        top = sorted(range(F), key=lambda j: -pre[j])[:4]
        for j in range(F):
            on = {
                "relu": pre[j] > 0,
                "topk": pre[j] > 0 and j in top,
                "jumprelu": d.threshold is not None and pre[j] > d.threshold[j],
                "gated": d.threshold is not None and pre[j] > d.threshold[j],
                "batchtopk": d.threshold is not None and pre[j] > d.threshold[j],
            }[architecture]
            assert float(z[t, j]) == pytest.approx(pre[j] if on else 0.0, abs=1e-12)
    assert torch.allclose(d(x), z @ d.W_dec + d.b_dec)


def test_activations_of_another_width_are_refused() -> None:
    dictionary = random_dictionary("topk")
    with pytest.raises(DataError, match=f"are {dictionary.d_model + 1} wide, but this SAE reads {dictionary.d_model}"):
        dictionary(torch.zeros(2, dictionary.d_model + 1))


def test_threshold_is_strict() -> None:
    d = replace(random_dictionary("jumprelu"), W_enc=torch.zeros(F, D).double(), b_enc=torch.ones(F).double())
    assert not replace(d, threshold=torch.ones(F).double()).encode(activations()).any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_units_are_exact(architecture: str) -> None:
    d, x = random_dictionary(architecture), activations()
    units = Units(torch.randn(D, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64))
    inner, u = units.from_canonical(d), units.normalise(x)
    assert torch.allclose(inner(u) * units.scale + units.mean, d(x))
    assert torch.allclose(inner.encode(u) * units.scale, d.encode(x))
    back = units.to_canonical(inner)
    for name, tensor in d.tensors().items():
        assert torch.allclose(back.tensors()[name], tensor), name


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_unit_decoder_is_the_same_function(architecture: str) -> None:
    d, x = random_dictionary(architecture), activations()
    assert torch.allclose(unit_decoder(d)(x), d(x))
    assert torch.allclose(unit_decoder(d).W_dec.norm(dim=1), torch.ones(F).double())


def test_unit_decoder_leaves_a_zero_row_alone() -> None:
    d = random_dictionary("relu")
    d.W_dec[3] = 0
    assert torch.isfinite(unit_decoder(d).W_dec).all()


@pytest.mark.parametrize("l0", [1, 4, 7.5])
def test_calibrated_threshold_gives_the_l0_asked_for(l0: float) -> None:
    d, x = random_dictionary("batchtopk"), activations()
    assert float((with_common_threshold(d, x, l0).encode(x) > 0).sum(dim=1).double().mean()) == pytest.approx(l0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initial_dictionary_is_tied_unit_and_better_than_nothing(architecture: str) -> None:
    x = torch.randn(256, D, generator=torch.Generator().manual_seed(0))
    spec = DictionarySpec.parse({"architecture": architecture, "n_latents": F, "k": 4, "target_l0": 4})
    d = initialise(spec.sized(D), x, torch.Generator().manual_seed(0))
    assert torch.allclose(d.W_dec.norm(dim=1), torch.ones(F))
    assert torch.allclose(torch.nn.functional.cosine_similarity(d.W_enc, d.W_dec), torch.ones(F))
    assert d.W_enc.data_ptr() != d.W_dec.data_ptr()
    assert (x - d(x)).square().sum() < x.square().sum()


def test_topk_loss_is_the_definition() -> None:
    spec, d, x = DictionarySpec(n_latents=F, k=4), random_dictionary("topk"), activations()
    loss = training_loss(spec, d, x)
    error = (x - d(x)).square().sum()
    assert torch.allclose(loss.total, error / x.numel()) and torch.allclose(loss.squared_error, error)
    assert int(loss.n_active) == int((d.encode(x) > 0).sum())


def test_raw_units_divide_by_tokens_only() -> None:
    d, x = random_dictionary("relu"), activations()
    spec = DictionarySpec(architecture="relu", n_latents=F, l1=0.3, normalise=False)
    expected = ((x - d(x)).square().sum() + 0.5 * 0.3 * d.encode(x).sum()) / B
    assert torch.allclose(training_loss(spec, d, x, warmth=0.5).total, expected)


def test_batchtopk_keeps_k_per_token_on_average() -> None:
    spec = DictionarySpec(architecture="batchtopk", n_latents=F, k=4)
    assert int(training_loss(spec, random_dictionary("batchtopk"), activations()).n_active) == 4 * B


def test_jumprelu_gradients_are_the_straight_through_formulas() -> None:
    """Rajamanoharan et al. 2024, eq. 11 and 12, written out for one latent and no decoder."""
    spec = DictionarySpec(architecture="jumprelu", n_latents=F, target_l0=4, bandwidth=0.5, l0_weight=2.0)
    d, x = random_dictionary("jumprelu"), activations()
    assert d.threshold is not None
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in d.tensors().items()}
    training_loss(spec, replace(d, **parameters), x, warmth=0.5).total.backward()
    pre = d.pre_activations(x)
    window = ((pre - d.threshold).abs() < 0.25).double()
    g = 2 * (d(x) - x) / x.numel() @ d.W_dec.T
    l0 = (pre > d.threshold).double().sum() / B
    to_l0 = 0.5 * 2.0 * 2 * (l0 / 4 - 1) / 4 / B
    expected = -((g * d.threshold + to_l0) * window).sum(dim=0) / 0.5
    assert torch.allclose(parameters["threshold"].grad, expected)  # type: ignore[arg-type]


def test_aux_loss_is_the_unexplained_share_of_the_residual() -> None:
    d, x = random_dictionary("topk"), activations()
    dead = torch.zeros(F, dtype=torch.bool)
    assert float(aux_loss(d, d.pre_activations(x), x, dead)) == 0
    dead[[3, 5, 8]] = True
    z = d.pre_activations(x)[:, dead].relu()
    expected = (x - z @ d.W_dec[dead]).square().sum() / x.square().sum()
    assert torch.allclose(aux_loss(d, d.pre_activations(x), x, dead), expected)


def test_k_aux_is_half_the_width() -> None:
    assert (k_aux(768, 5000), k_aux(768, 7), k_aux(1, 3)) == (384, 7, 1)


def test_topk_drops_negative_values() -> None:
    assert TopK(k=2).activate(torch.tensor([[-1.0, -2.0, 3.0]]), None).tolist() == [[0.0, 0.0, 3.0]]


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "gated", "relu"])
@pytest.mark.parametrize("l0", [2, 7.5])
def test_matched_l0_is_the_one_asked_for(architecture: str, l0: float) -> None:
    d, x = random_dictionary(architecture), 3 * activations()  # where thresholds and biases no longer fit
    matched = match_l0(d, x, l0)
    assert mean_l0(matched, x) == pytest.approx(l0, abs=1 / len(x))
    assert mean_l0(d, x) != pytest.approx(l0, abs=0.1)
    assert torch.equal(matched.W_enc, d.W_enc) and torch.equal(matched.W_dec, d.W_dec)


def test_matching_l0_leaves_topk_alone() -> None:
    d = random_dictionary("topk")
    assert match_l0(d, activations(), 2) is d


def test_thresholds_of_zero_are_matched_too() -> None:
    """No factor changes them."""
    d = replace(random_dictionary("jumprelu"), threshold=torch.zeros(F, dtype=torch.float64))
    assert mean_l0(match_l0(d, activations(), 3), activations()) == pytest.approx(3, abs=1 / B)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quality_on_half_precision_is_that_on_the_same_numbers(dtype: torch.dtype) -> None:
    """In float16 the squares of ordinary activations overflow; in bfloat16 the mean is rounded."""
    x = (300 * activations() + 3000).to(dtype)
    d = random_dictionary("relu").to(torch.float32)
    transcoder = replace(d, W_skip=torch.eye(D))
    assert fvu(d, x) == pytest.approx(fvu(d, x.float()), rel=1e-6)
    assert fvu(transcoder, x, target=x) == pytest.approx(fvu(transcoder, x.float(), target=x.float()), rel=1e-6)
    assert fvu(d.to(torch.bfloat16), x) > 0
    assert torch.equal(LayerNormed(d).encode(x), LayerNormed(d).encode(x.float()))


def test_activations_in_more_dimensions_are_refused_where_means_are_taken() -> None:
    x = activations().view(4, -1, D)
    for measure in (fvu, revive, lambda d, x: match_l0(d, x, 3)):
        with pytest.raises(DataError, match=r"shape \(4, 16, 10\); give rows"):
            measure(random_dictionary("relu"), x)
    with pytest.raises(DataError, match="no activations"):
        match_l0(random_dictionary("relu"), x.flatten(0, 1)[:0], 3)


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk", "gated"])
def test_what_has_lost_its_threshold_does_not_pass_for_relu(architecture: str) -> None:
    weights = {"W_enc": torch.eye(2), "b_enc": torch.zeros(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2)}
    with pytest.raises(AssertionError, match=f"a {architecture} dictionary without its threshold"):
        Dictionary(architecture=architecture, k=1, **weights).encode(torch.ones(1, 2))


def test_relu_has_no_use_for_a_threshold() -> None:
    weights = {"W_enc": torch.eye(2), "b_enc": torch.zeros(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2)}
    sae = Dictionary(architecture="relu", threshold=torch.full((2,), 9.0), **weights)
    assert torch.equal(sae.encode(torch.ones(1, 2)), torch.ones(1, 2))
