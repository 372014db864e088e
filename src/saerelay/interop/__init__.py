"""Read other tools' dictionaries, and write ours for them: one file per format.

    own  saelens  gemma_scope  sparsify  dictionary_learning  llamascopium  openai  circuit_tracer

To add a format, write a module as `Format` describes it, and list it in FORMATS. May import the
ground, `sae` and `runs`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from saerelay.errors import FormatError
from saerelay.files import odd_file
from saerelay.interop import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    hub,
    llamascopium,
    openai,
    own,
    saelens,
    sparsify,
)
from saerelay.interop.names import looks_like_hub_id
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.site import Site
from saerelay.spec import few_of


class Format(Protocol):
    """The interface of a format's module."""

    @property
    def NAME(self) -> str:
        """Its name for --format; a constant."""
        ...

    def recognises(self, path: Path) -> bool:
        """Whether a directory or file is of this format, judged by names alone, without reading tensors."""
        ...

    def read(self, path: Path) -> tuple[Dictionary | LayerNormed, Origin]:
        """Read the SAE in canonical form, as exactly the same function, and its origin."""
        ...


class WritableFormat(Format, Protocol):
    """The interface of the module of a format that can also be written."""

    def write(self, path: Path, dictionary: Dictionary, origin: Origin) -> None:
        """Fill a directory; FormatError if the format cannot express the dictionary."""
        ...


FORMATS: tuple[Format, ...] = (
    own,
    saelens,
    gemma_scope,
    sparsify,
    dictionary_learning,
    llamascopium,
    openai,
    circuit_tracer,
)
"""All formats that can be read, in the order in which they are tried."""

_WRITABLE: tuple[WritableFormat, ...] = (own, saelens, sparsify, dictionary_learning, circuit_tracer)
_OF_TRANSCODERS = (own.NAME, circuit_tracer.NAME)

WRITTEN = tuple(format.NAME for format in _WRITABLE)
"""Names of the formats that can also be written."""


# --- reading -----------------------------------------------------------------------------------


def load_dictionary(
    reference: str | Path, *, format: str = "", model: str = "", site: Site | None = None
) -> tuple[Dictionary, Origin]:
    """Read a trained SAE of any format in canonical form, and what its files say about it.

        sae, origin = load_dictionary("hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")

    A reference is a directory, a file, or `hf://user/repo[@revision][/path]`. The format is detected unless `format`
    names it; `model` and `site` are used if the files do not say. Raises HubError if the hub cannot provide the SAE;
    FormatError if it is damaged or of no known format, if its files name another site, or if it is equivalent to no
    dictionary of raw activations (`load_layer_normed` reads SAEs that normalise each token).
    """
    dictionary, origin = read_any(reference, format=format, model=model, site=site)
    if isinstance(dictionary, LayerNormed):
        raise FormatError(
            f"{reference}: normalises each token by its own mean and standard deviation, which an SAE "
            "of raw activations cannot do. In Python, saerelay.load_layer_normed reads it unchanged, "
            "and at_scale(x) of the result is the closest SAE of raw activations, for activations x; "
            "`saerelay hop` uses this SAE"
        )
    return dictionary, origin


def load_layer_normed(reference: str | Path, *, format: str = "") -> tuple[LayerNormed, Origin]:
    """Read a trained SAE with a layer norm over each token: OpenAI's v5 and some of SAELens'.

    Raises the errors of `load_dictionary`, and FormatError for SAEs of raw activations.
    """
    dictionary, origin = read_any(reference, format=format)
    if isinstance(dictionary, Dictionary):
        raise FormatError(f"{reference}: reads raw activations; load it with saerelay.load_dictionary")
    return dictionary, origin


