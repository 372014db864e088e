"""SAEs out and in: a run in other tools' formats with a model card, up to the hub and down; any SAE in our own form."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from saerelay.analysis.suite import Suite, load
from saerelay.errors import FormatError, RunDirectoryError
from saerelay.files import leafwise, write_text
from saerelay.interop import hub, load_dictionary, own, places_in, read_any, write_dictionary
from saerelay.interop.names import hub_id, public_name
from saerelay.interop.origin import Origin
from saerelay.lm.ports import module_paths
from saerelay.planning.plan import Leg, Plan
from saerelay.planning.recipe import Recipe
from saerelay.planning.toml import annotated_toml
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.quality import Evaluation
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site
from saerelay.spec import format_count

LOADING = {
    "saelens": 'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo}", "{folder}")',
    "sparsify": 'from sparsify import Sae\n\nsae = Sae.load_from_hub("{repo}", hookpoint="{folder}")',
    "dictionary_learning": (
        "from dictionary_learning.utils import load_dictionary\nfrom huggingface_hub import snapshot_download\n\n"
        'path = snapshot_download("{repo}", allow_patterns="{folder}/*")\n'
        'sae, config = load_dictionary(f"{{path}}/{folder}", device="cpu")'
    ),
    "saerelay": "",
}
"""How each format is loaded by the tool it belongs to."""


@dataclass(frozen=True)
class Shared:
    """One SAE that was written, for the card: where, what, of which leg, how good."""

    folder: str
    kind: str
    origin: Origin
    leg: Leg | None
    metrics: dict[str, Any]


def import_dictionary(
    reference: str, out: Path, *, format: str = "", model: str = "", site: Site | None = None
) -> tuple[Dictionary, Origin]:
    """Write a trained SAE of any format into a new directory in canonical form, for `hop --from` and `parent = `.

    Raises FormatError if it cannot be read (see `load_dictionary`), or if neither its files nor `site` say what it
    reads; RunDirectoryError if `out` exists.
    """
    with new_directory(out) as place:
        dictionary, origin = load_dictionary(reference, format=format, model=model, site=site)
        if origin.site is None:
            raise FormatError(f"{reference}: its files do not say what it reads; add --layer (and --module)")
        own.write(place, dictionary, origin)
    return dictionary, origin


def export_run(
    source: str, out: Path, format: str, *, legs: Iterable[str] = (), licence: str = "", repo: str = ""
) -> list[Shared]:
    """Write a run's suite, or one SAE of any format, into a new directory in a format, with a model card.

    One directory a layer: layer_3, layer_3.mlp_out; sparsify's are named by the module's path, layers.3. `legs` are
    the ids of legs to take instead of one a site. Raises FormatError for what the format cannot say, RunDirectoryError
    if `out` exists.
    """
    with new_directory(out) as place:
        if RunDirectory(Path(source)).plan.is_file():
            suite = load(source)
            shared = _write_suite(suite, place, format, list(legs))
            card = model_card(shared, format, licence=licence, repo=repo, plan=suite.plan)
        else:
            dictionary, origin = load_dictionary(source)
            folder = _folder(origin, format, prefixed=True) if origin.site else "sae"
            write_dictionary(place / folder, dictionary, origin, format)
            shared = [Shared(folder, describe(dictionary), origin, None, {})]
            card = model_card(shared, format, licence=licence, repo=repo)
        write_text(place / "README.md", card)
    return shared


def push_run(
    source: str, repo: str, format: str, *, legs: Iterable[str] = (), licence: str = "", private: bool = False
) -> str:
    """Export to a temporary directory and upload that to a repository of the hub; the address of the commit."""
    with TemporaryDirectory(prefix="saerelay-push-") as temporary:
        export_run(source, Path(temporary) / "export", format, legs=legs, licence=licence, repo=repo)
        return hub.upload(Path(temporary) / "export", repo, private=private)


def preview(source: str, repo: str, format: str, *, legs: Iterable[str] = (), licence: str = "") -> str:
    """What `push_run` would upload: its files with their sizes, and the model card. Touches no network."""
    with TemporaryDirectory(prefix="saerelay-push-") as temporary:
        place = Path(temporary) / "export"
        export_run(source, place, format, legs=legs, licence=licence, repo=repo)
        files = [(path.relative_to(place), path.stat().st_size) for path in sorted(place.rglob("*")) if path.is_file()]
        lines = [f"{size:>15,}  {name}" for name, size in files]
        total = f"{sum(size for _, size in files):>15,}  bytes would be uploaded to {repo}"
        return "\n".join([*lines, total, "", (place / "README.md").read_text(encoding="utf-8")])


def pull(reference: str, out: Path) -> list[Path]:
    """Download a repository of SAEs, or a folder of it, into a new directory; where in it the SAEs are.

    Each SAE is read once: FormatError if one cannot be, or if a pickle belongs to none. No code is fetched, and an
    interruption leaves nothing.
    """
    with new_directory(out) as place:
        folder = hub.download(reference if hub.is_remote(reference) else f"hf://{reference}", place.with_name("all"))
        places = places_in(folder)
        loose = [path for path in folder.rglob("*.pt") if path not in places and path.parent not in places]
        if loose or not places:
            what = f"{loose[0].relative_to(folder)} is a pickle of no known format" if loose else "no SAE is there"
            raise FormatError(f"{reference}: {what}; nothing was kept")
        for found in places:
            read_any(found)
        folder.replace(place)
    return [out / found.relative_to(folder) for found in places]


def describe(dictionary: Dictionary) -> str:
    """A dictionary in a few words.

    >>> import torch
    >>> describe(Dictionary(architecture="topk", k=2, W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4),
    ...                     b_dec=torch.zeros(4)))
    'topk, k 2, 4 latents, width 4'
    """
    k = f", k {dictionary.k}" if dictionary.k else ""
    return f"{dictionary.architecture}{k}, {dictionary.n_latents} latents, width {dictionary.d_model}"


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory under a temporary name that becomes `out` at the end; if anything fails, nothing is left."""
    if out.exists():
        raise RunDirectoryError(f"{out} exists; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise RunDirectoryError(f"{out}: cannot be made ({error.strerror}); choose another --out") from None
    with temporary:
        place = Path(temporary.name) / "new"
        place.mkdir()
        yield place
        place.rename(out)


# --- what is written -------------------------------------------------------------------------------------------------


def _write_suite(suite: Suite, place: Path, format: str, ids: list[str]) -> list[Shared]:
    """Each chosen leg in a directory of its own."""
    legs = [suite.leg(name) for name in ids] or suite.one_per_site
    if not legs:
        raise RunDirectoryError(f"{suite.directory.root}: no SAE is published yet; finish it with `saerelay train`")
    plan, shared = suite.plan, list[Shared]()
    paths = module_paths(plan.recipe.model, [leg.site for leg in legs])
    for leg in legs:
        dictionary, origin = own.read(suite.directory.leg(leg.id))
        evaluation = Evaluation.load_if_any(suite.directory.evaluation(leg.id))
        metrics = evaluation.metrics.model_dump(mode="json") if evaluation else {}
        metrics = {name: value for name, value in metrics.items() if not isinstance(value, list | dict)}
        origin = replace(
            origin,
            model=public_name(plan.recipe.model.name),
            module_path=paths.get(leg.site, ""),
            context=plan.recipe.data.context,
            prepend_bos=plan.recipe.data.prepend_bos,
            dataset=hub_id(plan.recipe.data.dataset),
            l0=metrics.get("l0", origin.l0),
            provenance=placeless(origin.provenance) | {"evaluation": metrics},
        )
        folder = _folder(origin, format, prefixed=plan.facts.has_lm_head)
        if sum(other.site == leg.site for other in legs) > 1:
            folder = f"{folder}-{leg.id}"
        write_dictionary(place / folder, dictionary, origin, format)
        shared.append(Shared(folder, describe(dictionary), origin, leg, metrics))
    return shared


def _folder(origin: Origin, format: str, *, prefixed: bool) -> str:
    """layer_3, layer_3.mlp_out; for sparsify the path of the module in the base model: layers.3, layers.3.mlp.

    `prefixed`: the path begins with the name of the base model ("gpt_neox.layers.3").
    """
    site = origin.site
    assert site
    if format != "sparsify":
        return f"layer_{site.layer}" + ("" if site.module == "resid_post" else f".{site.module}")
    path = origin.module_path.partition(".")[2] if prefixed else origin.module_path
    path = path or (f"layers.{site.layer}" if site.module == "resid_post" else "")
    if path.endswith(".input") or not re.fullmatch(r"\w+(\.\w+)*", path):
        raise FormatError(
            f"{site}: sparsify reads the outputs of modules and names SAEs by the module's path in the model; "
            f'"{path}" is none. Choose another --format'
        )
    return path


def placeless(data: Any) -> Any:
    """JSON with the last parts of absolute paths alone: where things are on a machine is nobody's business.

    >>> placeless({"text": ["/home/me/notes"], "parent": "runs/a/legs/L5"})
    {'text': ['notes'], 'parent': 'runs/a/legs/L5'}
    """

    def name(leaf: Any) -> Any:
        return Path(leaf).name if isinstance(leaf, str) and re.match(r"[/~]|[A-Za-z]:\\", leaf) else leaf

    return leafwise(name, data)


# --- the model card --------------------------------------------------------------------------------------------------


def model_card(
    shared: list[Shared], format: str, *, licence: str = "", repo: str = "", plan: Plan | None = None
) -> str:
    """README.md of an export: what is there, how good, who was carried from whom, the recipe, how to load it."""
    from huggingface_hub import ModelCardData

    models = list(dict.fromkeys(one.origin.model for one in shared if one.origin.model))
    header = ModelCardData(
        license=licence or None,
        base_model=[model for model in models if hub_id(model)] or None,
        library_name=format,
        datasets=list(dict.fromkeys(one.origin.dataset for one in shared if hub_id(one.origin.dataset))) or None,
        tags=["sparse-autoencoder", "interpretability", "saerelay"],
    )
    of, known = ", ".join(map(_cell, models)) or "a language model", repo or "USER/REPO"
    n = f"{len(shared)} sparse autoencoders" if len(shared) > 1 else "A sparse autoencoder"
    first = shared[0].folder
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# Sparse autoencoders of {of}",
        f"{n}, in {_cell(format)}'s format, one in each directory. They read the model's activations as they are, and "
        "were written by saerelay, which trains an SAE at one layer and carries it to the others by closed-form maps."
        + " `saerelay-demo` is the small model of Python code that comes with saerelay."
        * ("saerelay-demo" in models),
        "## Quality",
        _quality(shared),
    ]
    if plan:
        parts += ["## Lineage", _lineage([one.leg for one in shared if one.leg], plan)]
    parts += ["## Loading", *_loading(format, known, first)]
    if plan:
        parts += [
            "## Recipe",
            "`saerelay train run.toml --out runs/a` with this `run.toml` trains them again.",
            _fenced(annotated_toml(Recipe.parse(placeless(plan.recipe.model_dump()), source="card")), "toml"),
        ]
    parts += ["## Licence", _cell(licence) if licence else "None was stated by whoever published these SAEs."]
    return "\n\n".join(parts) + "\n"


