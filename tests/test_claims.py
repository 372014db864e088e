"""What the README claims of transfer, on the demo model itself (minutes, the longest test by far)."""

import pytest

import saerelay as sr

pytestmark = pytest.mark.claims
SHORT = "512"  # a leg that is only looked at right after its fold


@pytest.fixture(scope="module")
def fvu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Held-out FVU at layer 4: hops from a layer-5 SAE of 2M tokens before and after training, and from scratch."""
    legs = [{"id": "source", "layer": 5, "tokens": "2M"}]
    for method in ("identity", "rescale", "procrustes", "affine"):
        legs.append({"id": method, "layer": 4, "parent": "source", "method": method, "refit": False, "tokens": SHORT})
    legs.append({"id": "refit", "layer": 4, "parent": "source", "method": "affine", "refit": True, "tokens": SHORT})
    legs.append({"id": "tuned", "layer": 4, "parent": "source", "method": "affine", "tokens": "250k"})
    legs.append({"id": "scratch", "layer": 4, "tokens": "1M"})
    recipe = {
        "dictionary": {"n_latents": 3072, "k": 24},
        "plan": {"legs": legs},
        "train": {"snapshots": [0]},
        "evaluate": {"tokens": "64k", "ce": False},
    }
    suite = sr.train_run(sr.Run.parse(recipe, source="test"), tmp_path_factory.mktemp("claims") / "run")
    found = {}
    for leg in suite.evaluate().legs:
        found[leg.id] = leg.fvu
        found |= {f"{leg.id}@{snapshot.tokens}": snapshot.fvu for snapshot in leg.snapshots}
    print({name: round(value, 4) for name, value in found.items()})
    return found


def test_zero_shot_hops_get_better_with_each_method(fvu: dict[str, float]) -> None:
    order = [fvu["identity@0"], fvu["rescale@0"], fvu["procrustes@0"], fvu["affine@0"], fvu["refit@0"]]
    assert order == sorted(order, reverse=True), order


def test_a_quarter_of_the_tokens_after_a_hop_beats_scratch(fvu: dict[str, float]) -> None:
    assert fvu["tuned"] < 0.98 * fvu["scratch"], fvu
