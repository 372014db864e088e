"""The Hugging Face hub: download the files that hf://user/repo[@revision][/path] names, upload a folder."""

import difflib
import glob
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from saerelay.errors import FormatError, HubError
from saerelay.hub import explain_hub
from saerelay.spec import few_of

_WEIGHTS = (".safetensors", ".npz", ".pt")
_FETCHED = (*_WEIGHTS, ".json", ".yaml", ".md")
"""Suffixes of the files that are downloaded: never code."""
_CHECKPOINTS = "checkpoints"
"""Folder within an SAE's folder in which Llama Scope keeps the weights."""
_TRAINING_STATE = re.compile(r"(optimizer|lr_scheduler|state|rank_\d+_state).*\.pt")


class Reference(NamedTuple):
    """The parts of hf://user/repo@revision/path."""

    repo: str
    revision: str
    path: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        path = f"/{self.path}" if self.path else ""
        return f"hf://{self.repo}{revision}{path}"


def is_remote(reference: str | Path) -> bool:
    """Whether a reference is to the hub.

    >>> is_remote("hf://user/repo"), is_remote("user/repo")
    (True, False)
    """
    return str(reference).startswith("hf:/")


def parse(reference: str | Path) -> Reference:
    """Parse a reference to the hub; HubError if it is not a valid one.

    >>> parse("hf://user/repo@refs/pr/1/layer_3")
    Reference(repo='user/repo', revision='refs/pr/1', path='layer_3')
    """
    # One slash is enough, because pathlib turns hf://user/repo into hf:/user/repo.
    match = re.fullmatch(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@(refs/pr/\d+|[^/@]+))?(?:/+(.*?)/*)?", str(reference))
    if not match:
        raise HubError(
            f'"{reference}" is not a valid reference to the hub; write hf://user/repo, or hf://user/repo@main/layer_3'
        )
    return Reference(repo=match[1], revision=match[2] or "", path=match[3] or "")


# --- from the hub ------------------------------------------------------------------------------


def local(reference: str | Path) -> Path:
    """Return the directory or file that a reference names, downloading it if it is on the hub.

    >>> local("runs/a/legs/L3")
    PosixPath('runs/a/legs/L3')

    Files go into the hub's cache, under the hash of the commit that the revision currently names;
    without a network, the cache is used. Of a directory, only the SAE's own files are downloaded,
    not those of its subdirectories. Raises HubError if the repository, the revision or the path
    does not exist or is not accessible to you, and FormatError if the directory holds no SAE.
    """
    if not is_remote(reference):
        return Path(reference).expanduser()
    from huggingface_hub import snapshot_download

    remote = parse(reference)
    with _asking_the_hub(remote):
        names = _file_names(remote)
        wanted = [glob.escape(name) for name in _own_files(remote, names)]
        root = snapshot_download(remote.repo, revision=remote.revision or None, allow_patterns=wanted)
    return Path(root) / remote.path


def download(reference: str, into: Path) -> Path:
    """Download all SAEs in a repository or folder into a new directory; returns where they are then.

    Code and optimizer states are not downloaded. Raises HubError as `local` does.
    """
    from huggingface_hub import snapshot_download

    remote = parse(reference)
    with _asking_the_hub(remote):
        names = _file_names(remote)
        wanted = [glob.escape(name) for name in _files_below(remote, names)]
        snapshot_download(remote.repo, revision=remote.revision or None, allow_patterns=wanted, local_dir=into)
    notes_of_the_hub = into / ".cache"
    if notes_of_the_hub.is_dir():
        shutil.rmtree(notes_of_the_hub)
    path = into / remote.path
    return path.parent if path.is_file() else path


class _Names(NamedTuple):
    """Names of the files in a repository, and where they were listed (for error messages)."""

    names: list[str]
    where: str


def _file_names(remote: Reference) -> _Names:
    """List the files of a repository, or, if the hub cannot be reached, those in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # pyright: ignore  # re-exported

    try:
        siblings = HfApi().model_info(remote.repo, revision=remote.revision or None).siblings
    except HfHubHTTPError:  # an answer of the hub; a subclass of HTTPError
        raise
    except (HTTPError, OfflineModeIsEnabled):
        return _Names(_cached_files(remote), "the hub is not reachable, and the cache")
    return _Names([sibling.rfilename for sibling in siblings or []], "the repository")


def _cached_files(remote: Reference) -> list[str]:
    from huggingface_hub import snapshot_download

    nothing = [""]  # with the pattern of all files, the cache would have to be complete
    snapshot = snapshot_download(
        remote.repo, revision=remote.revision or None, local_files_only=True, allow_patterns=nothing
    )
    root = Path(snapshot)
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _own_files(remote: Reference, listed: _Names) -> list[str]:
    """Return the files of the SAE that a folder or a file names.

    They are the files in the folder (for a file, its configuration next to it), the weights in
    `checkpoints` below it, and the config.json of its parent folders. Raises FormatError if there
    are no weights among them.
    """
    below = _files_below(remote, listed)
    folder = _folder(remote, listed)
    own = [name for name in below if PurePosixPath(name).parent == folder]
    if remote.path in listed.names:
        own = [name for name in own if name == remote.path or not name.endswith(_WEIGHTS)]
    in_checkpoints = [name for name in below if PurePosixPath(name).parent == folder / _CHECKPOINTS]
    own += [name for name in in_checkpoints if name.endswith(".safetensors")]
    if not any(name.endswith(_WEIGHTS) for name in own):
        folders = {_folder_of_sae(name) for name in below if name.endswith(_WEIGHTS)}
        raise FormatError(f"{remote} holds no SAE itself; these folders contain SAE files: {few_of(sorted(folders))}")

    configs = [str(parent / "config.json") for parent in folder.parents]
    return own + [name for name in configs if name in listed.names]


def _files_below(remote: Reference, listed: _Names) -> list[str]:
    """Return the files to download in and below the named folder; HubError if there are none."""
    folder = _folder(remote, listed)
    is_root = folder == PurePosixPath(".")
    inside = [name for name in listed.names if is_root or name.startswith(f"{folder}/")]
    if not inside:
        raise HubError(f'{remote}: {listed.where} has no "{remote.path}"; {_similar_paths(remote.path, listed.names)}')
    wanted = [name for name in inside if name.endswith(_FETCHED)]
    return [name for name in wanted if not _TRAINING_STATE.fullmatch(PurePosixPath(name).name)]


def _folder_of_sae(weights: str) -> str:
    """Return the folder of the SAE that a file of weights belongs to: the one above `checkpoints`, if it is there."""
    folder = PurePosixPath(weights).parent
    return str(folder.parent if folder.name == _CHECKPOINTS else folder)


def _folder(remote: Reference, listed: _Names) -> PurePosixPath:
    """Return the folder that a reference names, or the folder of the file that it names."""
    path = PurePosixPath(remote.path)
    return path.parent if remote.path in listed.names else path


def _similar_paths(path: str, names: list[str]) -> str:
    """Return files and folders with similar names, as a question, or else all that exist."""
    existing = set(names)
    for name in names:
        existing.update(str(parent) for parent in PurePosixPath(name).parents)
    existing.discard(".")
    similar = difflib.get_close_matches(path, sorted(existing), n=5, cutoff=0.5)
    if similar:
        return f"did you mean {few_of(similar)}?"
    return f"there are {few_of(sorted(existing)) or 'none'}"


@contextmanager
def _asking_the_hub(remote: Reference) -> Iterator[None]:
    """Turn the hub's exceptions into a HubError with a remedy."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore  # re-exported

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        explanation = explain_hub(remote.repo, remote.revision, error)
        raise HubError(explanation or f"{remote} cannot be fetched ({reason})") from None


# --- to the hub --------------------------------------------------------------------------------


def upload(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder to a repository, created if necessary; returns the address of the commit.

    Raises HubError if nobody is logged in, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore  # re-exported

    if get_token() is None:
        raise HubError(
            f"{repo}: you are not logged in to the hub; run `hf auth login` with a token that has write access"
        )
    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        commit = HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="SAEs from saerelay")
    except (HfHubHTTPError, HTTPError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise HubError(
            f'"{repo}" was not uploaded ({reason}). Check the name, the network connection, '
            "and (with `hf auth whoami`) that you have write access"
        ) from None
    return str(commit.commit_url)
