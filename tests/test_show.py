"""A latent in the terminal: untrusted tokens are shown, never obeyed."""

import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from saerelay.runs.documents.latents import LatentDescription
from saerelay.views.tables.latent import latent_view
from saerelay.views.text import visible

HOSTILE = {
    "[red]markup[/red] [link=x]": "[red]markup[/red] [link=x]",
    "<script>alert(1)</script>&amp;": "<script>alert(1)</script>&amp;",
    "a\n\tb": "a⏎⇥b",
    "\x1b[2J\x07": r"\x1b[2J\x07",
    "\u202eabc\u200b\ufeff": r"\u202eabc\u200b\ufeff",
    "\ud800x": "\ufffdx",
    "\u2028\xa0": r"\u2028\xa0",
    "x" * 10_000: "x" * 40 + "…",
    "é 漢 \U0001f600": "é 漢 \U0001f600",
}


@pytest.mark.parametrize("token", HOSTILE, ids=lambda token: ascii(token[:12]))
def test_hostile_tokens_become_visible(token: str) -> None:
    assert visible(token) == HOSTILE[token]


def document(**changes: Any) -> LatentDescription:
    tokens = list(HOSTILE)
    step = {"leg": "L0", "layer": 0, "latent": 7, "decoder_cosine": None, "encoder_cosine": None, "correlation": None}
    next_step = step | {"leg": "L1[b]", "layer": 1, "decoder_cosine": 0.9, "encoder_cosine": -0.00001}
    data = {
        "leg": "L0", "layer": 0, "latent": 7, "model": "a[b]", "n_tokens": 1000, "n_fired": 7,
        "max_activation": 8.0, "mean_activation": 2.0, "histogram": {"first_edge": -1.0, "counts": [0, 0, 1, 8, 0]},
        "examples": [{"sequence": 3, "position": 21, "start": 20, "activations": [0.0, 8.0, 2.0, *[0.0] * 6],
                      "tokens": tokens, "token_ids": list(range(9))}],
        "top_logits": [{"token": token, "token_id": 1, "value": 1.5} for token in tokens], "bottom_logits": [],
        "lineage": [step | {"status": None}, next_step | {"status": "kept"}],
        "relatives": [next_step | {"kind": "control", "status": "died"}],
        "similar": {"above": {"leg": "L1[b]", "latents": [{"latent": 9, "cosine": 0.5}]}}, "interpretation": None,
    }  # fmt: skip
    return LatentDescription.parse(data | changes, source="test")


def printed(shown: LatentDescription, *, colour: bool) -> str:
    out = StringIO()
    console = Console(file=out, width=2000, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(latent_view(shown, colour=colour))
    out.getvalue().encode()  # no lone surrogate is left
    return out.getvalue()


def test_effects_on_logits_are_told_at_their_own_scale() -> None:
    effects = [{"token": "a", "token_id": 1, "value": 0.00123}, {"token": "b", "token_id": 2, "value": -20.5}]
    text = printed(document(top_logits=effects), colour=False)
    assert "'a' +0.00123" in text and "'b' -20.5" in text


def test_a_latent_is_printed_as_it_is() -> None:
    text = printed(document(), colour=False)
    assert "fires on 0.700% of 1,000 held-out tokens (7), max 8, mean 2 when active" in text
    assert "activations 1 ▁█ 2, in steps of √2" in text
    assert "       8  [red]markup[/red] [link=x]»<script>alert(1)</script>&amp;«a⏎⇥b" in text
    assert "promotes   '[red]markup[/red] [link=x]' +1.5" in text
    assert re.search(r"^ +1  L1\[b\] +7 +0.900 +0.000 +kept *$", text, re.MULTILINE)
    assert re.search(r"^ +1  L1\[b\] \(control\) +7 .* died *$", text, re.MULTILINE)
    assert "most similar above, in L1[b] (decoder cosine after the affine map between the layers): 9 (0.50)" in text
    assert set(re.findall(r"[\x00-\x1f\x7f\u202e\u200b\ud800]", text)) == {"\n"}


def test_tokens_are_shaded_by_activation() -> None:
    text = printed(document(), colour=True)
    shades = re.findall(r"48;2;255;(\d+);\d+m", text)
    assert shades == ["130", "212"], "the strongest, then one a quarter as strong; nothing where it does not fire"
    assert "»" not in text and "\x1b[2J" not in text


def test_a_latent_that_never_fires_says_so() -> None:
    silent = document(n_fired=0, max_activation=0.0, examples=[], histogram={"first_edge": 0.0, "counts": [0, 0]})
    assert "never fires on 1,000 held-out tokens" in printed(silent, colour=False)
