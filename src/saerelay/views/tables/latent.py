"""One latent, on a terminal."""

import math

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saerelay.runs.documents.latents import LatentDescription, LatentExample, LatentHistogram, LineageStep, LogitEffect
from saerelay.views.text import decimal, visible

_BARS = " ▁▂▃▄▅▆▇█"


def latent_view(latent: LatentDescription, *, colour: bool) -> Group:
    """Show how often a latent fires, on what, which tokens it promotes, and what became of it from layer to layer.

    Tokens are shaded by activation; without `colour`, the strongest token of each example stands between »«.
    """
    title = f"{latent.leg}, latent {latent.latent} (layer {latent.layer} of {latent.model})"
    lines: list[RenderableType] = [Text(title, style="bold")]
    if latent.n_fired:
        share = latent.n_fired / latent.n_tokens
        lines.append(
            Text(
                f"fires on {share:.3%} of {latent.n_tokens:,} held-out tokens ({latent.n_fired:,}), max "
                f"{latent.max_activation:.3g}, mean {latent.mean_activation:.3g} when active"
            )
        )
        lines += [_histogram(latent.histogram), Text()]
        lines += [_example(example, latent.max_activation, colour) for example in latent.examples]
    else:
        lines.append(Text(f"never fires on {latent.n_tokens:,} held-out tokens"))
    if latent.interpretation:
        explained = latent.interpretation
        scores = f"detection {decimal(explained.detection)}, fuzzing {decimal(explained.fuzzing)}"
        text = f"explanation by {visible(explained.model, 80)}: {visible(explained.explanation, 500)} ({scores})"
        lines.append(Text(text))
    lines.append(Text())
    lines += _logits("promotes  ", latent.top_logits)
    lines += _logits("suppresses", latent.bottom_logits)
    for side, similar in latent.similar.items():
        latents = "  ".join(f"{other.latent} ({other.cosine:.2f})" for other in similar.latents)
        about = f"most similar {side}, in {similar.leg} (decoder cosine after the affine map between the layers)"
        lines.append(Text(f"{about}: {latents}"))
    return Group(*lines, Text(), _lineage_table(latent))


def _logits(label: str, effects: list[LogitEffect] | None) -> list[Text]:
    if effects is None:
        return []
    tokens = "  ".join(f"'{visible(effect.token)}' {effect.value:+.3g}" for effect in effects)
    return [Text(f"{label} {tokens}")]


def _histogram(histogram: LatentHistogram) -> Text:
    """Draw the counts as a row of bars, from the first to the last non-empty bin."""
    used = [i for i, count in enumerate(histogram.counts) if count]
    first = used[0]
    last = used[-1]
    most = max(histogram.counts)
    bars = "".join(_BARS[math.ceil(8 * count / most)] for count in histogram.counts[first : last + 1])
    low = 2 ** (histogram.first_edge + first / 2)
    high = 2 ** (histogram.first_edge + (last + 1) / 2)
    return Text(f"activations {low:.3g} {bars} {high:.3g}, in steps of √2")


def _example(example: LatentExample, most: float, colour: bool) -> Text:
    strongest = example.position - example.start
    line = Text(f"{example.activations[strongest]:8.3g}  ", no_wrap=True, overflow="ellipsis")
    for i, (token, activation) in enumerate(zip(example.tokens, example.activations, strict=True)):
        text = visible(token)
        style = _shade(activation / most)
        if i == strongest:
            style = f"bold {style}"
            text = text if colour else f"»{text}«"
        line.append(text, style=style)
    return line


def _shade(share: float) -> str:
    """Return the style of a token, by its activation's share of the largest."""
    if share <= 0:
        return ""
    share = min(1.0, share)
    return f"black on rgb(255,{240 - round(110 * share)},{200 - round(200 * share)})"


def _lineage_table(latent: LatentDescription) -> Table:
    table = Table(box=None, pad_edge=False, title="lineage, from layer to layer", title_justify="left")
    for name in ("layer", "leg", "latent", "decoder cosine", "encoder cosine", "correlation", "status"):
        table.add_column(name, justify="left" if name in ("leg", "status") else "right")
    for step in latent.lineage:
        table.add_row(*_step(step, step.leg), style="bold" if step.leg == latent.leg else "")
    for step in latent.relatives:
        table.add_row(*_step(step, f"{step.leg} ({step.kind})"), style="dim")
    return table


def _step(step: LineageStep, name: str) -> list[str]:
    numbers = []
    for value in (step.decoder_cosine, step.encoder_cosine, step.correlation):
        numbers.append("" if value is None else f"{value:z.3f}")
    return [str(step.layer), escape(name), str(step.latent), *numbers, step.status or ""]
