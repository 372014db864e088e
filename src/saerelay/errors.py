"""Every error that `saerelay` raises on purpose.

    SaeRelayError                 what a user can cause; the CLI prints its text, no traceback, and exits with 2
    ├── RecipeError               run.toml: unknown key, wrong value, impossible combination
    ├── PlanError                 the legs cannot be run as asked: layer out of range, missing parent, k > n_latents
    ├── ModelError                the language model is missing, gated, unreadable, or cannot do what is asked of it
    ├── DataError                 corpus missing, empty, too short, or of the wrong type
    ├── TransferError             source and target do not fit together
    ├── FormatError               a file of another tool is missing, damaged, or says what cannot be expressed here
    ├── EndpointError             a language model elsewhere cannot be asked: address, key, refusal, or it keeps failing
    ├── RunDirectoryError         the output directory is taken, locked, unreadable, or of another run
    └── LegFailed                 training of at least one leg stopped (non-finite loss); the CLI exits with 1
    Interrupted                   Ctrl-C: no error; the state was saved; the CLI exits with 130

A message says what is wrong, where, what was expected and found, and the remedy.
"""


class SaeRelayError(Exception):
    """Base of all errors a user can cause."""

    exit_code = 2


class RecipeError(SaeRelayError):
    """The recipe (run.toml) is wrong."""


class PlanError(SaeRelayError):
    """The plan asks for something impossible."""


class ModelError(SaeRelayError):
    """The language model is missing, unreadable or unfit."""


class DataError(SaeRelayError):
    """The corpus is missing, too short or unfit."""


class TransferError(SaeRelayError):
    """Source and target of a transfer do not fit together."""


class FormatError(SaeRelayError):
    """A dictionary in another tool's format cannot be read, or ours cannot be written in it."""


class EndpointError(SaeRelayError):
    """The endpoint of a language model cannot be used, refuses, or keeps failing."""


class RunDirectoryError(SaeRelayError):
    """The run directory cannot be used."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state was saved, and the text is the command that continues."""


class LegFailed(SaeRelayError):
    """At least one leg stopped early; the others are complete."""

    exit_code = 1
