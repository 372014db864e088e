"""The command line: parse, call one function, print."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from saerelay import __version__
from saerelay.errors import Interrupted, RecipeError, SaeRelayError
from saerelay.files import write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from saerelay.planning.recipe import Run
    from saerelay.site import Site

app = typer.Typer(
    help="Sparse autoencoders for every layer of a language model: train one, relay it to the others.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
Recipe = Annotated[Path, typer.Argument(help="a recipe; `saerelay init > run.toml` writes one")]
Out = Annotated[Path, typer.Option("--out", help="a new directory for the run")]
NewDirectory = Annotated[Path, typer.Option("--out", help="a new directory")]
Legs = Annotated[list[str], typer.Option("--leg", help="a leg's id, or several, instead of one SAE a layer")]
Licence = Annotated[str, typer.Option(help="the licence the card states, by its name on the hub: apache-2.0")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document to stdout")]


@app.command()
def init() -> None:
    """Print an annotated recipe with the defaults."""
    from saerelay.planning.recipe import Run, annotated_toml

    print(annotated_toml(Run()), end="")


@app.command()
def plan(
    recipe: Recipe,
    as_json: Json = False,
    timing: Annotated[bool, typer.Option(help="load the model and time a few steps")] = True,
    write: Annotated[Path | None, typer.Option(help="preset auto: a new recipe with the legs written out")] = None,
) -> None:
    """Show what would be trained, from whom, and what it would take; with preset auto, after a survey."""
    from saerelay.lm.model import LanguageModel
    from saerelay.planning.cost import plan_cost
    from saerelay.planning.recipe import Run
    from saerelay.views.tables import plan_facts, plan_table
    from saerelay.workflows.launch import plan_run, time_plan

    run = Run.from_toml(recipe)
    if run.plan.surveyed:
        plan_auto(run, as_json, write)
        return
    if write:
        raise RecipeError(f'{recipe}: --write is for preset = "auto"; this recipe needs no survey')
    compiled = plan_run(run)
    cost = plan_cost(compiled)
    seconds = time_plan(compiled, LanguageModel.load(compiled.run.model)) if timing else None
    if as_json:
        print(json.dumps({"plan": compiled.to_data(), "cost": cost.model_dump(), "seconds": seconds}))
        return
    console = Console()
    console.print(plan_table(compiled))
    console.print()
    console.print(plan_facts(compiled, cost, seconds))


def plan_auto(run: "Run", as_json: bool, write: Path | None) -> None:
    """Survey, and show or write what was chosen."""
    from saerelay.planning.choose import written_out
    from saerelay.planning.recipe import annotated_toml
    from saerelay.views.tables import choice_lines, plan_facts, plan_table, survey_table
    from saerelay.workflows.launch import plan_run, survey_once

    if write and write.exists():
        raise RecipeError(f"{write} exists; choose another --write")
    survey, choice = survey_once(run, Console(stderr=True))
    explicit = written_out(run, survey, choice)
    if write:
        write_text(write, annotated_toml(explicit))
    compiled, seconds = plan_run(explicit), choice.time()
    if as_json:
        parts = {"plan": compiled.to_data(), "cost": choice.cost.model_dump(), "seconds": seconds}
        parts |= {
            "survey": {key: value for key, value in survey.to_data().items() if key != "asked"},
            "fvu_ratio": choice.ratio,
        }
        print(json.dumps(parts | {"fvu_from_scratch": choice.reference}))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    for shown in (survey_table(survey), plan_table(compiled, choice.reference), *choice_lines(survey, choice)):
        console.print(shown)
    console.print(plan_facts(compiled, choice.cost, seconds))


@app.command()
def train(
    recipe: Recipe,
    out: Out,
    resume: Annotated[bool, typer.Option("--resume", help="continue after an interruption")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="add legs or tokens to a finished run")] = False,
) -> None:
    """Train every leg of a recipe."""
    from saerelay.planning.recipe import Run
    from saerelay.workflows.launch import train_run

    suite = train_run(Run.from_toml(recipe), out, resume=resume, extend=extend, console=Console(stderr=True))
    print(f"{len(suite)} SAEs in {out}/legs. Their quality: saerelay eval {out}")


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    as_json: Json = False,
    tokens: Annotated[str, typer.Option(help="held-out tokens, instead of the recipe's")] = "",
    matrix: Annotated[bool, typer.Option("--matrix", help="every SAE on every layer, instead")] = False,
    methods: Annotated[str, typer.Option(help="with --matrix: the closed-form hops to try")] = "identity,affine",
    snapshots: Annotated[bool, typer.Option("--snapshots", help="with --matrix: snapshots of the legs, too")] = False,
    measures: Annotated[bool, typer.Option("--measures", help="what SAEs have in common, instead")] = False,
    prompts: Annotated[Path | None, typer.Option(help="with --measures: a file of prompts, one JSON a line")] = None,
) -> None:
    """Measure the quality of every leg on held-out documents; or --matrix or --measures of the whole suite."""
    from saerelay.analysis.evaluate import evaluate_run
    from saerelay.analysis.matrix import matrix_run
    from saerelay.analysis.measures import measures_run
    from saerelay.analysis.suite import load
    from saerelay.planning.recipe import EvaluateSpec
    from saerelay.runs.directory import RunDirectory
    from saerelay.views.tables import matrix_tables, measures_tables

    asked = EvaluateSpec.parse({"tokens": tokens}, source="--tokens").tokens if tokens else 0
    progress = Console(stderr=True)
    if matrix or measures:
        if matrix:
            names = [name.strip() for name in methods.split(",")]
            document = matrix_run(load(run), methods=names, tokens=asked, snapshots=snapshots, console=progress)
        else:
            document = measures_run(load(run), prompts=prompts, tokens=asked, console=progress)
        if as_json:
            print(json.dumps(document))
            return
        print_all(matrix_tables(document) if matrix else measures_tables(document))
        return
    summary = evaluate_run(load(run), None, tokens=asked, console=progress)
    write_json(RunDirectory(run).root / "summary.json", summary)
    if as_json:
        print((RunDirectory(run).root / "summary.json").read_text(encoding="utf-8"), end="")
    else:
        show(summary)


@app.command()
def circuits(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    task: Annotated[str, typer.Option(help="ioi, greater-than, sva, brackets, quotes, self; or a file, PROMPTS.jsonl")],
    k: Annotated[str, typer.Option(help="latents in a circuit")] = "4,36,68,100",
    leg: Annotated[list[str], typer.Option(help="a leg's id or a layer, or several; else the suite and controls")] = [],  # noqa: B006
    prompts: Annotated[int, typer.Option(help="half to find the circuits on, half to judge them")] = 500,
    method: Annotated[str, typer.Option(help="attribution or integrated-gradients")] = "attribution",
    seed: Annotated[int, typer.Option(help="of the prompts drawn")] = 0,
    as_json: Json = False,
) -> None:
    """Find the latents that a task rests on (Marks et al. 2024), and how faithful and complete such circuits are."""
    from saerelay.analysis.circuits import circuits_run
    from saerelay.analysis.suite import load
    from saerelay.views.tables import circuit_tables

    sizes = [int(size) for size in k.split(",") if size.strip().isdecimal()]
    if len(sizes) != len(k.split(",")):
        raise RecipeError(f'--k "{k}": expected numbers of latents with commas between, such as 4,36')
    document = circuits_run(
        load(run), task, k=sizes, legs=leg, n_prompts=prompts, method=method, seed=seed, console=Console(stderr=True)
    )
    if as_json:
        print(json.dumps(document))
        return
    print_all(circuit_tables(document))


@app.command(name="show")
def show_latent(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    leg: Annotated[str, typer.Argument(help="a leg's id, or a layer")],
    latent: Annotated[int, typer.Argument(help="a latent's number")],
    as_json: Json = False,
) -> None:
    """Show one latent: where it fires, the tokens it promotes, and what became of it from layer to layer.

    The first time, features and lineage of the whole run are computed.
    """
    from saerelay.analysis.lineage import describe_latent
    from saerelay.analysis.suite import load
    from saerelay.views.tables import latent_view

    document = describe_latent(load(run), leg, latent, console=Console(stderr=True))
    if as_json:
        print(json.dumps(document))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(latent_view(document, colour=console.is_terminal and not console.no_color))


@app.command()
def interpret(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    model: Annotated[str, typer.Option("--model", help="the name of the model to ask, at the endpoint")],
    endpoint: Annotated[str, typer.Option(help="http(s)://host/v1; else SAERELAY_ENDPOINT or OPENAI_BASE_URL")] = "",
    key_env: Annotated[
        str, typer.Option(help="variable that holds the key; else SAERELAY_API_KEY or OPENAI_API_KEY")
    ] = "",
    body: Annotated[str, typer.Option(help="JSON: fields of each request, such as temperature; null drops one")] = "",
    legs: Annotated[str, typer.Option(help="ids or layers, with commas; else all")] = "",
    n: Annotated[int, typer.Option("--n", min=1, help="latents of each leg")] = 64,
    latents: Annotated[str, typer.Option(help="these latents, with commas, instead")] = "",
    seed: Annotated[int, typer.Option(help="which latents, and which texts")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="requests at a time")] = 8,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="estimate, and show a prompt of each kind; send nothing")
    ] = False,
    price_in: Annotated[float, typer.Option(min=0, help="USD for a million tokens of input")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="USD for a million tokens of output")] = 0.0,
    max_cost: Annotated[float | None, typer.Option(min=0, help="USD; needs the prices")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask before the first request")] = False,
    as_json: Json = False,
) -> None:
    """Have a language model explain latents, and score its explanations: detection and fuzzing, as in Delphi.

    The cost is estimated first. Every answer is kept: the same command again asks only for what is missing.
    """
    from shlex import join

    from saerelay.analysis.endpoint import Asker, Endpoint
    from saerelay.analysis.interpret import estimate, example_prompts, interpret_run, prepare
    from saerelay.analysis.suite import load
    from saerelay.errors import EndpointError
    from saerelay.views.tables import estimate_text, interpret_tables, prompts_text

    if max_cost is not None and not (price_in or price_out):
        raise EndpointError("--max-cost needs --price-in and --price-out, in USD for a million tokens")
    asked, suite, progress = Endpoint.of(model, endpoint, key_env, body), load(run), Console(stderr=True)
    try:
        numbers = [int(part) for part in latents.split(",") if part]
    except ValueError:
        raise typer.BadParameter("numbers with commas between them, like 1,2,3", param_hint="--latents") from None
    names = [name.strip() for name in legs.split(",") if name.strip()]
    study = prepare(suite, legs=names, n=n, latents=numbers, seed=seed, console=progress)
    limit = float("inf") if max_cost is None else max_cost
    with Asker(
        asked, suite.directory.answers, concurrency=concurrency, prices=(price_in, price_out), max_cost=limit
    ) as asker:
        expected = estimate(study, asker)
        if dry_run:
            prompts = example_prompts(study, asked)
            if as_json:
                print(json.dumps({"estimate": expected._asdict(), "prompts": prompts}))
            else:
                Console(soft_wrap=True).print(
                    estimate_text(expected, asked, (price_in, price_out)), prompts_text(prompts)
                )
            return
        progress.print(estimate_text(expected, asked, (price_in, price_out)))
        if expected.cost > limit:
            raise EndpointError(
                f"this may cost ${expected.cost:.2f}, more than --max-cost {limit:g}; lower --n, or raise it"
            )
        if expected.n_requests and not yes:
            if not sys.stdin.isatty():
                raise EndpointError("nothing is sent without --yes, where nobody can be asked")
            typer.confirm(f"Send {expected.n_requests} requests?", abort=True, err=True)
        document = interpret_run(study, asker, again=join(["saerelay", *sys.argv[1:]]), console=progress)
    if as_json:
        print(json.dumps(document))
        return
    print_all(interpret_tables(document))


@app.command()
def hop(
    source: Annotated[str, typer.Option("--from", help="a trained SAE of any format: a path, or hf://user/repo/path")],
    to_layer: Annotated[int, typer.Option("--to-layer", help="the layer to carry it to")],
    recipe: Annotated[Path, typer.Option("--recipe", help="model, data, method, refit and rates are taken from here")],
    out: Out,
    tokens: Annotated[str, typer.Option(help="tokens to train on after the fold; 0 for none; else the recipe's")] = "",
    method: Annotated[str, typer.Option(help="identity, rescale, procrustes or affine; else the recipe's")] = "",
    refit: Annotated[bool | None, typer.Option(help="the decoder in closed form, or not; else as the recipe")] = None,
    architecture: Annotated[str, typer.Option(help="topk, batchtopk, jumprelu or relu, if not its own")] = "",
    n_latents: Annotated[str, typer.Option(help="grow or prune it to so many")] = "",
    k: Annotated[int | None, typer.Option(help="so many active latents per token, if not its own number")] = None,
    from_model: Annotated[str, typer.Option(help="the model it was trained on, if another: maps between the two")] = "",
    from_layer: Annotated[int | None, typer.Option(help="the layer it reads, if its files do not say")] = None,
    from_module: Annotated[str, typer.Option(help="with --from-layer: resid_post, mlp_out, ...")] = "resid_post",
    format: Annotated[str, typer.Option(help="saelens, sparsify, ..., if it is not found out")] = "",
) -> None:
    """Transfer one trained SAE, of any format, to a layer of a model, with or without fine-tuning.

    To another layer, the same layer of a fine-tuned model, another text, number of latents, sparsity or architecture.
    Onto its own layer with --tokens 0 --no-refit it is only measured.
    """
    from saerelay.planning.recipe import Run
    from saerelay.workflows.hop import hop_run

    asked = {"tokens": tokens, "method": method, "architecture": architecture, "n_latents": n_latents}
    given = {key: value for key, value in asked.items() if value}
    given |= {key: value for key, value in {"refit": refit, "k": k}.items() if value is not None}
    site = site_asked(from_layer, from_module)
    run, console = Run.from_toml(recipe), Console(stderr=True)
    suite = hop_run(source, to_layer, run, out, site=site, model=from_model, format=format, console=console, **given)
    print(f"{', '.join(suite)} in {out}/legs. Its quality: saerelay eval {out}")


@app.command(name="import")
def import_sae(
    reference: Annotated[str, typer.Argument(help="a trained SAE of any format: a path, or hf://user/repo/path")],
    out: NewDirectory,
    format: Annotated[str, typer.Option(help="saelens, sparsify, ..., if it is not found out")] = "",
    layer: Annotated[int | None, typer.Option(help="the layer it reads, if its files do not say")] = None,
    module: Annotated[str, typer.Option(help="with --layer: resid_post, mlp_out, ...")] = "resid_post",
    model: Annotated[str, typer.Option(help="the model it reads, if its files do not say")] = "",
) -> None:
    """Rewrite a trained SAE of any format in canonical form: one that acts on raw activations."""
    from saerelay.workflows.share import describe, import_dictionary

    site = site_asked(layer, module)
    dictionary, origin = import_dictionary(reference, out, format=format, model=model, site=site)
    print(f"{out}: {describe(dictionary)}; reads {origin.site} of {origin.model or 'a model not named'}")


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="a run directory, or one trained SAE of any format")],
    format: Annotated[str, typer.Option("--format", help="saelens, sparsify, dictionary_learning or saerelay")],
    out: NewDirectory,
    leg: Legs = [],  # noqa: B006
    licence: Licence = "",
) -> None:
    """Write a run's SAEs in another tool's format, one directory a layer, with a model card."""
    from saerelay.workflows.share import export_run

    for one in export_run(source, out, format, legs=leg, licence=licence):
        print(f"{out / one.folder}: {one.kind}")


@app.command()
def push(
    source: Annotated[str, typer.Argument(help="a run directory, or one trained SAE of any format")],
    repo: Annotated[str, typer.Argument(help="a repository on the Hugging Face hub: user/name; made if missing")],
    format: Annotated[str, typer.Option(help="saelens, sparsify, dictionary_learning or saerelay")] = "saelens",
    leg: Legs = [],  # noqa: B006
    licence: Licence = "",
    private: Annotated[bool, typer.Option("--private", help="a new repository is private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be uploaded, and upload nothing")] = False,
) -> None:
    """Upload a run's SAEs, with a model card, to the Hugging Face hub, as whom `hf auth login` says."""
    from saerelay.workflows.share import preview, push_run

    if dry_run:
        print(preview(source, repo, format, legs=leg, licence=licence))
    else:
        print(push_run(source, repo, format, legs=leg, licence=licence, private=private))


