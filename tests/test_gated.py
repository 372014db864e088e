"""Gated SAEs: our form of them is the paper's, and everything that carries a dictionary carries its gate."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import saerelay as sr
from saerelay.errors import RunDirectoryError
from saerelay.interop.canonical import from_gate, to_gate
from saerelay.runs.dictionaries import publish, read_dictionary
from saerelay.runs.tensors import write_tensors
from saerelay.sae.dictionary import Dictionary, match_l0, unit_decoder
from saerelay.sae.loss import training_loss
from saerelay.sae.maps import AffineMap
from saerelay.sae.quality import mean_l0
from saerelay.sae.reshape import Shape, reshape, revive
from saerelay.sae.spec import DictionarySpec
from saerelay.sae.transfer import fold
from saerelay.sae.units import Units

D, F, B = 10, 40, 64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paper() -> dict[str, Tensor]:
    """The parameters of the paper: W_gate (F, D), and the others."""
    return {
        "W": draw(F, D, seed=1),
        "r_mag": 0.3 * draw(F, seed=2),
        "b_gate": draw(F, seed=3) - 2,
        "b_mag": draw(F, seed=4),
        "W_dec": draw(F, D, seed=5),
        "b_dec": draw(D, seed=6),
    }


def ours(p: dict[str, Tensor]) -> Dictionary:
    """The same, without the clamp at zero, through which gradients would not go."""
    scale = p["r_mag"].exp()
    return Dictionary(
        architecture="gated",
        W_enc=p["W"] * scale[:, None],
        b_enc=p["b_mag"],
        threshold=p["b_mag"] - scale * p["b_gate"],
        r_mag=p["r_mag"],
        W_dec=p["W_dec"],
        b_dec=p["b_dec"],
    )


def gate_of(sae: Dictionary, x: Tensor) -> Tensor:
    assert sae.threshold is not None and sae.r_mag is not None
    return sae.activation.gate_codes(sae.encode(x), sae.threshold, sae.r_mag)


def test_codes_are_those_of_the_paper() -> None:
    p, x = paper(), draw(B, D, seed=7)
    gate = x @ p["W"].T + p["b_gate"]
    magnitude = x @ (p["r_mag"].exp()[:, None] * p["W"]).T + p["b_mag"]
    expected = (gate > 0) * magnitude.relu()
    W_enc, b_enc, threshold = from_gate(p["W"], r_mag=p["r_mag"], b_gate=p["b_gate"], b_mag=p["b_mag"])
    sae = replace(ours(p), W_enc=W_enc, b_enc=b_enc, threshold=threshold)
    assert torch.allclose(sae.encode(x), expected)
    assert 0 < float((expected > 0).double().mean()) < 0.5
    open_gates = threshold > 0
    assert torch.allclose(gate_of(sae, x)[:, open_gates], gate.relu()[:, open_gates])


def test_the_loss_and_its_gradients_are_those_of_the_paper() -> None:
    """Equation 9, with the paper's parameters as the leaves of autograd in both."""
    x = draw(B, D, seed=7)
    spec = DictionarySpec.parse({"architecture": "gated", "n_latents": F, "target_l0": 4, "gate_l1": 3.0}).sized(D)
    p = paper()
    p["b_mag"] = (p["r_mag"].exp() * p["b_gate"]).clamp(min=0) + p["b_mag"].abs()  # thresholds above zero

    theirs = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    gate = x @ theirs["W"].T + theirs["b_gate"]
    magnitude = x @ (theirs["r_mag"].exp()[:, None] * theirs["W"]).T + theirs["b_mag"]
    z = (gate > 0) * magnitude.relu()
    error = (x - z @ theirs["W_dec"] - theirs["b_dec"]).square().sum()
    gate_error = (x - gate.relu() @ p["W_dec"] - p["b_dec"]).square().sum()
    l0 = float((z > 0).double().sum()) / B
    l1 = 3.0 * (l0 / 4) ** 4 * gate.relu().sum()
    loss = (error + 0.5 * l1 + gate_error) / x.numel()
    loss.backward()

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    found = training_loss(spec, ours(leaves), x, warmth=0.5).total
    found.backward()
    assert torch.allclose(found, loss, rtol=1e-12)
    for name, leaf in leaves.items():
        assert torch.allclose(leaf.grad, theirs[name].grad, rtol=1e-9, atol=1e-14), name  # type: ignore[arg-type]


def test_folding_units_and_norms_carry_the_gates_codes_with_the_codes() -> None:
    """The gate's codes decode through the same rows, so they must scale as codes do, and r_mag must not change."""
    sae, x = replace(ours(paper()), threshold=draw(F, seed=8).abs()), draw(B, D, seed=7)
    before = gate_of(sae, x) @ sae.W_dec

    unit = unit_decoder(sae)
    assert torch.allclose(gate_of(unit, x) @ unit.W_dec, before)

    units = Units(draw(D, seed=9), torch.tensor(2.5, dtype=torch.float64))
    inside = units.from_canonical(sae)
    assert torch.allclose(gate_of(inside, units.normalise(x)) @ inside.W_dec * units.scale, before)

    A = draw(D, D, seed=10)
    c = draw(D, seed=11)
    B_inverse = torch.linalg.inv(A)
    folded = fold(sae, AffineMap(A=A, c=c, B=B_inverse, b=-B_inverse @ c))
    assert torch.allclose(gate_of(folded, x @ A.T + c) @ folded.W_dec, before @ A.T)
    for carried in (unit, inside, folded):
        assert carried.r_mag is not None and torch.equal(carried.r_mag, sae.r_mag)  # type: ignore[arg-type]


