"""What dictionaries have in common, and what a transfer keeps: the measures of Ghilardi et al. 2024.

Shapes: F, G latents, D width, V vocabulary, N prompts. A decoder row is what a latent writes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from saerelay.analysis.evaluate import batches, held_out, measure
from saerelay.analysis.features import collect, features_run, held_out_sequences, load_features, logit_effects
from saerelay.analysis.prompts import Prompt, read_prompts
from saerelay.analysis.site_maps import SiteMaps
from saerelay.analysis.summary import SHOWN
from saerelay.data.corpus import Corpus
from saerelay.errors import RunDirectoryError
from saerelay.files import finite, read_json, write_json
from saerelay.lm.model import LanguageModel, load_model
from saerelay.planning.plan import Leg, Plan
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

SCHEMA_VERSION = 1
DENSE = 2**24
"""Numbers in a block of cosines or attributions: 64 MiB."""
OWN_PROMPTS = 62
"""Prompts drawn where none are given; the paper has as many."""
SCORED = {"fvu": -1, "explained_variance": 1, "ce_loss_score": 1}
"""Metrics with a transfer score, and whether more of them is better."""
OFFSET_METRICS = (*SCORED, "l0", "delta_ce", "kl_div_score")
OWN_TASK = "the model's own task: positions of the test split whose next token it predicts, against its second choice"


# --- between two dictionaries -----------------------------------------------------------------------------------


@torch.no_grad()
def mean_max_cosine(P: Tensor, Q: Tensor, alive_p: Tensor | None = None, alive_q: Tensor | None = None) -> float:
    """Mean over rows of P (F, D) of the largest cosine with a row of Q (G, D), of those that are alive (bool F, G).

    >>> mean_max_cosine(torch.eye(3), torch.eye(3)[[2, 0, 1]])
    1.0
    >>> mean_max_cosine(torch.eye(3)[:1], torch.eye(3)), mean_max_cosine(torch.eye(3), torch.eye(3)[:1])
    (1.0, 0.3333333333333333)

    Not symmetric. NaN if nothing is alive.
    """
    P = torch.nn.functional.normalize(P if alive_p is None else P[alive_p], dim=1)
    Q = torch.nn.functional.normalize(Q if alive_q is None else Q[alive_q], dim=1)
    if not len(P) or not len(Q):
        return math.nan
    best = [(part @ Q.T).amax(dim=1) for part in P.split(max(1, DENSE // len(Q)))]
    return float(torch.cat(best).double().mean())


class Speaks(NamedTuple):
    """Token ids that each latent of a dictionary speaks for, (F, 10) each; -1 where there are fewer."""

    top_logits: Tensor
    """Those whose logits the decoder row raises most."""
    bottom_logits: Tensor
    """Those it lowers most."""
    top_tokens: Tensor
    """Those at the positions it fires most strongly on; the same token may come several times."""


def feature_transferability(source: Speaks, target: Speaks, alive: Tensor) -> dict[str, float]:
    """Shares of token ids that latents have in common with those of the same index, and their mean; alive: bool (F).

    >>> a = Speaks(torch.tensor([[1, 2]]), torch.tensor([[3, 4]]), torch.tensor([[5, 5]]))
    >>> b = Speaks(torch.tensor([[2, 1]]), torch.tensor([[3, 9]]), torch.tensor([[5, 6]]))
    >>> feature_transferability(a, b, torch.tensor([True]))["transferability"]
    0.6666666666666666

    With ten of each, (shared top logits + shared bottom logits + shared tokens of highest activation) / 30, mean over
    alive latents: 30.3 % forward and 28.8 % backward in Ghilardi et al. 2024. NaN if none is alive.
    """
    shares = {
        name: float(shared(a, b)[alive].double().mean()) / a.shape[1]
        for name, a, b in zip(Speaks._fields, source, target, strict=True)
    }
    return {"transferability": sum(shares.values()) / len(shares)} | shares


def shared(a: Tensor, b: Tensor) -> Tensor:
    """How many token ids the rows of a and b (F, n) have in common (F), repeated ones as often as in both; -1 is none.

    >>> shared(torch.tensor([[7, 7, 1, -1]]), torch.tensor([[7, 2, 7, -1]])).tolist()
    [2]
    """

    def nth(x: Tensor) -> Tensor:
        """Which occurrence of its id each entry is."""
        return (x[:, :, None] == x[:, None, :]).tril(-1).sum(dim=2)

    same = (a[:, :, None] == b[:, None, :]) & (nth(a)[:, :, None] == nth(b)[:, None, :]) & (a >= 0)[:, :, None]
    return same.any(dim=2).sum(dim=1)


def transfer_score(transferred: float | None, zero_shot: float | None, from_scratch: float | None) -> float | None:
    """How far training brought a transfer from zero-shot to scratch: (transferred − zero-shot) / (scratch − zero-shot).

    >>> transfer_score(0.09, 0.2, 0.1), transfer_score(0.09, 0.1, 0.1)
    (1.1, None)

    0 is as good as zero-shot, 1 as good as from scratch, whichever way the metric runs; but where scratch is worse than
    zero-shot, so is a score over 0. None if one is unknown, or scratch equals zero-shot.
    """
    if transferred is None or zero_shot is None or from_scratch is None or from_scratch == zero_shot:
        return None
    return (transferred - zero_shot) / (from_scratch - zero_shot)


def by_offset(cells: Iterable[dict[str, Any]], metric: str, method: str) -> list[dict[str, Any]]:
    """Means of a metric over cells of matrix.json by offset, target − source layer; cells at home have any method.

    >>> cells = [{"source": 0, "target": t, "method": "identity", "fvu": t / 10} for t in (0, 1)]
    >>> by_offset(cells, "fvu", "identity")
    [{'offset': 0, 'mean': 0.0, 'n': 1}, {'offset': 1, 'mean': 0.1, 'n': 1}]
    """
    found = dict[int, list[float]]()
    for cell in cells:
        offset = cell["target"] - cell["source"]
        if (cell["method"] == method or not offset) and cell[metric] is not None:
            found.setdefault(offset, []).append(cell[metric])
    return [{"offset": offset, "mean": sum(v) / len(v), "n": len(v)} for offset, v in sorted(found.items())]


# --- direct logit attribution -----------------------------------------------------------------------------------


@torch.no_grad()
def direct_logit_attribution(dictionary: Dictionary, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The largest direct effect of a latent on each prompt (N), and which latent has it (N).

    x (N, D) are activations at the last position, `directions` (N, D) unembeddings of the correct − of the wrong token.
    A latent's effect is its activation × (decoder row · direction): of the difference of logits, what it writes before
    the final norm divides by the size of the stream. Values compare within a model, not between models.

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2),
    ...                  b_dec=torch.zeros(2))
    >>> scores, latents = direct_logit_attribution(sae, torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 4.0]]))
    >>> scores.tolist(), latents.tolist()
    ([4.0], [1])
    """
    best = [
        (dictionary.encode(part) * (direction @ dictionary.W_dec.T)).max(dim=1)
        for part, direction in zip(
            *(t.split(max(1, DENSE // dictionary.n_latents)) for t in (x, directions)), strict=True
        )
    ]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def at_the_end(model: LanguageModel, prompts: Sequence[Prompt], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Activations (N, D), float32, at the last position of each prompt."""
    found = {site: list[Tensor]() for site in sites}
    for prompt in prompts:
        for site, x in model.harvest(torch.tensor([prompt.tokens]), sites).items():
            found[site].append(x[0, -1].float())
    return {site: torch.stack(rows) for site, rows in found.items()}


@torch.no_grad()
def own_prompts(plan: Plan, model: LanguageModel, sequences: np.ndarray, n: int = OWN_PROMPTS) -> list[Prompt]:
    """Up to n held-out positions whose next token the model predicts; wrong is its second choice.

    They are drawn by the run's seed, from as many batches of sequences (N, context), in an order drawn too, as hold
    four times as many.
    """
    generator = np.random.default_rng(plan.run.train.seed)
    found = list[Prompt]()
    for tokens in batches(plan, generator.permutation(sequences), True):
        first, second = model.logits(tokens)[:, :-1].topk(2).indices.cpu().unbind(dim=-1)
        for s, position in (first == tokens[:, 1:]).nonzero().tolist():
            text = tuple(tokens[s, : position + 1].tolist())
            found.append(Prompt(text, int(first[s, position]), int(second[s, position])))
        if len(found) >= 4 * n:
            break
    return [found[i] for i in generator.permutation(len(found))[:n]]


# --- a run's measures -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trained:
    """A leg, or a snapshot of it, with what was seen of its latents."""

    leg: Leg
    tokens: int
    snapshot: bool
    dictionary: Dictionary
    alive: Tensor
    """bool (F): fired on the held-out tokens."""
    speaks: Speaks | None
    """None without a language-model head, or where decoder rows are not directions of the residual stream."""

    @property
    def row(self) -> dict[str, Any]:
        """How it is named in measures.json."""
        return {"leg": self.leg.id, "layer": self.leg.layer, "tokens": self.tokens, "snapshot": self.snapshot}


@torch.no_grad()
def measures_run(
    suite: PublishedSuite,
    model: LanguageModel | None = None,
    *,
    prompts: Path | None = None,
    tokens: int = 0,
    maps: SiteMaps | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Take all measures of a run's legs and snapshots; writes measures.json and returns it (docs/run-directory.md).

    `tokens` of the test split are the recipe's unless given; `prompts` is a file for `read_prompts`. Transfer scores
    and offsets need matrix.json, and are null without it. Features that are missing are found first, and written.
    """
    plan, paths = suite.plan, suite.directory
    if not suite.legs:
        raise RunDirectoryError(f"{paths.root}: no leg is finished yet; finish the run with `saerelay train --resume`")
    asked = read_prompts(prompts, plan) if prompts else None
    corpus, model = Corpus.open(paths.tokens), model or load_model(plan)
    W_U = model.unembedding() if plan.facts.has_lm_head or prompts else None
    maps = maps or SiteMaps.of(suite, model, console)
    features_run(suite, model, tokens=tokens, maps=maps, console=console)
    sequences = held_out_sequences(suite, tokens)
    trained = see(suite, model, sequences, W_U, console)
    pairs = pairs_of(suite, trained)
    sites = sorted({(pair.source.leg.site, pair.target.leg.site) for pair in pairs})
    between = maps.between(sites)
    matrix = read_json(paths.matrix) if paths.matrix.is_file() else None
    document = {
        "schema": SCHEMA_VERSION,
        "model": plan.facts.name,
        "revision": plan.facts.revision,
        "module": plan.run.sites.module,
        "split": "test",
        "n_tokens": load_features(paths, suite.legs[0].id).facts["n_tokens"],
        "n_matrix_tokens": matrix["n_tokens"] if matrix else None,
        "map_tokens": maps.tokens,
        "similarity": [similarity(p, between[p.source.leg.site, p.target.leg.site].A, model.device) for p in pairs],
        "transferability": None if W_U is None else transferabilities(suite, trained),
        "transfer_scores": transfer_scores(suite, model, trained, matrix, corpus) if matrix else None,
        "offsets": offsets(suite, matrix) if matrix else None,
        "dla": None,
    }
    if W_U is not None:
        used = asked if asked is not None else own_prompts(plan, model, sequences)
        said = prompts.name if prompts else OWN_TASK
        document["dla"] = {"prompts": said, "n_prompts": len(used), "legs": attributions(model, W_U, trained, used)}
    write_json(paths.measures, document)
    return finite(document)


def see(
    suite: PublishedSuite, model: LanguageModel, sequences: np.ndarray, W_U: Tensor | None, console: Console | None
) -> list[Trained]:
    """All published legs, each followed by its snapshots; legs as their features files have them, snapshots anew."""
    paths, found = suite.directory, list[Trained]()
    ages = {
        f"{leg.id}@{age}": read_dictionary(paths.snapshot(leg.id, age))[0]
        for leg in suite.legs
        for age in paths.ages(leg)
    }
    placed = {key: (suite.plan.leg(key.rpartition("@")[0]).site, dictionary) for key, dictionary in ages.items()}
    seen = collect(suite.plan, model, sequences, placed, window=(0, 0), console=console) if placed else {}
    for leg in suite.legs:
        dictionary, info = read_dictionary(paths.leg(leg.id))
        versions = [(info.tokens, dictionary, load_features(paths, leg.id))]
        versions += [(age, ages[key], seen[key]) for age in paths.ages(leg) for key in [f"{leg.id}@{age}"]]
        for i, (age, dictionary, features) in enumerate(versions):
            speaks = None
            if W_U is not None and leg.module != "attn_z":
                known = features.tensors()  # of a leg, its logits too
                effects = known if "top_logits" in known else logit_effects(dictionary.W_dec.to(W_U.device), W_U)
                rows, positions = features.example_sequence.long(), features.example_position.long()
                top = torch.from_numpy(sequences.astype(np.int64))[rows, positions].masked_fill(rows < 0, -1)
                speaks = Speaks(effects["top_logits"], effects["bottom_logits"], top)
            found.append(Trained(leg, age, bool(i), dictionary, features.n_fired > 0, speaks))
    return found


class Pair(NamedTuple):
    """Two dictionaries to compare; `of` is the one that the comparison is about."""

    kind: str
    source: Trained
    target: Trained
    of: Trained


def pairs_of(suite: PublishedSuite, trained: Sequence[Trained]) -> list[Pair]:
    """What similarity is measured between, each pair in both directions; see docs/run-directory.md."""
    finished = {t.leg.id: t for t in trained if not t.snapshot}
    suited = [finished[leg.id] for leg in suite.one_per_site]
    pairs = [Pair("suite", a, b, b) for a, b in permutations(suited, 2) if a.leg.module == b.leg.module]
    for one in trained:
        others = [("hop", finished[one.leg.parent])] if one.leg.parent in finished else []
        if one.leg.role == "transfer":
            others += [("scratch", finished[leg.id]) for leg in from_scratch(suite, one.leg)]
        for kind, other in others:
            pairs += [Pair(kind, other, one, one), Pair(kind, one, other, one)]
    return pairs


def from_scratch(suite: PublishedSuite, leg: Leg) -> list[Leg]:
    """The legs that a transferred one is compared with: its controls, and roots at its site."""
    return [
        other
        for other in suite.legs
        if other.control_of == leg.id or (other.role == "root" and not other.parent and other.site == leg.site)
    ]


def similarity(pair: Pair, A: Tensor, device: torch.device) -> dict[str, Any]:
    """A row of measures.json: the source's latents among the target's, raw, and carried by x_target ≈ A x_source."""
    a, b = pair.source, pair.target
    P, Q, alive_p, alive_q = (t.to(device) for t in (a.dictionary.W_dec, b.dictionary.W_dec, a.alive, b.alive))
    return {
        "kind": pair.kind,
        "leg": pair.of.leg.id,
        "tokens": pair.of.tokens,
        "snapshot": pair.of.snapshot,
        "source": a.leg.id,
        "target": b.leg.id,
        "source_layer": a.leg.layer,
        "target_layer": b.leg.layer,
        "mmcs": mean_max_cosine(P, Q, alive_p, alive_q),
        "mmcs_folded": mean_max_cosine(P @ A.T.to(P), Q, alive_p, alive_q),
    }


def transferabilities(suite: PublishedSuite, trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """Rows of measures.json: every transferred leg and snapshot against its parent, by index."""
    finished, rows = {t.leg.id: t for t in trained if not t.snapshot}, []
    for child in (t for t in trained if t.leg.role == "transfer" and t.leg.parent in finished):
        parent = finished[child.leg.parent]
        if parent.speaks and child.speaks and len(parent.alive) == len(child.alive):
            alive = parent.alive & child.alive
            shares = feature_transferability(parent.speaks, child.speaks, alive)
            origin = {"parent": parent.leg.id, "parent_layer": parent.leg.layer, "n_latents": int(alive.sum())}
            rows.append(child.row | origin | shares)
    return rows


def transfer_scores(
    suite: PublishedSuite, model: LanguageModel, trained: Sequence[Trained], matrix: dict[str, Any], corpus: Corpus
) -> list[dict[str, Any]]:
    """Rows of measures.json: each transferred leg and snapshot between zero-shot and each leg from scratch at its site.

    All three on the tokens of matrix.json: what is not in it, controls and maybe snapshots, is measured on them here.
    """
    plan, finished = suite.plan, {t.leg.id: t for t in trained if not t.snapshot}
    rows = [
        (one, finished[one.leg.parent], finished[scratch.id])
        for one in trained
        if one.leg.role == "transfer" and one.leg.parent in finished
        for scratch in from_scratch(suite, one.leg)
    ]
    cells = {(c["leg"], c["tokens"], c["method"], c["target"]): c for c in matrix["cells"]}

    def home(t: Trained) -> tuple[str, int, str, int]:
        return (t.leg.id, t.tokens, "identity", t.leg.layer)

    missing = {str(home(t)): t for one, _, scratch in rows for t in (one, scratch) if home(t) not in cells}
    if missing:
        placed = {key: (t.leg.site, t.dictionary) for key, t in missing.items()}
        sequences = held_out(plan, corpus.test, matrix["asked"]["tokens"])
        found = measure(plan, model, sequences, placed, ce=matrix["asked"]["ce"])
        cells |= {home(t): {name: found[key].get(name) for name in SHOWN} for key, t in missing.items()}
    scores = []
    for one, parent, scratch in rows:
        for method in dict.fromkeys(("identity", one.leg.method)):
            zero_shot = cells.get((parent.leg.id, parent.tokens, method, one.leg.layer))
            if zero_shot:
                what = {"parent": parent.leg.id, "parent_layer": parent.leg.layer, "method": method}
                what |= {"scratch": scratch.leg.id, "scratch_tokens": scratch.tokens}
                what |= {"scratch_kind": scratch.leg.control_kind or "root"}
                values = [cells[home(one)], zero_shot, cells[home(scratch)]]
                scores.append(one.row | what | {m: score_of(m, *(v[m] for v in values)) for m in SCORED})
    return scores


def score_of(metric: str, transferred: float | None, zero_shot: float | None, scratch: float | None) -> float | None:
    """A transfer score, or None where zero-shot is already as good as scratch, so that there was no way to go.

    >>> score_of("fvu", 0.125, 0.25, 0.0), score_of("fvu", 0.08, 0.1, 0.11)
    (0.5, None)
    """
    if zero_shot is None or scratch is None or SCORED[metric] * (scratch - zero_shot) <= 0:
        return None
    return transfer_score(transferred, zero_shot, scratch)


def offsets(suite: PublishedSuite, matrix: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of measures.json: means by layer offset of metrics and methods of matrix.json, and of snapshots by age."""
    legs = {leg.id for leg in suite.one_per_site}
    cells = [cell for cell in matrix["cells"] if cell["leg"] in legs]
    rows = []
    for age in [None, *sorted({cell["tokens"] for cell in cells if cell["snapshot"]})]:
        of_age = [c for c in cells if (c["tokens"] if c["snapshot"] else None) == age]
        for metric, method in product(OFFSET_METRICS, dict.fromkeys(cell["method"] for cell in of_age)):
            common = {"metric": metric, "method": method, "tokens": age}
            rows += [common | row for row in by_offset(of_age, metric, method)]
    return rows


def attributions(
    model: LanguageModel, W_U: Tensor, trained: Sequence[Trained], prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """Rows of measures.json: direct logit attribution of each leg and snapshot on all prompts."""
    on = [t for t in trained if t.speaks]
    x = at_the_end(model, prompts, sorted({t.leg.site for t in on})) if prompts else {}
    directions = W_U[[p.right for p in prompts]] - W_U[[p.wrong for p in prompts]]
    rows = []
    for t in on if prompts else ():
        scores, latents = direct_logit_attribution(t.dictionary.to(W_U.device), x[t.leg.site], directions)
        error = float(scores.std()) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
        rows.append(
            t.row | {"mean": float(scores.mean()), "standard_error": error}
            | {"scores": [round(score, 4) for score in scores.tolist()], "latents": latents.tolist()}
        )  # fmt: skip
    return rows