def read_any(
    reference: str | Path, *, format: str = "", model: str = "", site: Site | None = None
) -> tuple[Dictionary | LayerNormed, Origin]:
    """Read a trained SAE with or without a layer norm; otherwise as `load_dictionary`."""
    path = hub.local(reference)
    odd = odd_file(path)
    if odd:
        raise FormatError(f"{odd}: not a regular file; replace it by a copy of its content")
    chosen = format_named(format) if format else format_of(path)
    dictionary, origin = chosen.read(path)
    if site and origin.site and site != origin.site:
        raise FormatError(f"{reference}: its files say it reads {origin.site}, not {site}")
    return dictionary, replace(origin, model=origin.model or model, site=origin.site or site)


# --- detecting ---------------------------------------------------------------------------------


def format_of(path: Path) -> Format:
    """Return the format of a directory or file; FormatError if it has no known format, or holds several SAEs."""
    if not path.exists():
        may_be_on_hub = looks_like_hub_id("/".join(path.parts[:2])) and not Path(path.parts[0]).exists()
        hint = f"; for a repository on the hub, write hf://{path}" if may_be_on_hub else ""
        raise FormatError(f"{path}: no such file or directory{hint}")
    for format in FORMATS:
        if format.recognises(path):
            return format

    inside = [str(sae.relative_to(path)) for sae in find_saes(path)]
    if inside:
        raise FormatError(f"{path}: holds {len(inside)} SAEs; give one of them: {few_of(inside)}")
    raise FormatError(
        f"{path}: no SAE of a known format here ({_names(FORMATS)}); if there is one, name its format with --format"
    )


def find_saes(directory: Path) -> list[Path]:
    """Return the SAEs in or below a directory, as far as names tell; none inside another."""
    saes: set[Path] = set()
    for path in [directory, *sorted(directory.rglob("*"))]:
        is_inside_another = not saes.isdisjoint(path.parents)
        if not is_inside_another and any(format.recognises(path) for format in FORMATS):
            saes.add(path)
    return sorted(saes)


def format_named(name: str) -> Format:
    """Return the format with a name; FormatError if there is none."""
    for format in FORMATS:
        if format.NAME == name:
            return format
    raise FormatError(f'unknown format "{name}"; expected one of: {_names(FORMATS)}')


def _names(formats: tuple[Format, ...]) -> str:
    return ", ".join(format.NAME for format in formats)


# --- writing -----------------------------------------------------------------------------------


def takes_transcoders(format: str) -> bool:
    """Whether a format can express transcoders."""
    return format in _OF_TRANSCODERS


def write_dictionary(path: str | Path, dictionary: Dictionary, origin: Origin, format: str) -> None:
    """Write a dictionary into a directory in one of the formats of WRITTEN.

    Raises FormatError if the format cannot express it, is only read, or is unknown, and for a transcoder that is not
    said to read a site of the layer at which it reconstructs.
    """
    _check_layer(origin)
    for writable in _WRITABLE:
        if writable.NAME == format:
            is_transcoder = origin.site_out or dictionary.W_skip is not None or dictionary.d_out != dictionary.d_model
            if is_transcoder and not takes_transcoders(format):
                raise FormatError(
                    f"{format} can hold only SAEs, and this is a transcoder; formats of transcoders: "
                    f"{', '.join(_OF_TRANSCODERS)}"
                )
            writable.write(Path(path), dictionary, origin)
            return
    is_read = any(readable.NAME == format for readable in FORMATS)
    what = f"{format} can be read but not written" if is_read else f'unknown format "{format}"'
    raise FormatError(
        f"{what}; formats that can be written: {', '.join(WRITTEN)} (and neuronpedia, by `saerelay export` alone)"
    )


def _check_layer(origin: Origin) -> None:
    """Raise FormatError for a transcoder between two layers: files state one layer for both of its modules."""
    if origin.site_out and (origin.site is None or origin.site.layer != origin.site_out.layer):
        raise FormatError(
            f"a transcoder reads and reconstructs modules of one layer; this one reconstructs {origin.site_out}, and "
            f"reads {origin.site or 'at a site that is not given'}"
        )
