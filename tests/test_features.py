"""What latents mean, against dense codes of all tokens at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from saerelay.analysis import collecting as module
from saerelay.analysis import features as weights
from saerelay.analysis.collecting import Collector, collect
from saerelay.analysis.features import logit_effects, most_similar
from saerelay.data.kept import kept_positions
from saerelay.lm.facts import read_facts
from saerelay.lm.model import LanguageModel
from saerelay.planning.compile import compile_plan
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

torch.set_num_threads(1)
N, C, F, E, WINDOW = 23, 16, 48, 4, (3, 2)
Setting = tuple[Plan, LanguageModel, np.ndarray, dict[str, tuple[Site, Dictionary]]]


@pytest.fixture(scope="module")
def setting(tiny_model: Path) -> Setting:
    """A model whose positions are left out here and there, and three dictionaries, some of whose latents are silent."""
    sections = {"model": {"name": str(tiny_model), "dtype": "float32", "device": "cpu"}, "data": {"context": C}}
    sections["data"] |= {"outlier_norm": 1.2}
    run = Recipe.parse(sections, source="test")
    plan = compile_plan(run, read_facts(run.model))
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(1, 101, (N, C), generator=generator).numpy().astype(np.uint16)
    sequences[:, 0] = 0
    sequences[7] = sequences[3]  # equal activations
    model = LanguageModel.load(run.model)
    x = model.harvest(torch.from_numpy(sequences.astype(np.int64)), [Site(1)])[Site(1)]
    weights = torch.randn(3, F, 32, generator=generator) / x.norm(dim=-1).median()
    bias = torch.randn(F, generator=generator) / 4
    bias[5] = -1e4
    base = {"b_enc": bias, "b_dec": torch.zeros(32)}
    dictionaries = {
        "a": (Site(0), Dictionary(architecture="topk", k=6, W_enc=weights[0], W_dec=weights[0], **base)),
        "b@5": (Site(2), Dictionary(architecture="relu", W_enc=weights[1], W_dec=weights[1], **base)),
        "c": (Site(0), Dictionary(architecture="jumprelu", W_enc=weights[2], W_dec=weights[2],
                                  threshold=torch.full((F,), 0.5), **base)),
    }  # fmt: skip
    return plan, model, sequences, dictionaries


def dense(setting: Setting, key: str) -> tuple[Tensor, Tensor]:
    """Codes (N, C, F) of all positions, zero where not kept, and which are kept (N, C)."""
    plan, model, sequences, dictionaries = setting
    site, dictionary = dictionaries[key]
    assert plan.probe_site
    zs, keeps = [], []
    for start in range(0, N, 5):  # the median norm is a batch's
        tokens = torch.from_numpy(sequences[start : start + 5].astype(np.int64))
        x = {s: a.flatten(0, 1) for s, a in model.harvest(tokens, [site, plan.probe_site]).items()}
        keeps.append(kept_positions(plan, tokens, x))
        zs.append(dictionary.encode(x[site]) * keeps[-1][:, None])
    return torch.cat(zs).view(N, C, F), torch.cat(keeps).view(N, C)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of five sequences, encoded and looked through in several pieces."""
    monkeypatch.setattr(
        module, "batches", lambda plan, s, ce: [torch.from_numpy(s[i : i + 5].astype(np.int64)) for i in range(0, N, 5)]
    )
    monkeypatch.setattr(module, "NUMBERS_PER_PIECE", 7 * 5 * C)


def test_everything_is_its_definition(setting, small_pieces: None) -> None:
    found = collect(*setting, examples=E, window=WINDOW)
    assert list(found) == ["a", "b@5", "c"]
    for key, features in found.items():
        z, keep = dense(setting, key)
        assert 0 < int((~keep[:, 1:]).sum()) and features.facts.n_tokens == int(keep.sum())
        assert torch.equal(features.n_fired, (z > 0).sum(dim=(0, 1)).int())
        torch.testing.assert_close(features.max_activation, z.amax(dim=(0, 1)))
        mean = z.double().sum(dim=(0, 1)) / (z > 0).sum(dim=(0, 1)).clamp(min=1)
        torch.testing.assert_close(features.mean_activation, mean.float())
        first, n_bins = features.facts.histogram_first_edge, features.histogram.shape[1]
        edges = 2.0 ** (first + np.arange(n_bins + 1) / 2)
        for latent in range(F):
            active = z[..., latent][z[..., latent] > 0].numpy()
            assert features.histogram[latent].tolist() == np.histogram(active, edges)[0].tolist()
            check_examples(features, z[..., latent], latent)
        assert features.n_fired[5] == 0 and features.examples(5) == []
        assert (features.n_fired[:5] > 0).all()


