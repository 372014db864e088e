"""The command line: each command parses its options, calls one workflow or analysis, and prints the result.

There is one module per group of commands; `options` holds what they share. Heavy imports stand inside the commands, so
that `saerelay --help` does not wait for torch.
"""

import atexit
import gc
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from saerelay import __version__
from saerelay.cli import judging, measuring, sharing, training
from saerelay.cli.options import progress
from saerelay.errors import Interrupted, LegFailed, SaeRelayError, printable
from saerelay.files import reason
from saerelay.rank import in_team, n_ranks, rank

HELP = "Sparse autoencoders for every layer of a language model: train one, relay it to the others."
EPILOG = (
    "Terms: a leg is the training of one SAE, and also the SAE that results. A hop transfers an SAE to another layer: "
    "it fits a map between the two layers, folds the map into the SAE's weights, and fine-tunes. A root is a leg "
    "trained from scratch from which others are transferred. A suite is the set of all SAEs of a run. Begin with: "
    "saerelay demo"
)

app = typer.Typer(
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for module in (training, measuring, judging, sharing):
    module.add_commands(app)


class Starting(TyperCommand):
    """A command that needs torch, and shows that it is starting during the seconds that the import takes."""

    def invoke(self, ctx: Any) -> Any:
        """Import torch once the options are known to be valid."""
        with progress().status("starting"):
            import torch  # noqa: F401
        return super().invoke(ctx)


for command in app.registered_commands:
    if command.callback is not training.init:
        command.cls = Starting

TEAM_COMMANDS = ("train", "eval", "matrix")
"""The commands that several processes can run together."""


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if n_ranks() > 1 and context.invoked_subcommand not in TEAM_COMMANDS:
        raise SaeRelayError(
            f"saerelay {context.invoked_subcommand} runs in one process; start it without torchrun "
            f"(which is for {', '.join(TEAM_COMMANDS)})"
        )
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; a user error becomes one message and an exit code, never a traceback."""
    _show_anything()
    _show_warnings_as_notes()
    atexit.register(gc.freeze)  # Python looks for garbage when it ends, half a second among a million objects
    try:
        app()
    except SaeRelayError as error:
        _leave(str(error), error.exit_code, said_by_all=isinstance(error, LegFailed))
    except Interrupted as command:
        _leave_stopped(str(command))
    except SystemExit as leaving:
        _leave_team(leaving.code)
        if leaving.code == 130:  # typer's exit code for Ctrl-C
            print("stopped.", file=sys.stderr)
        raise
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        _leave(f"{reason(error)}. All files written so far are intact", 2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        detail = " ".join(str(error).split())[:200] or "MemoryError"
        _leave(f"not enough memory ({detail}); free some, or ask for fewer latents, layers or tokens", 2)


def _leave_stopped(command: str) -> NoReturn:
    if rank() == 0:  # all ranks stop at the same place, and only the first one says so
        print(f"stopped; the state is saved. This continues: {command}", file=sys.stderr)
    sys.exit(130)


def _leave_team(code: str | int | None) -> None:
    if in_team() and not code:
        from saerelay.team import Team

        Team.joined().leave()


def _show_anything() -> None:
    """Print characters that the terminal cannot encode as escapes, instead of failing on them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _show_warnings_as_notes() -> None:
    """Print warnings of this package as one line, without the line of code that they come from."""
    show_as_usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *others: Any) -> None:
        if Path(filename).is_relative_to(Path(__file__).parents[1]):
            print(f"note: {printable(str(message))}", file=sys.stderr)
        else:
            show_as_usual(message, category, filename, *others)

    warnings.showwarning = show


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; if it was the machine's main memory, torch raises a plain RuntimeError."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _leave(message: str, code: int, *, said_by_all: bool = False) -> NoReturn:
    if said_by_all and rank():
        sys.exit(code)
    who = f"saerelay (rank {rank()})" if n_ranks() > 1 else "saerelay"
    print(f"{who}: {printable(message)}", file=sys.stderr)
    sys.exit(code)
