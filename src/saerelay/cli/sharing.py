"""Commands that move SAEs in and out: import, export, push, pull."""

from typing import Annotated

import typer

from saerelay.cli.options import (
    AnySae,
    InputFormat,
    Licence,
    OneLegPerLayer,
    OutDir,
    Source,
    progress,
    say,
    site_of,
    split_list,
)


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to the program."""
    panel = "Share"
    app.command(name="import", rich_help_panel=panel)(import_sae)
    for command in (export, push, pull):
        app.command(rich_help_panel=panel)(command)


def import_sae(
    reference: AnySae,
    out: OutDir,
    format: InputFormat = "",
    layer: Annotated[int | None, typer.Option(help="Layer the SAE reads, if its files do not say.")] = None,
    module: Annotated[str, typer.Option(help="With --layer: the kind of module, such as mlp_out.")] = "resid_post",
    model: Annotated[str, typer.Option(help="Language model the SAE reads, if its files do not say.")] = "",
) -> None:
    """Convert a trained SAE in any format to this program's format, in which it acts on raw activations."""
    from saerelay.workflows.share import describe, import_dictionary

    site = site_of(layer, module)
    dictionary, origin = import_dictionary(reference, out, format=format, model=model, site=site)
    say(f"{out}: {describe(dictionary)}; reads {origin.site} of {origin.model or 'an unnamed model'}")


def export(
    source: Source,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="saelens, sparsify, dictionary_learning, circuit-tracer or saerelay; or neuronpedia, for the examples "
            "and explanations of latents.",
        ),
    ],
    out: OutDir,
    leg: OneLegPerLayer = [],  # noqa: B006
    licence: Licence = "",
    repo: Annotated[str, typer.Option(help="Hub repository that holds the SAEs, or will: user/name.")] = "",
) -> None:
    """Write a run's SAEs in another tool's format, one directory per layer, with a model card."""
    from saerelay.workflows.share import export_run, export_to_neuronpedia

    if format == "neuronpedia":
        for folder in export_to_neuronpedia(source, out, legs=split_list(leg), repo=repo, console=progress()):
            say(str(folder))
        return
    for written in export_run(source, out, format, legs=split_list(leg), licence=licence, repo=repo):
        say(f"{out / written.folder}: {written.description}")


def push(
    source: Source,
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub, user/name; created if missing.")],
    format: Annotated[
        str, typer.Option(help="saelens, sparsify, dictionary_learning, circuit-tracer or saerelay.")
    ] = "saelens",
    leg: OneLegPerLayer = [],  # noqa: B006
    licence: Licence = "",
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded; upload nothing.")] = False,
) -> None:
    """Upload a run's SAEs with a model card to the Hugging Face hub, using your `hf auth login` account."""
    from saerelay.workflows.share import preview, push_run

    legs = split_list(leg)
    if dry_run:
        say(preview(source, repo, format, legs=legs, licence=licence))
    else:
        say(push_run(source, repo, format, legs=legs, licence=licence, private=private))


def pull(
    reference: Annotated[
        str, typer.Argument(help="hf://user/repo, hf://user/repo/folder, or hf://user/repo@revision/folder.")
    ],
    out: OutDir,
) -> None:
    """Download a repository of SAEs, or one folder of it, and check that each SAE can be read."""
    from saerelay.workflows.share import pull as download

    for path in download(reference, out):
        say(str(path))
