"""The model card of exported SAEs: what they are, their quality, how they were made, how to load them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saerelay.interop.names import hub_id, public_adapter
from saerelay.interop.origin import Origin
from saerelay.lm.source import pinned
from saerelay.planning.leg import Leg
from saerelay.planning.legs import parts_of
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.planning.toml import annotated_toml
from saerelay.runs.suite import method_of
from saerelay.site import Site
from saerelay.spec import format_count
from saerelay.workflows.placeless import without_paths

_LOADING = {
    "saelens": """
from sae_lens import SAE

sae = SAE.from_pretrained("{repo}", "{folder}")
""",
    "sparsify": """
from sparsify import Sae

sae = Sae.load_from_hub("{repo}", hookpoint="{folder}")
""",
    "dictionary_learning": """
from dictionary_learning.utils import load_dictionary
from huggingface_hub import snapshot_download

path = snapshot_download("{repo}", allow_patterns="{folder}/*")
sae, config = load_dictionary(f"{{path}}/{folder}", device="cpu")
""",
    "circuit-tracer": """
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

transcoders, config = load_transcoder_from_hub("{repo}", lazy_decoder=False)
y_hat = transcoders[0](x)        # x: what the MLP of layer 0 reads
""",
}
"""How each format is loaded by the tool it belongs to."""

_LOADING_HERE = """
import saerelay as sr

sae, origin = sr.load_dictionary("hf://{repo}/{folder}")
z = sae.encode(x)                # x: activations (..., width), raw
x_hat = sae.decode(z)
"""


_LOADING_TRANSCODER_HERE = """
import saerelay as sr

transcoder, origin = sr.load_dictionary("hf://{repo}/{folder}")
y_hat = transcoder(x)            # x: what the MLP reads (..., width), raw
"""

_LOADING_ONE_FILE = """
from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder
from huggingface_hub import hf_hub_download