def check_examples(features: module.Features, z: Tensor, latent: int) -> None:
    """The strongest sequences of codes z (N, C), the first of equal ones first, and what is around their maxima."""
    strongest, where = z.max(dim=1)
    expected = [s for s in sorted(range(N), key=lambda s: -float(strongest[s])) if strongest[s] > 0][:E]
    examples = features.examples(latent)
    assert [example.sequence for example in examples] == expected
    for example in examples:
        at, row = int(where[example.sequence]), z[example.sequence]
        start, stop = max(0, at - WINDOW[0]), min(C, at + WINDOW[1] + 1)
        assert (example.position, example.start) == (at, start)
        torch.testing.assert_close(torch.tensor(example.activations), row[start:stop])
    padded = torch.nn.functional.pad(z, WINDOW)
    for slot, example in enumerate(examples):
        whole = padded[example.sequence, example.position : example.position + sum(WINDOW) + 1]
        torch.testing.assert_close(features.example_window[latent, slot], whole)


def test_batches_make_no_difference_but_to_ties(setting, small_pieces: None) -> None:
    """A sequence that comes again, in a later batch, has not been admitted before the first."""
    features = collect(*setting, examples=N, window=WINDOW)["b@5"]
    order = [[example.sequence for example in features.examples(latent)] for latent in range(F)]
    together = [found for found in order if 3 in found and 7 in found]
    assert together and all(found.index(7) == found.index(3) + 1 for found in together)


def test_activations_out_of_range_count_in_the_outermost_bins() -> None:
    collector = Collector(2, (1, 4), torch.device("cpu"), 1, (0, 0))
    batch = module.CodedBatch(0, 1, torch.arange(4), {})
    collector.add(batch, module.encode_sparse(
        Dictionary(architecture="relu", W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2),
                   b_dec=torch.zeros(2)),
        torch.tensor([[1e-30, 0], [1e30, 0], [1.0, 0], [1.0, 0]]),
    ))  # fmt: skip
    features = collector.features()
    counts = features.histogram[0]
    assert (int(counts[0]), int(counts[-1]), int(counts[64]), int(counts.sum())) == (1, 1, 2, 4)
    assert features.facts.histogram_first_edge == -32 and len(counts) == 128


def test_logits_are_the_largest_and_smallest_of_a_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "NUMBERS_PER_PIECE", 3 * 50)
    generator = torch.Generator().manual_seed(0)
    W_dec, W_U = torch.randn(20, 8, generator=generator), torch.randn(50, 8, generator=generator)
    found, effects = logit_effects(W_dec, W_U, 4), W_dec @ W_U.T
    order = effects.argsort(dim=1)
    assert torch.equal(found["top_logits"], order.flip(1)[:, :4].int())
    assert torch.equal(found["bottom_logits"], order[:, :4].int())
    torch.testing.assert_close(found["top_logits_values"], effects.gather(1, order.flip(1)[:, :4]).half())
    assert len(logit_effects(W_dec, W_U[:2], 4)["top_logits"][0]) == 2


def test_most_similar_latents_are_those_of_all_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "NUMBERS_PER_PIECE", 4 * 30)
    generator = torch.Generator().manual_seed(0)
    rows, others = torch.randn(20, 8, generator=generator), torch.randn(30, 8, generator=generator)
    latents, cosines = most_similar(rows, others, 3)
    expected = torch.nn.functional.cosine_similarity(rows[:, None], others[None], dim=2)
    torch.testing.assert_close(cosines, expected.sort(dim=1, descending=True).values[:, :3])
    torch.testing.assert_close(expected.gather(1, latents), cosines)