def _quality(shared: list[Shared]) -> str:
    """The metrics of eval/<id>.json, and what they are."""
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
    for one in shared:
        m, site = one.metrics, one.origin.site
        delta = _number(m.get("delta_ce"), ".4f")
        if m.get("delta_ce_se") is not None:
            delta += f" ± {m['delta_ce_se']:.4f}"
        quality = [_number(m.get("fvu"), ".4f"), _number(m.get("explained_variance"), ".4f"), delta]
        quality += [_number(m.get("ce_loss_score"), ".4f"), _number(m.get("frac_alive"), ".1%")]
        tokens = one.origin.provenance.get("tokens")
        seen = f"{format_count(tokens)} tokens" if isinstance(tokens, int) else "-"
        if not m:
            quality = ["not evaluated", "-", "-", "-", "-"]
        rows.append([one.folder, _reads(site), one.kind, _number(one.origin.l0, ".1f"), *quality, seen])
    measured = [one.metrics["n_tokens"] for one in shared if one.metrics]
    notes = [
        "FVU: share of the variance not explained. ΔCE: what the model's loss rises by with the SAE's output in place."
    ]
    if measured:
        notes.append(f"Measured by `saerelay eval` on {format_count(min(measured))} tokens of held-out documents.")
    if len(measured) < len(shared):
        notes.append("Where nothing was measured, `saerelay eval` on the run's directory does it.")
    return _table(columns, rows) + "\n\n" + " ".join(notes)