path = hf_hub_download("{repo}", "{folder}")     # the set lacks some layers: load file by file
transcoder = load_relu_transcoder(path, {layer}, lazy_encoder=False, lazy_decoder=False)
y_hat = transcoder(x)            # x: what the MLP of layer {layer} reads
"""


@dataclass(frozen=True)
class ExportedSAE:
    """One exported SAE: its folder, what it is, and its quality."""

    folder: str
    description: str
    origin: Origin
    leg: Leg | None
    """The leg that trained it, if it belongs to a run."""
    metrics: dict[str, Any]
    """The metrics of eval/<id>.json; {} if it was not evaluated."""
    tokens_before: int = 0
    """Number of tokens that the legs which its leg continues were trained on."""


def model_card(
    saes: Sequence[ExportedSAE], format: str, *, licence: str = "", repo: str = "", plan: Plan | None = None
) -> str:
    """Return the text of README.md: quality, lineage, how to load, recipe, licence.

    `plan` is the plan of the run that the SAEs belong to, if any. Names and texts from files are escaped.
    """
    models = _distinct(sae.origin.model for sae in saes)
    names = ", ".join(_escaped(model) for model in models) or "a language model"
    paragraphs = [
        _header(saes, format, licence),
        f"# {'Transcoders' if _are_transcoders(saes) else 'Sparse autoencoders'} of {names}",
        _introduction(saes, format, of_demo_model="saerelay-demo" in models),
    ]
    if plan and plan.facts.adapter:
        adapter = _escaped(public_adapter(plan.facts.adapter))
        paragraphs.append(f"The model is {names} with the adapter {adapter} merged into its weights.")
    paragraphs += ["## Quality", _quality(saes)]
    if plan:
        paragraphs += ["## Lineage", _lineage(saes, plan)]
    paragraphs += ["## Loading", *_loading(format, repo or "USER/REPO", saes)]
    if plan:
        paragraphs += [
            "## Recipe",
            f"{_how_to_repeat(plan)} Of local paths only the last part is given; complete them first.",
            _fenced(_recipe(plan), "toml"),
        ]
    paragraphs += [
        "## Licence",
        _escaped(licence) if licence else "The publisher of these dictionaries stated no licence.",
    ]
    return "\n\n".join(paragraphs) + "\n"


# --- sections ----------------------------------------------------------------------------------


def _header(saes: Sequence[ExportedSAE], format: str, licence: str) -> str:
    """Return the metadata that the hub reads: YAML between dashes."""
    from huggingface_hub import ModelCardData

    models = _distinct(sae.origin.model for sae in saes)
    datasets = _distinct(sae.origin.dataset for sae in saes)
    data = ModelCardData(
        license=licence or None,
        base_model=[model for model in models if hub_id(model)] or None,
        library_name=format,
        datasets=[dataset for dataset in datasets if hub_id(dataset)] or None,
        tags=["sparse-autoencoder", "interpretability", "saerelay"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _are_transcoders(saes: Sequence[ExportedSAE]) -> bool:
    return all(sae.origin.site_out not in (None, sae.origin.site) for sae in saes)


def _introduction(saes: Sequence[ExportedSAE], format: str, *, of_demo_model: bool) -> str:
    """Return a sentence on the SAEs, and one on the program that wrote them."""
    names = ("transcoder", "transcoders")
    if not _are_transcoders(saes):
        names = ("sparse autoencoder (SAE)", "sparse autoencoders (SAEs)")
    place = "file" if format == "circuit-tracer" else "directory"
    if len(saes) > 1:
        text = f"{len(saes)} {names[1]} in {_escaped(format)}'s format, one per {place}."
    else:
        text = f"A {names[0]} in {_escaped(format)}'s format."
    text += (
        " The input is the model's raw activations. Written by saerelay, which trains an SAE at "
        "one layer and transfers it to the others by closed-form maps."
    )
    if of_demo_model:
        text += " `saerelay-demo` is the small model of Python code that comes with saerelay."
    return text


def _quality(saes: Sequence[ExportedSAE]) -> str:
    """Return a table of the metrics, with their definitions."""
    columns = (
        "directory",
        "reads",
        "SAE",
        "L0",
        "FVU",
        "explained variance",
        "ΔCE (nats)",
        "CE score",
        "alive",
        "trained on",
    )
    rows = []
    for sae in saes:
        tokens = sae.origin.provenance.get("tokens")
        if isinstance(tokens, int):
            tokens += sae.tokens_before
        rows.append(
            [
                sae.folder,
                _reads(sae.origin.site, sae.origin.site_out),
                sae.description,
                _number(sae.origin.l0, ".1f"),
                *_metrics(sae.metrics),
                f"{format_count(tokens)} tokens" if isinstance(tokens, int) else "-",
            ]
        )

    notes = [
        "FVU: fraction of variance unexplained. ΔCE: increase of the language model's loss, in nats per "
        "token, when the SAE's reconstruction replaces the activations. CE score: (CE zero-ablated − CE with SAE) / "
        "(CE zero-ablated − CE clean), 1 is best. Alive: share of latents that fired."
    ]
    measured = [sae.metrics["n_tokens"] for sae in saes if sae.metrics]
    if measured:
        notes.append(f"Measured by `saerelay eval` on {format_count(min(measured))} tokens of held-out documents.")
    if len(measured) < len(saes):
        notes.append("`saerelay eval` on the run's directory evaluates the SAEs that are marked as not evaluated.")
    return _table(columns, rows) + "\n\n" + " ".join(notes)


def _metrics(metrics: dict[str, Any]) -> list[str]:
    """Return the cells for FVU, explained variance, ΔCE, CE score and share of live latents."""
    if not metrics:
        return ["not evaluated", "-", "-", "-", "-"]
    delta_ce = _number(metrics.get("delta_ce"), ".4f")
    standard_error = metrics.get("delta_ce_se")
    if standard_error is not None:
        delta_ce += f" ± {standard_error:.4f}"
    return [
        _number(metrics.get("fvu"), ".4f"),
        _number(metrics.get("explained_variance"), ".4f"),
        delta_ce,
        _number(metrics.get("ce_loss_score"), ".4f"),
        _number(metrics.get("frac_alive"), ".1%"),
    ]


def _lineage(saes: Sequence[ExportedSAE], plan: Plan) -> str:
    """Return a table with a row for each leg and each of its ancestors."""
    legs = [sae.leg for sae in saes if sae.leg]
    hops = {sae.leg.id: sae.origin.provenance.get("hop") or {} for sae in saes if sae.leg}
    related = {leg.id: leg for leg in legs}
    for leg in legs:
        while leg.parent and plan.has(leg.parent):
            leg = plan.leg(leg.parent)
            related[leg.id] = leg

    columns = (
        "SAE",
        "reads",
        "initialised from",
        "method",
        "map fitted on (tokens)",
        "trained on (tokens, at most)",
    )
    rows = []
    for leg in sorted(related.values(), key=lambda leg: (leg.site, leg.id)):
        parent = leg.parent if plan.has(leg.parent) else Path(leg.parent).name  # outside the plan: a directory
        method = hops.get(leg.id, {}).get("method")
        how = method_of(leg, method) or "from scratch"
        if method == "scratch":
            how = f"from scratch: no map from {parent} helped"
            parent = ""
        rows.append(
            [
                leg.id,
                _reads(leg.site, leg.site_out),
                parent or "-",
                how,
                format_count(leg.moment_tokens) if leg.moment_tokens else "-",
                format_count(leg.budget_tokens),
            ]
        )
    return _table(columns, rows)


def _loading(format: str, repo: str, saes: Sequence[ExportedSAE]) -> list[str]:
    """Return code that loads one of the SAEs: with the tool that owns the format, and with saerelay."""
    first = saes[0]
    layers = [sae.origin.site.layer for sae in saes if sae.origin.site]
    templates = [_LOADING_TRANSCODER_HERE if _are_transcoders([first]) else _LOADING_HERE]
    if format == "circuit-tracer" and sorted(layers) != list(range(len(saes))):
        templates.insert(0, _LOADING_ONE_FILE)
    elif format in _LOADING:
        templates.insert(0, _LOADING[format])
    names = {"repo": repo, "folder": first.folder, "layer": layers[0] if layers else 0}
    return [_fenced(template.format(**names), "python") for template in templates]


def _how_to_repeat(plan: Plan) -> str:
    """Say what training with the recipe of a run gives: the same, unless its plan is not settled by the recipe."""
    command = "`saerelay train run.toml --out runs/a` with this `run.toml`"
    if plan.extended_at or any(len(parts_of(leg, plan.legs)) > 1 for leg in plan.legs):
        return (
            "The run was extended: legs, or tokens of legs, were added to it when it was finished, and trained on what "
            f"the corpus had next. {command} trains everything in one run, so that other dictionaries result."
        )
    if plan.recipe.plan.surveyed:
        return (
            f"{command} surveys the layers again. What it then chooses to train depends on the machine's speed, so "
            "that other dictionaries may result; the table above shows what was chosen here."
        )
    return f"{command} reproduces these dictionaries."


def _recipe(plan: Plan) -> str:
    """Return the recipe as TOML, with the model's commit, and without the paths of this machine."""
    recipe = plan.recipe.changed(model=pinned(plan.recipe.model, plan.facts))
    public = without_paths(recipe.model_dump())
    return annotated_toml(Recipe.parse(public, source="card"))


# --- markdown ----------------------------------------------------------------------------------


def _reads(site: Site | None, site_out: Site | None) -> str:
    if site is None:
        return "not stated"
    arrow = f" → {site_out.module}" if site_out and site_out != site else ""
    return f"{site.module}{arrow}, layer {site.layer}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _distinct(names: Iterable[str]) -> list[str]:
    """Return the names in order, without empty names and repetitions."""
    return list(dict.fromkeys(name for name in names if name))


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = []
    for row in [columns, *rows]:
        cells = [_escaped(text) for text in row]
        lines.append(f"| {' | '.join(cells)} |")
        if len(lines) == 1:
            dashes = ["---"] * len(cells)
            lines.append(f"| {' | '.join(dashes)} |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Escape a text for Markdown, on one line, so that it shows as it is.

    >>> print(_escaped("a|b <b>\\nc"))
    a\\|b \\<b\\> c
    """
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#!&~])", r"\\\1", one_line)


def _fenced(text: str, language: str) -> str:
    """Return a block of code whose fence is longer than any fence in the text."""
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * (1 + max([2, *runs]))
    return f"{fence}{language}\n{text.strip()}\n{fence}"
