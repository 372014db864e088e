"""SAE Relay: sparse autoencoders for every layer of a language model, by training one and relaying it to the others.

>>> import saerelay as sr
>>> str(sr.Site(3))
'L3'

A finished run: `suite = sr.load("runs/a"); sae = suite[sr.Site(3)]; z = sae.encode(x); x_hat = sae.decode(z)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saerelay.attachment import attach as attach
    from saerelay.dictionaries import Dictionary as Dictionary
    from saerelay.dictionaries import match_l0 as match_l0
    from saerelay.errors import SaeRelayError as SaeRelayError
    from saerelay.evaluate import evaluate_run as evaluate_run
    from saerelay.features import Features as Features
    from saerelay.features import features_run as features_run
    from saerelay.features import load_features as load_features
    from saerelay.hop import hop_run as hop_run
    from saerelay.interop import load_dictionary as load_dictionary
    from saerelay.interop import load_layer_normed as load_layer_normed
    from saerelay.launch import plan_run as plan_run
    from saerelay.launch import train_run as train_run
    from saerelay.lineage import Lineage as Lineage
    from saerelay.lineage import lineage_run as lineage_run
    from saerelay.model import LanguageModel as LanguageModel
    from saerelay.moments import Moments as Moments
    from saerelay.plan import Plan as Plan
    from saerelay.recipe import Run as Run
    from saerelay.site import Site as Site
    from saerelay.suite import Suite as Suite
    from saerelay.suite import load as load
    from saerelay.transfer import AffineMap as AffineMap
    from saerelay.transfer import fold as fold
    from saerelay.transfer import map_between as map_between
    from saerelay.transfer import refit as refit
    from saerelay.transfer import revive as revive

__version__ = "0.1.0"

_HOMES = {
    "AffineMap": "transfer",
    "Dictionary": "dictionaries",
    "Features": "features",
    "LanguageModel": "model",
    "Lineage": "lineage",
    "Moments": "moments",
    "Plan": "plan",
    "Run": "recipe",
    "SaeRelayError": "errors",
    "Site": "site",
    "Suite": "suite",
    "attach": "attachment",
    "evaluate_run": "evaluate",
    "features_run": "features",
    "fold": "transfer",
    "hop_run": "hop",
    "lineage_run": "lineage",
    "load": "suite",
    "load_dictionary": "interop",
    "load_features": "features",
    "load_layer_normed": "interop",
    "map_between": "transfer",
    "match_l0": "dictionaries",
    "plan_run": "launch",
    "refit": "transfer",
    "revive": "transfer",
    "train_run": "launch",
}
__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `saerelay --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'saerelay' has no attribute '{name}'")
    return getattr(import_module(f"saerelay.{_HOMES[name]}"), name)