@app.command()
def pull(
    reference: Annotated[str, typer.Argument(help="hf://user/repo[@revision][/folder]")],
    out: NewDirectory,
) -> None:
    """Download a repository of SAEs, or a folder of it, and check that each can be read."""
    from saerelay.workflows.share import pull as pull_all

    found = pull_all(reference, out)
    print("\n".join(map(str, found)))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    quick: Annotated[bool, typer.Option("--quick", help="without matrix and measures, unless they are there")] = False,
    show_it: Annotated[bool, typer.Option("--open", help="open it in a browser")] = False,
) -> None:
    """Make one page that shows all of a run, and first the measurements it still needs."""
    import webbrowser

    from saerelay.analysis.suite import load
    from saerelay.views.report import report_run

    page = report_run(load(run), quick=quick, console=Console(stderr=True))
    size = sum(path.stat().st_size for path in page.parent.rglob("*") if path.is_file())
    print(f"{page} ({size / 1e6:.1f} MB)")
    if show_it:
        webbrowser.open(page.resolve().as_uri())


@app.command()
def judge(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    files: Annotated[list[Path] | None, typer.Argument(help="with --score: what judges exported")] = None,
    layers: Annotated[str, typer.Option(help='of which layers: "1,2", or all')] = "all",
    n: Annotated[int, typer.Option("--n", min=1, help="latents of each layer and origin")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="another seed draws other latents")] = 0,
    out: Annotated[Path | None, typer.Option(help="a file or a directory for the page; else in the run")] = None,
    score: Annotated[bool, typer.Option("--score", help="the table of what judges said, instead")] = False,
    as_json: Json = False,
) -> None:
    """Make a page on which people judge latents blind, from scratch or transferred; or --score what they said."""
    from saerelay.analysis.suite import load
    from saerelay.views.judge import judge_run
    from saerelay.views.judge.score import score_run
    from saerelay.views.tables import drawn_lines, judging_tables

    suite, console = load(run), Console(width=None if sys.stdout.isatty() else 120)
    if score:
        scores = score_run(suite, files or [])
        if as_json:
            print((suite.directory.judging / "scores.json").read_text(encoding="utf-8"), end="")
            return
        for shown in judging_tables(scores):
            console.print(shown)
        return
    if files:
        raise RecipeError(f"{files[0]}: to score what judges exported, give --score")
    if layers != "all" and not all(part.strip().isdecimal() for part in layers.split(",")):
        raise RecipeError(f'--layers: "{layers}" names no layers; write "1,2,3", or all')
    chosen = None if layers == "all" else sorted({int(part) for part in layers.split(",")})
    page, key = judge_run(suite, layers=chosen, n=n, seed=seed, out=out, console=Console(stderr=True))
    if as_json:
        print(json.dumps({"path": str(page)} | key))
        return
    for line in drawn_lines(key):
        print(line)
    print(f"\n{page} is all a judge needs. Not for judges: {suite.directory.judging / key['page']}.json, its key.")
    print(f"What they export gives the table: saerelay judge {run} --score FILE...")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="replaced if it holds an earlier demo")] = Path("runs/demo"),
) -> None:
    """Train, transfer and evaluate SAEs for all layers of the built-in model; needs no network."""
    from saerelay.workflows.demo import run_demo

    show(run_demo(out, Console(stderr=True)))
    print(f"\n{out}/report/index.html shows all of it, in a browser. {out}/legs/ has the SAEs.")


def site_asked(layer: int | None, module: str) -> "Site | None":
    """The site that two options name, or none."""
    from saerelay.site import Site

    return None if layer is None else Site.parse(f"L{layer}.{module}")


def print_all(shown: "Iterable[RenderableType]") -> None:
    """Print tables and texts to stdout, 120 wide where nobody looks."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for one in shown:
        console.print(one)


def show(summary: dict[str, Any]) -> None:
    """Print a suite's quality and cost."""
    from saerelay.views.tables import cost_lines, quality_table

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(quality_table(summary))
    console.print()
    for line in cost_lines(summary):
        console.print(line)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: user errors are one message and an exit code, never a traceback."""
    try:
        app()
    except SaeRelayError as error:
        print(f"saerelay: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as command:
        print(f"stopped; the state is saved. This continues: {command}", file=sys.stderr)
        sys.exit(130)
    except SystemExit as leaving:
        if leaving.code == 130:  # what typer makes of Ctrl-C
            print("stopped.", file=sys.stderr)
        raise
    except BrokenPipeError:
        sys.exit(141)
