"""Share SAEs: export with a model card, push to the hub, pull from it, import."""

import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from saerelay.analysis.session import Session
from saerelay.analysis.suite import Suite, load
from saerelay.errors import FormatError, RunDirectoryError
from saerelay.files import reason, remove_directory, write_text
from saerelay.interop import (
    circuit_tracer,
    find_saes,
    hub,
    load_dictionary,
    neuronpedia,
    own,
    read_any,
    saelens,
    takes_transcoders,
    write_dictionary,
)
from saerelay.interop.names import hub_id, looks_like_hub_id, public_adapter, public_name
from saerelay.interop.origin import Origin
from saerelay.lm.ports import module_paths
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.quality import Evaluation
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site, SiteKind
from saerelay.workflows.model_card import ExportedSAE, model_card
from saerelay.workflows.neuronpedia import export_features
from saerelay.workflows.placeless import without_paths

# --- one SAE in --------------------------------------------------------------------------------


def import_dictionary(
    reference: str, out: Path, *, format: str = "", model: str = "", site: Site | None = None
) -> tuple[Dictionary, Origin]:
    """Write a trained SAE of any format into a new directory in canonical form.

    Raises the errors of `load_dictionary`, FormatError if neither its files nor `site` say which site it
    reads, and RunDirectoryError if `out` exists.
    """
    with new_directory(out) as directory:
        dictionary, origin = load_dictionary(reference, format=format, model=model, site=site)
        if origin.site is None:
            raise FormatError(f"{reference}: its files do not say what it reads; add --layer (and --module)")
        own.write(directory, dictionary, origin)
    return dictionary, origin


def describe(dictionary: Dictionary) -> str:
    """Describe a dictionary in a few words.

    >>> import torch
    >>> describe(Dictionary(architecture="topk", k=2, W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4),
    ...                     b_dec=torch.zeros(4)))
    'topk, k 2, 4 latents, width 4'
    """
    k = f", k {dictionary.k}" if dictionary.k else ""
    skip = ", skip connection" if dictionary.W_skip is not None else ""
    return f"{dictionary.architecture}{k}, {dictionary.n_latents} latents, width {dictionary.d_model}{skip}"


# --- out ---------------------------------------------------------------------------------------


def save_dictionary(
    sae: Dictionary,
    out: str | Path,
    *,
    format: str = own.NAME,
    model: str = "",
    site: Site | None = None,
    site_out: Site | None = None,
) -> None:
    """Write one SAE into a new directory, in our own format or another tool's.

        sr.save_dictionary(sae, "layer_5", format="saelens", model="google/gemma-3-270m", site=sr.Site(5))

    `model` and `site` say what the SAE reads, `site_out` what a transcoder reconstructs; they are written to the files,
    from which `load_dictionary` and the other tool read them. Raises FormatError if the format is unknown or cannot
    express the SAE, RunDirectoryError if `out` exists.
    """
    with new_directory(Path(out)) as directory:
        write_dictionary(directory, sae, Origin(model=model, site=site, site_out=site_out), format)


def export_run(
    source: str, out: Path, format: str, *, legs: Iterable[str] = (), licence: str = "", repo: str = ""
) -> list[ExportedSAE]:
    """Write a run's suite, or one SAE, into a new directory in a format, with a model card.

    Each SAE has a directory named after its place (layer_3, layer_3.mlp_out, layer_3.transcoder), or, for sparsify,
    after the module's path (layers.3). `legs` are the ids of the legs to export, instead of one per site. Raises
    FormatError for an SAE that the format cannot express, RunDirectoryError if `out` exists.
    """
    _check_repo(repo)
    if format == neuronpedia.NAME:
        raise FormatError(
            f"{neuronpedia.NAME} takes features, not SAEs, and none from the hub: "
            f"`saerelay export --format {neuronpedia.NAME}` writes them"
        )
    with new_directory(out) as directory:
        legs = list(legs)
        if RunDirectory(Path(source)).plan.is_file():
            suite = load(source)
            saes = _export_suite(suite, directory, format, legs)
            plan = suite.plan
        elif legs:
            raise FormatError(f"{source}: not a run, so that it has no legs to choose from; leave --leg out")
        else:
            saes = [_export_one(source, directory, format)]
            plan = None
        if format == circuit_tracer.NAME:
            circuit_tracer.check_set(directory)
        if format == saelens.NAME:
            write_text(directory / saelens.REGISTRY, _registry_entry(saes, out.name, repo))
        card = model_card(saes, format, licence=licence, repo=repo, plan=plan)
        write_text(directory / "README.md", card)
    return saes


