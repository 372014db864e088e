"""What became of latents, against dense codes and numpy; and what a run writes of them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import saerelay as sr
from saerelay.analysis import lineage, links
from saerelay.analysis.lineage import Lineage
from saerelay.analysis.links import Link, assign
from saerelay.analysis.metrics import batches
from saerelay.analysis.session import Session
from saerelay.data.corpus import Corpus
from saerelay.data.kept import kept_positions
from saerelay.errors import RunDirectoryError
from saerelay.lm.model import load_model
from saerelay.runs.dictionaries import publish
from saerelay.runs.documents.latents import LineageFacts, LineageLeg, LineageStep
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels.select import nonzero_codes

torch.set_num_threads(1)
LEGS = ["L0", "L1-from-L0", "L2-from-L1", "L1-scratch-equal", "L1-scratch-full"]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> sr.Suite:
    root = tmp_path_factory.mktemp("lineage")
    tokens = torch.randint(1, 101, (40_000,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")
    np.save(root / "tokens.npy", tokens)
    plan = {"preset": "forward", "root_tokens": "4k", "transfer_tokens": "2k", "moment_tokens": "1k", "controls": [1]}
    sections = {
        "model": {"name": str(tiny_model), "dtype": "float32", "device": "cpu"},
        "data": {"tokens": str(root / "tokens.npy"), "context": 16, "block_tokens": 1024},
        "dictionary": {"architecture": "topk", "n_latents": 64, "k": 4},
        "plan": plan,
        "train": {"batch_tokens": 64},
        "evaluate": {"tokens": "1k"},
    }
    return sr.train_run(sr.Run.parse(sections, source="test"), root / "run")


@pytest.fixture
def suite(trained: sr.Suite, tmp_path: Path) -> Iterator[sr.Suite]:
    """A copy of the run, with nothing known of its latents."""
    shutil.copytree(trained.directory.root, tmp_path / "run")
    yield sr.load(tmp_path / "run")


def dense_codes(suite: sr.Suite, leg: str) -> Tensor:
    """(kept positions of the test split, F)."""
    plan, model, site = suite.plan, load_model(suite.plan), suite.leg(leg).site
    parts = []
    for tokens in batches(plan, Corpus.open(suite.directory.tokens).test[:63], torch.device("cpu")):
        assert plan.probe_site
        x = {s: a.flatten(0, 1) for s, a in model.harvest(tokens, [site, plan.probe_site]).items()}
        parts.append(suite[leg].encode(x[site][kept_positions(plan, tokens, x)]))
    return torch.cat(parts)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)


def test_links_are_their_definitions(suite: sr.Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "NUMBERS_PER_PIECE", 64 * 100)  # several pieces
    found = sr.lineage_run(suite)
    chain = [("L0", "L1-from-L0"), ("L1-from-L0", "L2-from-L1")]
    controls = [("L1-from-L0", "L1-scratch-equal"), ("L1-from-L0", "L1-scratch-full")]
    assert [(x.kind, x.source, x.target) for x in found.links] == [
        *(("hop", *pair) for pair in chain), *(("depth", *pair) for pair in chain),
        *(("control", *pair) for pair in controls),
    ]  # fmt: skip
    pairs = [(suite.leg(x.source).site, suite.leg(x.target).site) for x in found.links]
    maps = Session(suite).maps.between(pairs)
    codes = {leg: dense_codes(suite, leg) for leg in LEGS}
    assert found.facts.n_tokens == len(codes["L0"]) == 63 * 15 and found.facts.n_sequences == 63
    for link, pair in zip(found.links, pairs, strict=True):
        carried, target = sr.fold(suite[link.source], maps[pair]), suite[link.target]
        decoder = cosines(carried.W_dec, target.W_dec)
        partner = np.arange(64) if link.kind != "control" else linear_sum_assignment(decoder, maximize=True)[1]
        assert (link.partner is None) == (link.kind != "control")
        assert [link.forward(i) for i in range(64)] == partner.tolist()
        assert [link.backward(int(partner[i])) for i in range(64)] == list(range(64))
        everyone = torch.arange(64)
        torch.testing.assert_close(link.decoder_cosine, decoder[everyone, partner], atol=1e-4, rtol=0)
        encoder = cosines(carried.W_enc, target.W_enc)[everyone, partner]
        torch.testing.assert_close(link.encoder_cosine, encoder, atol=1e-4, rtol=0)
        for i in range(64):
            a, b = codes[link.source][:, i].double(), codes[link.target][:, partner[i]].double()
            before, after = bool((a > 0).any()), bool((b > 0).any())
            if before and after:
                assert float(link.correlation[i]) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-4)
                cosine = decoder[i, partner[i]]
                assert link.status[i] == ("k" if cosine > 0.7 else "r" if cosine < 0.3 else "d")
            else:
                assert torch.isnan(link.correlation[i])
                assert link.status[i] == ("x" if before else "b" if after else "-")
    shares = found.summary()[0]
    assert shares["kept"] == found.links[0].status.count("k") / 64
    assert sum(shares[name] for name in ("kept", "drifted", "replaced", "died", "born", "silent")) == pytest.approx(1)


def test_latents_without_a_partner_have_died_or_were_silent(suite: sr.Suite) -> None:
    source, z = suite["L0"], torch.rand(200, 64).relu() * (torch.rand(200, 64) < 0.2)
    z[:, :4] = 0
    fewer = Dictionary(architecture="relu", b_dec=source.b_dec, **{
        name: getattr(source, name)[:50] for name in ("W_enc", "b_enc", "W_dec")
    })  # fmt: skip
    pair = links.LegPair("control", suite.leg("L0"), suite.leg("L1-scratch-full"))
    comparison = links.Comparison(pair, source, fewer, by_index=False)
    firings = [links.Firing(n, torch.device("cpu")) for n in (64, 50)]
    codes = [nonzero_codes(z), nonzero_codes(z[:, :50])]
    for firing, some in zip(firings, codes, strict=True):
        firing.add(some)
    comparison.add(*codes, torch.zeros(64 * 33))
    link = comparison.link(*firings, 200)
    assert [link.forward(i) for i in range(64)] == [*range(50), *[None] * 14]
    assert link.status == "-" * 4 + "k" * 46 + "x" * 14
    torch.testing.assert_close(link.correlation[4:50], torch.ones(46))
    for numbers in (link.correlation, link.decoder_cosine, link.encoder_cosine):
        assert bool(numbers[50:].isnan().all())


def test_a_child_that_is_a_plain_fold_has_kept_everything(suite: sr.Suite) -> None:
    pair = (suite.leg("L0").site, suite.leg("L1-from-L0").site)
    between = Session(suite).maps.between([pair])[pair]
    directory = suite.directory.leg("L1-from-L0")
    info = suite.info(suite.leg("L1-from-L0")).to_data()
    publish(directory, sr.fold(suite["L0"], between), info)
    link = sr.lineage_run(suite).link("L0", "L1-from-L0")
    assert float(link.decoder_cosine.min()) > 0.9999 and float(link.encoder_cosine.min()) > 0.9999
    assert set(link.status) <= {"k", "x", "b", "-"} and "k" in link.status


def test_nothing_is_done_twice(suite: sr.Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sr.lineage_run(suite, features=True)
    files = {path: path.read_bytes() for path in [suite.directory.lineage, *map(suite.directory.features, LEGS)]}

    def refuse(plan: sr.Plan, *, split: bool = False) -> None:
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("saerelay.analysis.session.load_model", refuse)
        assert sr.lineage_run(suite, features=True).facts == first.facts == Lineage.load(suite.directory.root).facts
        sr.features_run(suite)
        assert files == {path: path.read_bytes() for path in files}
        suite.directory.features("L0").unlink()
        with pytest.raises(AssertionError, match="loaded"):
            sr.lineage_run(suite, features=True)
    sr.features_run(suite)
    assert files == {path: path.read_bytes() for path in files}, "alone, features are the same"
    assert sr.lineage_run(suite, tokens=512, features=True).facts.n_tokens == 32 * 15
    assert sr.load_features(suite.directory, "L0").facts.n_tokens == 32 * 15


def test_features_of_a_run_hold_what_comes_from_weights(suite: sr.Suite) -> None:
    sr.features_run(suite)
    model = load_model(suite.plan)
    found = {leg: sr.load_features(suite.directory, leg) for leg in LEGS}
    sides = {leg: (f.facts.below, f.facts.above) for leg, f in found.items()}
    assert sides["L0"] == (None, "L1-from-L0") and sides["L2-from-L1"] == ("L1-from-L0", None)
    assert sides["L1-scratch-full"] == ("L0", "L2-from-L1") and found["L0"].below_latents is None
    middle = found["L1-scratch-full"]
    effects = suite["L1-scratch-full"].W_dec @ model.unembedding().T
    assert torch.equal(middle.top_logits, effects.topk(10, dim=1).indices.int())
    for side, leg in (("below", "L0"), ("above", "L2-from-L1")):
        pair = (suite.leg("L1-from-L0").site, suite.leg(leg).site)
        maps = Session(suite, model=model).maps.between([pair])
        expected = cosines(sr.fold(suite["L1-scratch-full"], maps[pair]).W_dec, suite[leg].W_dec).topk(3, dim=1)
        torch.testing.assert_close(getattr(middle, f"{side}_cosine"), expected.values.half(), atol=2e-3, rtol=0)
        assert (getattr(middle, f"{side}_latents") == expected.indices).float().mean() > 0.98
    assert torch.equal(middle.n_fired, (dense_codes(suite, "L1-scratch-full") > 0).sum(dim=0).int())


@pytest.mark.parametrize("exact", [4096, 0])
def test_a_permuted_copy_is_recovered(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "EXACT_LATENTS", exact)
    monkeypatch.setattr(links, "CANDIDATES", 6)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 16, generator=generator)
    order = torch.randperm(80, generator=generator)
    noisy = rows + 0.3 * torch.randn(80, 16, generator=generator)
    assert torch.equal(assign(rows, 5 * noisy[order]), order.argsort())
    fewer = assign(rows, noisy[order[:50]])
    assert torch.equal(fewer[order[:50]], torch.arange(50))
    taken = fewer[fewer >= 0].tolist()
    assert len(set(taken)) == len(taken) == 50
    more = assign(rows[:50], noisy[order])
    assert torch.equal(more, order.argsort()[:50])


def made(*some: Link) -> Lineage:
    legs = {}
    for link in some:
        legs[link.source] = LineageLeg(layer=link.source_layer, n_latents=3)
        legs[link.target] = LineageLeg(layer=link.target_layer, n_latents=3)
    facts = LineageFacts(
        model="m", n_sequences=1, kept_above=0.7, replaced_below=0.3, alive_above=0, legs=legs, n_tokens=1, map_tokens=1
    )
    return Lineage(facts, list(some))


def made_link(kind: str, source: int, target: int, partner: list[int] | None, name: str = "L") -> Link:
    values = torch.tensor([0.1, 0.2, torch.nan])
    return Link(
        kind, f"L{source}", f"{name}{target}", source, target, None if partner is None else torch.tensor(partner),
        values, values + 0.01, values + 0.02, "kdb",
    )  # type: ignore[arg-type]  # fmt: skip


def test_a_latent_is_followed_from_end_to_end() -> None:
    control = made_link("control", 1, 1, [0, 2, 1], "C")
    known = made(
        made_link("depth", 0, 1, [2, 0, -1]), made_link("depth", 1, 2, None), made_link("depth", 2, 3, [1, -1, 0]),
        control, made_link("hop", 0, 1, None),
    )  # fmt: skip
    way = known.follow("L1", 0)
    assert [(step.leg, step.layer, step.latent) for step in way] == [
        ("L0", 0, 1), ("L1", 1, 0), ("L2", 2, 0), ("L3", 3, 1)
    ]  # fmt: skip
    assert way == known.follow("L0", 1) == known.follow("L3", 1) == known.follow("L2", 0)
    assert way[0] == LineageStep(leg="L0", layer=0, latent=1)
    cosines_and_correlation = (way[1].decoder_cosine, way[1].encoder_cosine, way[1].correlation)
    assert cosines_and_correlation == pytest.approx((0.2, 0.21, 0.22)) and way[1].status == "drifted"
    assert way[2].status == "kept" and way[2].decoder_cosine == pytest.approx(0.1)
    assert [step.leg for step in known.follow("L0", 2)] == ["L0"], "it has no partner"
    assert [step.leg for step in known.follow("L1", 1)] == ["L1", "L2"], "none before, none after"
    assert [(step.leg, step.latent) for step in known.follow("L0", 0)] == [("L0", 0), ("L1", 2), ("L2", 2), ("L3", 0)]
    assert known.follow("L1", 2)[2].correlation is None and known.follow("L1", 2)[2].status == "born"
    assert [(step.leg, step.latent) for step in known.follow("C1", 1)] == [("C1", 1)]
    relatives = [(step.kind, step.leg, step.latent) for step in known.relatives("L1", 1)]
    assert relatives == [("control", "C1", 2), ("parent", "L0", 1)]
    assert [(step.kind, step.leg, step.latent) for step in known.relatives("C1", 1)] == [("control of", "L1", 2)]
    assert known.link("L1", "C1") is control


def test_what_is_not_there_is_named(suite: sr.Suite) -> None:
    known = made(made_link("depth", 0, 1, None))
    with pytest.raises(RunDirectoryError, match='no leg "L7" in this lineage; its legs are: L0, L1'):
        known.follow("L7", 0)
    with pytest.raises(RunDirectoryError, match="L0 has no latent 3; its latents are 0 to 2"):
        known.follow("L0", 3)
    with pytest.raises(RunDirectoryError, match="no link from L1 to L0; the links are: L0 to L1"):
        known.link("L1", "L0")
    root = suite.directory.root
    with pytest.raises(RunDirectoryError, match=r"lineage.json: no such file; `saerelay show .* LEG LATENT` makes it"):
        Lineage.load(root)
    with pytest.raises(RunDirectoryError, match=r"no features here; `saerelay show RUN LEG 0` makes them"):
        sr.load_features(suite.directory, "L0")
    suite.directory.lineage.write_text('{"schema": 2, "links": [{}]}')
    with pytest.raises(RunDirectoryError, match=r"lineage.json: damaged .*; delete it"):
        Lineage.load(root)
    suite.directory.features("L0").parent.mkdir()
    suite.directory.features("L0").write_bytes(b"junk")
    with pytest.raises(RunDirectoryError, match=r"L0.safetensors: damaged .*; delete it"):
        sr.load_features(suite.directory, "L0")


def test_a_latent_is_described(suite: sr.Suite) -> None:
    document = suite.describe("1", 7).to_data()
    assert json.loads(json.dumps(document)) == document
    assert (document["leg"], document["layer"], document["latent"]) == ("L1-from-L0", 1, 7)
    z = dense_codes(suite, "L1-from-L0")[:, 7]
    assert document["n_fired"] == int((z > 0).sum()) > 0
    assert document["max_activation"] == pytest.approx(float(z.max()))
    assert sum(document["histogram"]["counts"]) == document["n_fired"]
    example, test = document["examples"][0], Corpus.open(suite.directory.tokens).test
    around = test[example["sequence"], example["start"] : example["start"] + len(example["activations"])]
    assert example["token_ids"] == around.tolist() and example["tokens"] == [f"<{i}>" for i in around]
    assert example["activations"][example["position"] - example["start"]] == pytest.approx(float(z.max()))
    assert [step["leg"] for step in document["lineage"]] == LEGS[:3]
    assert [found["kind"] for found in document["relatives"]] == ["parent", "control", "control"]
    assert document["similar"]["above"]["leg"] == "L2-from-L1" and len(document["top_logits"]) == 10
