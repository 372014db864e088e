"""Explanations of the Hugging Face hub's refusals, for language models and SAEs alike."""

from collections.abc import Iterator


def explain_hub(name: str, revision: str, error: BaseException) -> str:
    """The meaning of a hub error and its remedy, or "" if the hub has nothing to do with it.

    >>> from huggingface_hub.errors import OfflineModeIsEnabled
    >>> explain_hub("gpt2", "main", OfflineModeIsEnabled("offline mode is on"))[:41]
    '"gpt2" could not be fetched from the hub.'
    >>> explain_hub("gpt2", "main", ValueError("something else"))
    ''

    The causes of the error are examined as well: transformers wraps the hub's errors in its own.
    """
    from huggingface_hub import errors as hub

    text = " ".join(str(error).split())
    page = f"https://huggingface.co/{name}"
    unreachable = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HTTPError)  # pyright: ignore
    remedies = (  # the first that matches counts: a gated repository is an HTTP error as well
        (hub.GatedRepoError, f"is gated: accept the licence at {page} and run `hf auth login`."),
        (
            hub.RepositoryNotFoundError,
            "is not on the hub. Check the name; if it is private, run `hf auth login`.",
        ),
        (hub.RevisionNotFoundError, f'has no revision "{revision}"; see {page}/tree/main.'),
        (
            hub.HFValidationError,
            "is neither a directory nor a valid hub id; write EleutherAI/pythia-70m or ./my-model.",
        ),
        (
            unreachable,
            "could not be fetched from the hub. Check the name and the network connection, "
            f"or pass a local directory. ({text})",
        ),
    )
    causes = list(_with_causes(error))
    for kind, remedy in remedies:
        if any(isinstance(cause, kind) for cause in causes):
            return f'"{name}" {remedy}'
    return ""


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on; a circular chain ends where it closes."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