def export_to_neuronpedia(
    source: str, out: Path, *, legs: Iterable[str] = (), repo: str = "", console: Console | None = None
) -> list[Path]:
    """Write the features and explanations of a run's suite into a new directory, as Neuronpedia's importer reads them.

    Each SAE has a folder, inside a folder named after the model; `out` names the release. Missing features are computed
    first, for which the language model is loaded. Raises FormatError for a single SAE, RunDirectoryError if `out`
    exists.
    """
    _check_repo(repo)
    if not RunDirectory(Path(source)).plan.is_file():
        raise FormatError(
            f"{source}: not a run; {neuronpedia.NAME} takes measurements of latents, and only a run holds them. "
            "Choose another --format for a single SAE"
        )
    with new_directory(out) as directory:
        suite = load(source)
        session = Session(suite, console=console)
        chosen = chosen_legs(suite, legs) or suite.one_per_site
        folders = export_features(session, directory, chosen, release=out.name, repo=repo)
        return [out / folder.relative_to(directory) for folder in folders]


def _check_repo(repo: str) -> None:
    """Raise FormatError if `repo` is not a name on the hub, since it is written into files that others read."""
    if repo and not looks_like_hub_id(repo):
        raise FormatError(f'"{repo}" is not a repository on the hub; write user/name')


def _registry_entry(saes: list[ExportedSAE], name: str, repo: str) -> str:
    """Return the entry for these SAEs in SAELens' own list of SAEs."""
    entries = []
    for sae in saes:
        explained = sae.metrics.get("explained_variance")
        entries.append(saelens.Listed(path=sae.folder, l0=sae.origin.l0, explained_variance=explained))
    release = repo.split("/")[-1] or name
    return saelens.registry_entry(release, repo or "USER/REPO", saes[0].origin.model, entries)


def push_run(
    source: str, repo: str, format: str, *, legs: Iterable[str] = (), licence: str = "", private: bool = False
) -> str:
    """Export a run or SAE, and upload it to the hub; returns the address of the commit.

    Raises the errors of `export_run`, and HubError if nobody is logged in or the hub refuses.
    """
    with TemporaryDirectory(prefix="saerelay-push-") as temporary:
        directory = Path(temporary) / "export"
        export_run(source, directory, format, legs=legs, licence=licence, repo=repo)
        return hub.upload(directory, repo, private=private)


def preview(source: str, repo: str, format: str, *, legs: Iterable[str], licence: str) -> str:
    """Return the text of a dry run of `push_run`: the files with their sizes, and the model card."""
    with TemporaryDirectory(prefix="saerelay-push-") as temporary:
        directory = Path(temporary) / "export"
        export_run(source, directory, format, legs=legs, licence=licence, repo=repo)
        lines = []
        total = 0
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                size = path.stat().st_size
                total += size
                lines.append(f"{size:>15,}  {path.relative_to(directory)}")
        lines.append(f"{total:>15,}  bytes would be uploaded to {repo}")
        card = (directory / "README.md").read_text(encoding="utf-8")
        return "\n".join([*lines, "", card])


def _export_one(source: str, directory: Path, format: str) -> ExportedSAE:
    """Write one SAE, about which nothing is known except what its own files say."""
    dictionary, origin = load_dictionary(source)
    origin = replace(
        origin,
        model=public_name(origin.model) if origin.model else "",
        dataset=hub_id(origin.dataset),
        provenance=without_paths(origin.provenance),
    )
    folder = "sae"
    if origin.site and origin.kind:
        folder = _folder(origin.kind, origin.site.layer, origin.module_path, format, has_prefix=True)
    write_dictionary(_place(directory, folder, format), dictionary, origin, format)
    return ExportedSAE(folder, describe(dictionary), origin, leg=None, metrics={})


def _export_suite(suite: Suite, directory: Path, format: str, ids: list[str]) -> list[ExportedSAE]:
    """Write the chosen legs of a run, or its suite."""
    legs = chosen_legs(suite, ids) or _of_format(suite.one_per_site, format)
    if not legs:
        raise suite.directory.unfinished("no SAE is finished yet")
    paths = module_paths(suite.plan.recipe.model, [leg.site for leg in legs])
    folders = _folders(legs, paths, format, has_prefix=suite.plan.facts.has_lm_head)
    saes = []
    for leg, folder in zip(legs, folders, strict=True):
        dictionary, origin = own.read(suite.directory.leg(leg.id))
        metrics = _metrics(suite, leg)
        origin = _published_origin(origin, suite.plan, metrics, module_path=paths.get(leg.site, ""))
        write_dictionary(_place(directory, folder, format), dictionary, origin, format)
        tokens_before = suite.tokens_before(leg)
        saes.append(ExportedSAE(folder, describe(dictionary), origin, leg, metrics, tokens_before))
    return saes


def chosen_legs(suite: Suite, ids: Iterable[str]) -> list[Leg]:
    """Return the legs of a run that are named, each once."""
    return list({leg.id: leg for leg in map(suite.leg, ids)}.values())


def _of_format(legs: list[Leg], format: str) -> list[Leg]:
    """Return the legs that a format takes of a suite with both SAEs and transcoders; all legs of any other suite."""
    transcoders = [leg for leg in legs if leg.is_transcoder]
    saes = [leg for leg in legs if not leg.is_transcoder]
    if format == circuit_tracer.NAME:
        return transcoders or legs
    return legs if takes_transcoders(format) else saes or legs


