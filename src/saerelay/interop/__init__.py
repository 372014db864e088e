"""Dictionaries of other tools in, ours out: one file a format, each with `recognises`, `read` and (some) `write`.

    own  saelens  gemma_scope  sparsify  dictionary_learning  llamascopium  openai

`recognises(path)` looks at the names in a directory (or at the name of a file) and opens no tensors; `read(path)` gives
a canonical `Dictionary`, exactly the same function, and an `Origin`; `write(path, dictionary, origin)` fills a
directory. May import the ground, `sae` and `runs`.
"""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

from saerelay.errors import FormatError
from saerelay.interop import dictionary_learning, gemma_scope, hub, llamascopium, openai, own, saelens, sparsify
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.site import Site

FORMATS: tuple[ModuleType, ...] = (own, saelens, gemma_scope, sparsify, dictionary_learning, llamascopium, openai)
"""All that are read; those with a `write` are written, too."""
WRITTEN = tuple(format.NAME for format in FORMATS if hasattr(format, "write"))


def load_dictionary(
    reference: str | Path, *, format: str = "", model: str = "", site: Site | None = None
) -> tuple[Dictionary, Origin]:
    """Read a trained SAE of any format in canonical form, and what its files say of it.

    `sae, origin = load_dictionary("hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")`; a reference
    is a directory, a file, or hf://user/repo[@revision][/path]. `format` is found out unless given; `model` and `site`
    are taken where the files do not say. Raises FormatError if it is of no known format or damaged, if its files name
    another site, or if no dictionary of raw activations equals it (then `load_layer_normed` reads it).
    """
    dictionary, origin = read_any(reference, format=format, model=model, site=site)
    if isinstance(dictionary, LayerNormed):
        raise FormatError(
            f"{reference}: normalises each token by its own mean and deviation, which no fixed dictionary of raw "
            "activations does. In Python, saerelay.load_layer_normed reads it as it is, and its at_scale(x) is the "
            "nearest one for activations x; `saerelay hop` takes that one"
        )
    return dictionary, origin


def load_layer_normed(reference: str | Path, *, format: str = "") -> tuple[LayerNormed, Origin]:
    """Read a trained SAE that normalises each token by itself (layer norm): OpenAI's v5, some of SAELens."""
    dictionary, origin = read_any(reference, format=format)
    if isinstance(dictionary, Dictionary):
        raise FormatError(f"{reference}: acts on raw activations; saerelay.load_dictionary reads it")
    return dictionary, origin


def read_any(
    reference: str | Path, *, format: str = "", model: str = "", site: Site | None = None
) -> tuple[Dictionary | LayerNormed, Origin]:
    """What `load_dictionary` reads, or `load_layer_normed`."""
    path = hub.local(reference)
    chosen = format_named(format) if format else format_of(path)
    dictionary, origin = chosen.read(path)
    if site and origin.site and site != origin.site:
        raise FormatError(f"{reference}: its files say it reads {origin.site}, not {site}")
    return dictionary, replace(origin, model=origin.model or model, site=origin.site or site)


def format_of(path: Path) -> ModuleType:
    """The format of a directory or file."""
    if not path.exists():
        raise FormatError(f"{path}: no such file or directory")
    for format in FORMATS:
        if format.recognises(path):
            return format
    found = [place.relative_to(path) for place in places_in(path)]
    names = ", ".join(format.NAME for format in FORMATS)
    if found:
        shown = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        raise FormatError(f"{path}: holds {len(found)} SAEs; give one of them: {shown}")
    raise FormatError(f"{path}: no SAE of a known format ({names}) is here; name one with --format if it is")


def places_in(path: Path) -> list[Path]:
    """The directories and files in a directory, itself included, that hold an SAE each, as far as names tell."""
    inside = [path, *sorted(path.rglob("*"))]
    known = {place for place in inside if any(format.recognises(place) for format in FORMATS)}
    return [place for place in inside if place in known and known.isdisjoint(place.parents)]


def format_named(name: str) -> ModuleType:
    """The format with a name."""
    for format in FORMATS:
        if format.NAME == name:
            return format
    raise FormatError(f'no format "{name}"; these are known: {", ".join(format.NAME for format in FORMATS)}')


def write_dictionary(path: str | Path, dictionary: Dictionary, origin: Origin, format: str) -> None:
    """Write a dictionary into a directory in one of the formats of WRITTEN; FormatError if it cannot be said there."""
    chosen = format_named(format)
    if format not in WRITTEN:
        raise FormatError(f"{format} is read, not written; these are: {', '.join(WRITTEN)}")
    chosen.write(Path(path), dictionary, origin)
