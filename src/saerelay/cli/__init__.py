"""The command line: each command parses its options, calls one workflow or analysis, and prints.

One module per group of commands; `options` holds what they share. Heavy imports stand inside the commands, so that
`saerelay --help` does not wait for torch.
"""

import sys
from io import TextIOWrapper
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
    "Words: a leg is the training of one SAE, and by extension that SAE. A hop transfers an SAE to another layer: fit "
    "a map, fold it into the weights, fine-tune. A root is a leg trained from scratch, from which others are "
    "transferred. A suite is all SAEs of a run. Begin with: saerelay demo"
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
    """A command that needs torch, whose import takes seconds, which are better seen to pass."""

    def invoke(self, ctx: Any) -> Any:
        """Import it once the options are known to be right."""
        with progress().status("starting"):
            import torch  # noqa: F401
        return super().invoke(ctx)


for command in app.registered_commands:
    if command.callback is not training.init:
        command.cls = Starting

TEAM_COMMANDS = ("train", "eval", "matrix")
"""What several processes do together."""


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if n_ranks() > 1 and context.invoked_subcommand not in TEAM_COMMANDS:
        raise SaeRelayError(
            f"saerelay {context.invoked_subcommand} is the work of one process; start it without torchrun "
            f"(which is for {', '.join(TEAM_COMMANDS)})"
        )
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: user errors are one message and an exit code, never a traceback."""
    _show_anything()
    try:
        app()
    except SaeRelayError as error:
        _leave(str(error), error.exit_code, said_by_all=isinstance(error, LegFailed))
    except Interrupted as command:
        _leave_stopped(str(command))
    except SystemExit as leaving:
        _leave_team(leaving.code)
        if leaving.code == 130:  # what typer makes of Ctrl-C
            print("stopped.", file=sys.stderr)
        raise
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        _leave(f"{reason(error)}. What was written so far is whole", 2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        detail = " ".join(str(error).split())[:200] or "MemoryError"
        _leave(f"not enough memory ({detail}); free some, or ask for fewer latents, layers or tokens", 2)


def _leave_stopped(command: str) -> NoReturn:
    if rank() == 0:  # of several ranks, which stop at the same place, one says so
        print(f"stopped; the state is saved. This continues: {command}", file=sys.stderr)
    sys.exit(130)


def _leave_team(code: str | int | None) -> None:
    if in_team() and not code:
        from saerelay.team import Team

        Team.joined().leave()


def _show_anything() -> None:
    """Let a name that the terminal has no characters for be no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory was lacking; for the machine's own, torch has no error but RuntimeError."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _leave(message: str, code: int, *, said_by_all: bool = False) -> NoReturn:
    if said_by_all and rank():
        sys.exit(code)
    who = f"saerelay (rank {rank()})" if n_ranks() > 1 else "saerelay"
    print(f"{who}: {printable(message)}", file=sys.stderr)
    sys.exit(code)