def _metrics(suite: Suite, leg: Leg) -> dict[str, Any]:
    """Return the numbers of a leg's evaluation, without curves; {} if it was not evaluated."""
    evaluation = Evaluation.load_if_any(suite.directory.evaluation(leg.id))
    if evaluation is None:
        return {}
    metrics = evaluation.metrics.model_dump(mode="json")
    return {name: value for name, value in metrics.items() if not isinstance(value, list | dict)}


def _published_origin(origin: Origin, plan: Plan, metrics: dict[str, Any], *, module_path: str) -> Origin:
    """Return the origin that is published with a leg's dictionary: all that is known, without local paths."""
    provenance = {**without_paths(origin.provenance), "evaluation": metrics}
    if plan.facts.adapter:
        provenance["adapter"] = public_adapter(plan.facts.adapter)
    return replace(
        origin,
        model=public_name(plan.recipe.model.name),
        module_path=module_path,
        context=plan.recipe.data.context,
        prepend_bos=plan.recipe.data.prepend_bos,
        dataset=hub_id(plan.recipe.data.hub.dataset),
        l0=metrics.get("l0", origin.l0),
        provenance=provenance,
    )


def _folders(legs: list[Leg], paths: dict[Site, str], format: str, *, has_prefix: bool) -> list[str]:
    """Return the folder of each leg, with its id where several legs are at one place.

    Raises FormatError if a format that has one file per layer would have to hold two SAEs in it.
    """
    folders = [_folder(leg.kind, leg.layer, paths.get(leg.site, ""), format, has_prefix=has_prefix) for leg in legs]
    repeated = [leg.id for leg, folder in zip(legs, folders, strict=True) if folders.count(folder) > 1]
    if repeated and format == circuit_tracer.NAME:
        raise FormatError(
            f"a set of {circuit_tracer.NAME} holds one transcoder for each layer, but {', '.join(repeated)} are of the "
            "same layer; export each into a directory of its own, choosing legs with --leg"
        )
    return [f"{folder}-{leg.id}" if leg.id in repeated else folder for leg, folder in zip(legs, folders, strict=True)]


def _folder(kind: SiteKind, layer: int, path: str, format: str, *, has_prefix: bool) -> str:
    """Return the folder of an SAE: layer_3, layer_3.mlp_out; for sparsify the module's path: layers.3, layers.3.mlp.

    `has_prefix`: the module's path begins with the name of the base model ("gpt_neox.layers.3").
    """
    if format == circuit_tracer.NAME:
        return f"layer_{layer}.safetensors"
    if kind.module_out or format != "sparsify":
        return f"layer_{kind.leg_name(layer).removeprefix('L')}"

    if has_prefix:
        path = path.partition(".")[2]
    if not path and kind.module == "resid_post":
        path = f"layers.{layer}"
    is_output = re.fullmatch(r"\w+(\.\w+)*", path) and not path.endswith(".input")
    if not is_output:
        raise FormatError(
            f"{kind.leg_name(layer)}: sparsify names SAEs after the path of the module whose output they read, "
            f'and "{path}" is not one. Choose another --format'
        )
    return path


def _place(directory: Path, folder: str, format: str) -> Path:
    """Return where an SAE is written: a folder of its own, or, for circuit-tracer, the directory of the set."""
    return directory if format == circuit_tracer.NAME else directory / folder


# --- from the hub ------------------------------------------------------------------------------


def pull(reference: str, out: Path) -> list[Path]:
    """Download the SAEs of a repository or folder into a new directory; returns their paths.

    Every SAE is read once. Raises FormatError if one cannot be read, or if there is a pickle that belongs to no SAE;
    HubError if the hub does not have the repository or refuses. No code is downloaded, and an interruption leaves
    nothing behind.
    """
    remote = reference if hub.is_remote(reference) else f"hf://{reference}"
    with new_directory(out) as directory:
        # A fresh name, because within a process huggingface_hub remembers what it has put into a directory.
        downloaded = hub.download(remote, directory.with_name(uuid.uuid4().hex))
        saes = find_saes(downloaded)
        for path in downloaded.rglob("*.pt"):
            if path not in saes and path.parent not in saes:
                name = path.relative_to(downloaded)
                raise FormatError(f"{reference}: {name} is a pickle of an unknown format; nothing was kept")
        if not saes:
            raise FormatError(f"{reference}: no SAE found; nothing was kept")
        for sae in saes:
            read_any(sae)
        downloaded.replace(directory)
    return [out / sae.relative_to(downloaded) for sae in saes]


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Make a directory that becomes `out` at the end; if anything fails, nothing is left.

    Raises RunDirectoryError if `out` exists or cannot be made.
    """
    temporary = out.parent / f".{out.name}.partial"  # "." and "/" have no name, but they exist
    if out.exists():
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed at the very end
        raise RunDirectoryError(f"{out} exists; choose another place")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_directory(temporary)  # left by a process that was killed
        temporary.mkdir()
    except OSError as error:
        raise RunDirectoryError(f"{out}: cannot be created ({reason(error)}), or choose another place") from None
    try:
        directory = temporary / "new"
        directory.mkdir()
        yield directory
        directory.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