def test_the_gates_weights_are_found_again() -> None:
    p = paper()
    sae = ours(p)
    W, b_gate, r_mag = to_gate(sae, sae.b_enc)
    assert torch.allclose(W, p["W"]) and torch.allclose(b_gate, p["b_gate"]) and torch.equal(r_mag, p["r_mag"])


def test_matching_l0_moves_all_gates_by_one_number() -> None:
    sae, x = replace(ours(paper()), threshold=3 + draw(F, seed=8).abs()), 3 * draw(4000, D, seed=7)
    matched = match_l0(sae, x, 5.0)
    assert mean_l0(matched, x) == pytest.approx(5, abs=0.01)
    assert sae.threshold is not None and matched.threshold is not None and sae.r_mag is not None
    moved = (matched.threshold - sae.threshold) / sae.r_mag.exp()
    kept = matched.threshold > 0
    assert torch.allclose(moved[kept], moved[kept][0]) and float(moved[kept][0]) != 0


def test_gates_that_let_nothing_through_do_not_count_as_active() -> None:
    """A threshold at 0 can fall no further: its latent's gate may open, and yet its code be zero."""
    rows = torch.nn.functional.normalize(draw(F, D), dim=1)
    threshold, b_enc = torch.full((F,), 2.5).double(), torch.zeros(F).double()
    threshold[: F // 2] = 0.05
    b_enc[: F // 2] = -2.0
    sae = Dictionary(
        architecture="gated", W_enc=rows, b_enc=b_enc, W_dec=rows, b_dec=torch.zeros(D).double(), threshold=threshold
    )
    x = draw(4000, D, seed=7)
    assert mean_l0(match_l0(sae, x, 4.0), x) == pytest.approx(4, abs=0.01)


def test_what_had_no_gate_gets_one_and_what_leaves_loses_it() -> None:
    x = 3 * draw(2000, D, seed=7)
    plain = Dictionary(architecture="relu", W_enc=draw(F, D), b_enc=draw(F), W_dec=draw(F, D), b_dec=draw(D))
    gated = reshape(plain, x, Shape("gated", F, 5.0))
    assert gated.r_mag is not None and not gated.r_mag.any()
    assert reshape(ours(paper()), x, Shape("jumprelu", F, 5.0)).r_mag is None
    kept = reshape(ours(paper()), x, Shape("gated", F, 5.0))
    assert torch.equal(kept.r_mag, paper()["r_mag"])  # type: ignore[arg-type]


def test_a_revived_latent_has_a_fresh_gate() -> None:
    sae, x = replace(ours(paper()), threshold=torch.ones(F).double()), 3 * draw(2000, D, seed=7)
    silent = replace(sae, b_enc=sae.b_enc.index_fill(0, torch.tensor([3]), -1e6))
    revived = revive(silent, x)
    assert revived.r_mag is not None and float(revived.r_mag[3]) == 0
    others = torch.arange(F) != 3
    assert torch.equal(revived.r_mag[others], paper()["r_mag"][others])


def test_a_gate_is_published_and_its_absence_noticed(tmp_path: Path) -> None:
    sae = replace(ours(paper()), threshold=torch.ones(F).double()).to(torch.float32)
    info = {"layer": 1, "module": "resid_post"}
    publish(tmp_path, sae, info)
    read, _ = read_dictionary(tmp_path)
    assert torch.equal(read.r_mag, sae.r_mag)  # type: ignore[arg-type]
    tensors = sae.tensors()
    del tensors["r_mag"]
    write_tensors(tmp_path / "dictionary.safetensors", tensors)
    with pytest.raises(RunDirectoryError, match="tensor r_mag is missing"):
        read_dictionary(tmp_path)


def test_it_trains_from_a_script_to_its_l0_and_hops() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D, generator=generator)
    weights = torch.rand(16_384, 40, generator=generator) * (torch.rand(16_384, 40, generator=generator) < 0.08)
    x = 20 * weights @ directions
    keys = {"architecture": "gated", "target_l0": 4.0, "n_latents": 64, "batch_tokens": 64, "lr": 1e-2}
    sae = sr.train(x, progress=False, **keys)
    quality = sr.evaluate(sae, x)
    assert quality.l0 == pytest.approx(4, rel=0.2) and quality.fvu is not None and quality.fvu < 0.3
    assert sae.r_mag is not None and bool(sae.r_mag.any())
    hopped = sr.hop(sae, x, 2 * x + 1, tokens=1024, progress=False)
    assert hopped.architecture == "gated" and hopped.r_mag is not None
    again = sr.evaluate(hopped, 2 * x + 1)
    assert again.fvu is not None and again.fvu < 1.2 * quality.fvu