def _lineage(legs: list[Leg], plan: Plan) -> str:
    """A row for each leg and each of its ancestors."""
    shown = {leg.id: leg for leg in legs}
    for leg in legs:
        while leg.parent and plan.has(leg.parent):
            leg = plan.leg(leg.parent)
            shown[leg.id] = leg
    rows = []
    for leg in sorted(shown.values(), key=lambda leg: (leg.site, leg.id)):
        parent = leg.parent if plan.has(leg.parent) else Path(leg.parent).name
        how = f"{leg.method}{' + refit' * bool(leg.refit_tokens)}" if leg.parent else "from scratch"
        fitted = format_count(leg.moment_tokens) if leg.moment_tokens else "-"
        rows.append([leg.id, _reads(leg.site), parent or "-", how, fitted, format_count(leg.budget_tokens)])
    return _table(
        ("SAE", "reads", "carried from", "by", "map fitted on (tokens)", "trained on (tokens, at most)"), rows
    )


def _loading(format: str, repo: str, folder: str) -> list[str]:
    ours = f'import saerelay as sr\n\nsae, origin = sr.load_dictionary("hf://{repo}/{folder}")'
    ours += "\nz = sae.encode(x)                # x: activations (..., width), raw\nx_hat = sae.decode(z)"
    theirs = LOADING[format].format(repo=repo, folder=folder)
    return [_fenced(code, "python") for code in (theirs, ours) if code]


def _reads(site: Site | None) -> str:
    return f"{site.module}, layer {site.layer}" if site else "not stated"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(columns), *(list(row) for row in rows)]
    lines = [[_cell(text) for text in line] for line in lines]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text as it reads, in one line, whatever markdown would make of it.

    >>> print(_cell("a|b <b>\\nc"))
    a\\|b \\<b\\> c
    """
    return re.sub(r"([\\`*_{}\[\]<>|#!&~])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str) -> str:
    """A block of code; its fence is longer than any in the text."""
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", text))]))
    return f"{fence}{language}\n{text.strip()}\n{fence}"
