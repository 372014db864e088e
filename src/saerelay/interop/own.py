"""Our own format: dictionary.safetensors in canonical form, with dictionary.json next to it."""

from pathlib import Path
from typing import Any

from saerelay.interop.origin import Origin
from saerelay.runs.dictionaries import publish, read_dictionary
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

NAME = "saerelay"

_STATED = {"model", "layer", "module", "module_path", "context", "prepend_bos", "dataset", "l0"}
_STATED |= {"module_out", "d_out", "skip_connection", "schema", "architecture", "k", "d_model", "n_latents", "digests"}
"""Keys of dictionary.json that `Origin` and `Dictionary` hold; all others are provenance."""


def recognises(path: Path) -> bool:
    """Whether a directory has a dictionary.json."""
    return (path / "dictionary.json").is_file()


def read(path: Path) -> tuple[Dictionary, Origin]:
    """Read the published dictionary of a directory; RunDirectoryError if it is damaged."""
    dictionary, info = read_dictionary(path)
    origin = Origin(
        model=info.model,
        site=Site(info.layer, info.module) if info.layer is not None else None,  # type: ignore[arg-type]
        site_out=Site(info.layer, info.module_out) if info.layer is not None and info.module_out else None,
        module_path=info.module_path,
        context=info.context,
        prepend_bos=info.prepend_bos,
        dataset=info.dataset,
        l0=info.l0,
        provenance={key: value for key, value in info.to_data().items() if key not in _STATED},
    )
    return dictionary, origin


def write(path: Path, dictionary: Dictionary, origin: Origin) -> None:
    """Publish a dictionary in a directory."""
    publish(path, dictionary, as_info(origin))


def as_info(origin: Origin) -> dict[str, Any]:
    """Return an origin as the keys of dictionary.json."""
    site = origin.site
    return {
        **origin.provenance,
        "layer": site.layer if site else None,
        "module": site.module if site else None,
        "module_out": origin.module_out,
        "model": origin.model,
        "module_path": origin.module_path,
        "context": origin.context,
        "prepend_bos": origin.prepend_bos,
        "dataset": origin.dataset,
        "l0": origin.l0,
    }
