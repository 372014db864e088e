"""Other tools' names for the sites of a model, and public names of models."""

import re
from pathlib import Path

from saerelay.module_names import MLP_INPUTS, MLPS, PROJECTIONS
from saerelay.site import MODULE_KINDS, ModuleKind, Site

_HOOKS: dict[ModuleKind, str] = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "attn_z": "attn.hook_z",
}
"""TransformerLens' name of each kind of site, after "blocks.<layer>."."""

_MODULES: dict[ModuleKind, tuple[str, ...]] = {
    "resid_post": ("",),
    "resid_pre": ("input",),
    "mlp_in": (*(f"{path}.input" for path in MLP_INPUTS), "pre_feedforward_layernorm"),
    "mlp_out": (*MLPS, "ffn", "feed_forward", "post_feedforward_layernorm"),
    "attn_out": (*PROJECTIONS, "attn", "self_attn", "attention", "self_attention"),
    "attn_z": tuple(f"{path}.input" for path in PROJECTIONS),
}
"""For each kind of site, the paths within a layer of modules whose output (with ".input": whose
input) it is."""


def hook_name(site: Site) -> str:
    """Return TransformerLens' name of a site, which SAELens and llamascopium also use.

    >>> hook_name(Site(3)), hook_name(Site(0, "attn_z"))
    ('blocks.3.hook_resid_post', 'blocks.0.attn.hook_z')
    """
    return f"blocks.{site.layer}.{_HOOKS[site.module]}"


def site_named(name: str) -> Site | None:
    """Return the site that a TransformerLens hook or a module's path names; None for others.

    >>> site_named("blocks.3.attn.hook_z"), site_named("gpt_neox.layers.10"), site_named("h.2.mlp")
    (Site(layer=3, module='attn_z'), Site(layer=10, module='resid_post'), Site(layer=2, module='mlp_out'))
    >>> site_named("embed_tokens") is None
    True

    A path means the module's output, unless it ends in ".input".
    """
    hook = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", name)
    if hook:
        layer, hook_point = hook.groups()
        for kind in MODULE_KINDS:
            if hook_point == _HOOKS[kind]:
                return Site(int(layer), kind)

    path = re.fullmatch(r"(?:\w+\.)*?(?:layers?|h|blocks)\.(\d+)\.?([\w.]*)", name)
    if path:
        layer, module = path.groups()
        module = module.removesuffix("output").removesuffix(".")
        for kind in MODULE_KINDS:
            if module in _MODULES[kind]:
                return Site(int(layer), kind)
    return None


def public_name(model: str) -> str:
    """Return a model's public name: the hub id, or the name of its directory.

    >>> public_name("demo"), public_name("EleutherAI/pythia-70m")
    ('saerelay-demo', 'EleutherAI/pythia-70m')
    """
    if model == "demo":
        return "saerelay-demo"
    if hub_id(model):
        return model
    return Path(model).expanduser().resolve().name


def public_adapter(adapter: str) -> str:
    """Return an adapter's public name: a hub id with its commit, or the name of its directory.

    >>> public_adapter("me/lora@c0ffee"), public_adapter("/home/me/lora"), public_adapter("")
    ('me/lora@c0ffee', 'lora', '')
    """
    name, _, _ = adapter.partition("@")
    return adapter if hub_id(name) or not adapter else Path(adapter).name


def hub_id(name: str) -> str:
    """Return the name if it is a hub id and not a path on this machine, else "".

    >>> hub_id("EleutherAI/pythia-70m"), hub_id("./mine"), hub_id("demo")
    ('EleutherAI/pythia-70m', '', '')
    """
    return name if looks_like_hub_id(name) and not Path(name).exists() else ""


def looks_like_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, user/name.

    >>> looks_like_hub_id("me/saes"), looks_like_hub_id("me/saes/layer_3")
    (True, False)
    """
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
