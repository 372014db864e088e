"""The Hugging Face hub: what hf://user/repo[@revision][/path] names, brought here; a folder, taken there."""

import difflib
import glob
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from saerelay.errors import FormatError
from saerelay.hub import explain_hub

_WEIGHTS = (".safetensors", ".npz", ".pt")
_KINDS = (*_WEIGHTS, ".json", ".md")
"""Endings of the files that are fetched: never code."""
_TRAINING_STATE = re.compile(r"(optimizer|lr_scheduler|state|rank_\d+_state).*\.pt")


class Reference(NamedTuple):
    """hf://user/repo@revision/path, taken apart."""

    repo: str
    revision: str
    path: str


def local(reference: str | Path) -> Path:
    """The directory or file that a reference means, brought from the hub if it is hf://user/repo[@revision][/path].

    >>> local("runs/a/legs/L3")
    PosixPath('runs/a/legs/L3')

    Files come into the hub's cache, under the hash of the commit that the name means now; without network, what is
    there is used. Of a directory only an SAE's own files are fetched, not what lies below. Raises FormatError if the
    repository, the revision or the path is not there, or not for you, with the remedy.
    """
    if not is_remote(reference):
        return Path(reference).expanduser()
    from huggingface_hub import snapshot_download

    named = parse(reference)
    with _explained(named):
        wanted = _own_files(named, *_listed(named))
        here = snapshot_download(named.repo, revision=named.revision or None, allow_patterns=_exactly(wanted))
    return Path(here) / named.path


def download(reference: str, into: Path) -> Path:
    """Fetch all SAEs of a repository, or of a folder in it, into a new directory; the directory of that folder.

    Code, and the states of optimisers, stay where they are. Raises what `local` raises.
    """
    from huggingface_hub import snapshot_download

    named = parse(reference)
    with _explained(named):
        wanted = _below(named, *_listed(named))
        snapshot_download(named.repo, revision=named.revision or None, allow_patterns=_exactly(wanted), local_dir=into)
    shutil.rmtree(into / ".cache", ignore_errors=True)  # the hub's own notes of the download
    here = into / named.path
    return here.parent if here.is_file() else here


def upload(folder: Path, repo: str, *, private: bool = False) -> str:
    """Put a folder's files into a repository of the hub, made if it is not there; the address of the commit."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore  # re-exported: httpx or httpx2

    if get_token() is None:
        raise FormatError(
            f"{repo}: nobody is logged in to the hub here; run `hf auth login`, with a token that may write"
        )
    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        return str(
            HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="SAEs from saerelay").commit_url
        )
    except (HfHubHTTPError, HTTPError, ValueError) as error:
        raise FormatError(
            f'"{repo}" was not uploaded: {" ".join(str(error).split())}. Check the name, the network, and with '
            "`hf auth whoami` that you may write there"
        ) from None


def is_remote(reference: str | Path) -> bool:
    """Whether a reference is to the hub.

    >>> is_remote("hf://user/repo"), is_remote("user/repo")
    (True, False)
    """
    return str(reference).startswith("hf:/")


def parse(reference: str | Path) -> Reference:
    """Take a reference to the hub apart.

    >>> parse("hf://user/repo@refs/pr/1/layer_3")
    Reference(repo='user/repo', revision='refs/pr/1', path='layer_3')

    Raises FormatError if it is none.
    """
    match = re.fullmatch(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@(refs/pr/\d+|[^/@]+))?(?:/+(.*?)/*)?", str(reference))
    if not match:
        raise FormatError(
            f'"{reference}" is no reference to the hub; write hf://user/repo, or hf://user/repo@main/layer_3'
        )
    return Reference(match[1], match[2] or "", match[3] or "")


def _listed(named: Reference) -> tuple[list[str], str]:
    """The files of a repository, or, if the hub cannot be asked, of what is in the cache; and which of both."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # pyright: ignore  # as above

    revision = named.revision or None
    try:
        siblings = HfApi().model_info(named.repo, revision=revision).siblings or []
        return [sibling.rfilename for sibling in siblings], "the repository"
    except HfHubHTTPError:
        raise
    except (HTTPError, OfflineModeIsEnabled):
        nothing = [""]  # of all files the cache would have to be complete
        cached = Path(snapshot_download(named.repo, revision=revision, local_files_only=True, allow_patterns=nothing))
        files = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
        return files, "the hub is not reachable, and the cache"


def _own_files(named: Reference, names: list[str], where: str) -> list[str]:
    """Those of an SAE: beside it, in its `checkpoints`, and the configurations of the folders it lies in."""
    below, is_file = _below(named, names, where), named.path in names
    folder = PurePosixPath(named.path).parent if is_file else PurePosixPath(named.path)
    own = [name for name in below if PurePosixPath(name).parent == folder]
    if is_file:
        own = [name for name in own if name == named.path or not name.endswith(_WEIGHTS)]
    own += [name for name in below if PurePosixPath(name).match(f"{folder}/checkpoints/*.safetensors")]
    if not any(name.endswith(_WEIGHTS) for name in own):
        folders = sorted({str(PurePosixPath(name).parent) for name in below if name.endswith(_WEIGHTS)})
        raise FormatError(f"{_said(named)} holds no SAE itself; these folders hold files of some: {_few(folders)}")
    return own + [name for name in (str(parent / "config.json") for parent in folder.parents) if name in names]


def _below(named: Reference, names: list[str], where: str) -> list[str]:
    """Files of use in the folder that is named (beside the file, if it is one) and below."""
    folder = str(PurePosixPath(named.path).parent) if named.path in names else named.path
    inside = names if folder in ("", ".") else [name for name in names if name.startswith(f"{folder}/")]
    if not inside:
        known = {*names, *(str(parent) for name in names for parent in PurePosixPath(name).parents)} - {"."}
        near = difflib.get_close_matches(named.path, sorted(known), n=5, cutoff=0.5)
        shown = f"did you mean {_few(near)}?" if near else f"there are {_few(sorted(known))}"
        raise FormatError(f'{_said(named)}: {where} has no "{named.path}"; {shown}')
    return [n for n in inside if n.endswith(_KINDS) and not _TRAINING_STATE.fullmatch(PurePosixPath(n).name)]


def _exactly(names: list[str]) -> list[str]:
    return [glob.escape(name) for name in names]


def _said(named: Reference) -> str:
    revision = f"@{named.revision}" if named.revision else ""
    return f"hf://{named.repo}{revision}" + (f"/{named.path}" if named.path else "")


def _few(names: list[str]) -> str:
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "none"


@contextmanager
def _explained(named: Reference) -> Iterator[None]:
    from huggingface_hub.errors import HTTPError  # pyright: ignore  # as above

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        said = explain_hub(named.repo, named.revision, error)
        raise FormatError(said or f"{_said(named)} cannot be fetched ({' '.join(str(error).split())})") from None
