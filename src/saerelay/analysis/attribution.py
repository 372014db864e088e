"""Direct logit attribution: how much the strongest latent raises the right token of a prompt over the wrong one.

Shapes: N prompts, C positions, D width, F latents.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from saerelay.analysis.metrics import batches
from saerelay.analysis.prompts import Prompt
from saerelay.data.kept import trained_on
from saerelay.lm.model import LanguageModel
from saerelay.planning.plan import Plan
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

ATTRIBUTIONS_AT_ONCE = 2**24
"""Effects of latents on prompts that are in memory at the same time: 64 MiB."""
OWN_PROMPTS = 62
"""Number of prompts drawn if none are given, as in the paper."""
OWN_TASK = "the model's own task: positions of the test split whose next token it predicts, against its second choice"


@torch.no_grad()
def direct_logit_attribution(dictionary: Dictionary, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest direct effect of a latent on each prompt (N), and the latent that has it (N).

    x (N, D) are activations at the last position, and `directions` (N, D) the unembedding of the right token minus that
    of the wrong token. A latent's effect is its activation × (decoder row · direction): its part of the difference of
    logits before the final norm divides by the size of the stream. Values can be compared within a model, not between
    models.

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2),
    ...                  b_dec=torch.zeros(2))
    >>> scores, latents = direct_logit_attribution(sae, torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 4.0]]))
    >>> scores.tolist(), latents.tolist()
    ([4.0], [1])
    """
    n_rows = max(1, ATTRIBUTIONS_AT_ONCE // dictionary.n_latents)
    scores = []
    latents = []
    for rows, row_directions in zip(x.split(n_rows), directions.split(n_rows), strict=True):
        effects = dictionary.encode(rows) * (row_directions @ dictionary.W_dec.T)
        largest = effects.max(dim=1)
        scores.append(largest.values)
        latents.append(largest.indices)
    return torch.cat(scores), torch.cat(latents)


def last_activations(model: LanguageModel, prompts: Sequence[Prompt], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Return activations (N, D), float32, at the last position of each prompt, by site."""
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for prompt in prompts:
        activations = model.harvest(torch.tensor([prompt.tokens]), sites)
        for site, x in activations.items():
            rows[site].append(x[0, -1].float())
    return {site: torch.stack(parts) for site, parts in rows.items()}


@torch.no_grad()
def own_prompts(plan: Plan, model: LanguageModel, sequences: np.ndarray, n: int = OWN_PROMPTS) -> list[Prompt]:
    """Draw up to n held-out positions whose next token the model predicts; the wrong token is its second choice.

    Positions that no dictionary is trained on (BOS, outlier norms) do not count. The run's seed decides what is drawn:
    sequences (N, context) are read in a random order, until they hold 4 n positions.
    """
    generator = np.random.default_rng(plan.recipe.train.seed)
    prompts: list[Prompt] = []
    for tokens in batches(plan, generator.permutation(sequences), model.device, holds_logits=True):
        forward = model.forward(tokens, plan.with_probe([]))
        keep = trained_on(plan, forward.tokens, forward.activations).cpu()
        logits = model.head.logits(forward.states, slice(0, model.head.n_tokens))
        best_two = logits[:, :-1].float().topk(2).indices.cpu()
        first, second = best_two.unbind(dim=-1)
        is_predicted = (first == tokens[:, 1:]) & keep[:, :-1]
        for sequence, position in is_predicted.nonzero().tolist():
            text = tuple(tokens[sequence, : position + 1].tolist())
            right = int(first[sequence, position])
            wrong = int(second[sequence, position])
            prompts.append(Prompt(text, right, wrong))
        if len(prompts) >= 4 * n:
            break
    return [prompts[i] for i in generator.permutation(len(prompts))[:n]]
