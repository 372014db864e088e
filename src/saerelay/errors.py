"""Every error that `saerelay` raises on purpose.

    SaeRelayError             anything a user can cause; the CLI prints it and exits with 2
    ├── RecipeError           run.toml: unknown key, wrong value, impossible combination
    ├── PlanError             the legs cannot be run as asked: no such layer, no parent, k > n_latents
    ├── ModelError            the language model is missing, gated, unreadable or unsuitable
    ├── DataError             the corpus is missing, too short or unsuitable; cached data is damaged
    ├── TransferError         source and target of a transfer do not fit together
    ├── FormatError           a file from another tool is missing, damaged, or has no equivalent here
    ├── HubError              the Hugging Face hub lacks the file, denies access, or cannot be reached
    ├── EndpointError         a language model elsewhere cannot be asked, refuses, or keeps failing
    ├── RunDirectoryError     the output directory is taken, locked, unreadable, or another run's
    ├── LegFailed             training of a leg stopped (non-finite loss); the CLI exits with 1
    └── TeamError             another process that trains the same run is gone; the CLI exits with 1
    Interrupted               Ctrl-C: not an error; the state was saved; the CLI exits with 130

A message says what is wrong, where, what was expected, what was found, and what to do about it.
"""

import unicodedata


def printable(text: str) -> str:
    """Return text with control and invisible characters written as escapes; line ends and tabs stay.

    Names and messages may come from files that others wrote, and a terminal obeys control characters.

    >>> print(printable("a\\x1b[2Jb\\u202e"))
    a\\x1b[2Jb\\u202e
    """
    return "".join(_printable_character(character) for character in text)


def _printable_character(character: str) -> str:
    category = unicodedata.category(character)
    obeyed = category[0] == "C" or category in ("Zl", "Zp")
    if not obeyed or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode()


class SaeRelayError(Exception):
    """Base of all errors a user can cause."""

    exit_code = 2


class RecipeError(SaeRelayError):
    """The recipe (run.toml) is wrong."""


class PlanError(SaeRelayError):
    """The plan asks for something impossible."""


class ModelError(SaeRelayError):
    """The language model is missing, unreadable or unsuitable."""


class DataError(SaeRelayError):
    """The corpus is missing, too short or unsuitable, or cached data is damaged."""


class TransferError(SaeRelayError):
    """Source and target of a transfer do not fit together."""


class FormatError(SaeRelayError):
    """A dictionary in another tool's format cannot be read, or one of ours cannot be written in that format."""


class HubError(SaeRelayError):
    """The Hugging Face hub lacks what was asked for, denies access, or cannot be reached."""


class EndpointError(SaeRelayError):
    """The endpoint of a language model cannot be used, refuses, or keeps failing."""


class RunDirectoryError(SaeRelayError):
    """The run directory cannot be used."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state was saved, and the message is the command that continues the run."""


class LegFailed(SaeRelayError):
    """At least one leg stopped early; the others are complete."""

    exit_code = 1


class TeamError(SaeRelayError):
    """Another of the processes that train a run together stopped, so this process stops too."""

    exit_code = 1
