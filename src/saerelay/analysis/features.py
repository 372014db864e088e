"""The features of each latent of a run's dictionaries: `features/<id>.safetensors`.

They say where the latent fires most and how strongly (`collecting`), which tokens' logits it changes, and which latents
of neighbouring layers are most similar to it. Shapes: F, G latents, D width, V vocabulary.
"""

from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from saerelay.analysis.collecting import EXAMPLES, NUMBERS_PER_PIECE, WINDOW, collect
from saerelay.analysis.metrics import Placed
from saerelay.analysis.session import Session
from saerelay.analysis.site_maps import SitePair, map_of_legs, sites_between
from saerelay.lm.model import LanguageModel
from saerelay.planning.leg import Leg
from saerelay.runs.documents.latents import FeatureQuestion
from saerelay.runs.features import Features, load_facts
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.maps import AffineMap
from saerelay.sae.transfer import fold
from saerelay.team import Team

TOKENS = 10
"""Number of tokens that a latent promotes most, and of tokens that it suppresses most."""
OFF_THE_STREAM = ("attn_z", "mlp_in")
"""Kinds of sites whose activations are not directions of the residual stream."""
NEIGHBOURS = 3
"""Number of similar latents listed per neighbouring layer."""


def make_features(session: Session, *, tokens: int = 0) -> None:
    """Compute the features of every published leg on the test split; writes features/<id>.safetensors.

    Files that answer the same question are left as they are, so every analysis that needs features calls this. If
    `tokens` is 0, it is `evaluate.tokens`.
    """
    missing = session.team.once(lambda: legs_without_features(session, tokens))
    legs = session.deal(missing)
    if legs:
        dictionaries = {leg.id: Placed.at_home(leg, session.suite.dictionary(leg)) for leg in legs}
        sequences = session.held_out(tokens)
        features = collect(session.plan, session.model, sequences, dictionaries, track=session.display.track)
        maps = session.maps.between(neighbour_pairs(session.suite, legs))
        write_features(session, features, maps, tokens)
    session.team.gather(None)  # wait until all files are written


def features_run(
    suite: PublishedSuite, model: LanguageModel | None = None, *, tokens: int = 0, console: Console | None = None
) -> None:
    """Compute the features of every published leg; `load_features` reads the files. See `Suite.features`.

    `model` is the run's language model, if it is loaded already.
    """
    make_features(Session(suite, model=model, console=console, team=Team.joined()), tokens=tokens)


def question(session: Session, leg: Leg, tokens: int) -> FeatureQuestion:
    """Return the question that a leg's features answer."""
    neighbours = session.suite.neighbours(leg)
    ids = {side: other.id for side, other in neighbours.items()}
    return FeatureQuestion(
        leg=leg.id,
        layer=leg.layer,
        n_sequences=len(session.held_out(tokens)),
        n_examples=EXAMPLES,
        window_before=WINDOW[0],
        window_after=WINDOW[1],
        above=ids.get("above"),
        below=ids.get("below"),
        dictionaries=session.suite.digest([leg, *neighbours.values()]),
    )


def legs_without_features(session: Session, tokens: int) -> list[Leg]:
    """Return the legs whose features are missing, or answer another question."""
    missing = []
    for leg in session.suite.legs:
        facts = load_facts(session.suite.directory.features(leg.id))
        if facts is None or not facts.is_current(question(session, leg, tokens)):
            missing.append(leg)
    return missing


def neighbour_pairs(suite: PublishedSuite, legs: list[Leg]) -> list[SitePair]:
    """Return the pairs of sites between which similar latents are looked for."""
    pairs = []
    for leg in legs:
        for other in suite.neighbours(leg).values():
            pairs += sites_between(leg, other)
    return pairs


@torch.no_grad()
def write_features(
    session: Session, collected: dict[str, Features], maps: dict[SitePair, AffineMap], tokens: int
) -> None:
    """Write the collected features of some legs, adding what follows from weights: logits and similar latents."""
    if not collected:
        return
    suite = session.suite
    W_U = session.unembedding
    for leg_id, features in collected.items():
        leg = suite.plan.leg(leg_id)
        dictionary = suite.dictionary(leg).to(session.model.device)
        further: dict[str, Any] = {}
        if W_U is not None and leg.site_out.module not in OFF_THE_STREAM:
            further |= logit_effects(dictionary.W_dec, W_U)
        for side, other in suite.neighbours(leg).items():
            folded = fold(dictionary, map_of_legs(maps, leg, other))
            others = suite.dictionary(other).to(session.model.device)
            latents, cosines = most_similar(folded.W_dec, others.W_dec)
            further[f"{side}_latents"] = latents.int().cpu()
            further[f"{side}_cosine"] = cosines.half().cpu()
        asked = question(session, leg, tokens)
        facts = features.facts.model_copy(update=asked.model_dump())
        if session.writes:
            features.with_(facts=facts, **further).save(suite.directory.features(leg_id))


@torch.no_grad()
def logit_effects(W_dec: Tensor, W_U: Tensor, n: int = TOKENS) -> dict[str, Tensor]:
    """Return the n tokens whose logits each decoder row (F, D) raises and lowers most, by an unembedding (V, D).

    >>> effects = logit_effects(torch.tensor([[2.0]]), torch.tensor([[1.0], [-3.0], [0.5]]), n=1)
    >>> effects["top_logits"].tolist(), effects["top_logits_values"].tolist(), effects["bottom_logits"].tolist()
    ([[0]], [[2.0]], [[1]])

    This is direct logit attribution: the row is added to the last residual stream, ignoring the layers in between.
    """
    n = min(n, W_U.shape[0])
    parts: dict[str, list[Tensor]] = {}
    for rows in W_dec.split(max(1, NUMBERS_PER_PIECE // W_U.shape[0])):
        effects = rows @ W_U.T
        for name, largest in (("top_logits", True), ("bottom_logits", False)):
            values, tokens = effects.topk(n, dim=1, largest=largest)
            parts.setdefault(name, []).append(tokens.int().cpu())
            parts.setdefault(f"{name}_values", []).append(values.half().cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@torch.no_grad()
def most_similar(rows: Tensor, others: Tensor, n: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Return, for each decoder row (F, D), the n of `others` (G, D) with the highest cosines, and these cosines."""
    normalize = torch.nn.functional.normalize
    directions = normalize(others, dim=1).T
    indices = []
    cosines = []
    for part in normalize(rows, dim=1).split(max(1, NUMBERS_PER_PIECE // len(others))):
        best = (part @ directions).topk(min(n, len(others)), dim=1)
        indices.append(best.indices)
        cosines.append(best.values)
    return torch.cat(indices), torch.cat(cosines)
