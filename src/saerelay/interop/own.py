"""Our own format, and the plain one: dictionary.safetensors with canonical tensors, dictionary.json beside it."""

from pathlib import Path
from typing import Any

from saerelay.interop.origin import Origin
from saerelay.runs.dictionaries import publish, read_dictionary
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

NAME = "saerelay"


def recognises(path: Path) -> bool:
    """Whether a directory has a dictionary.json."""
    return (path / "dictionary.json").is_file()


def read(path: Path) -> tuple[Dictionary, Origin]:
    """The published dictionary of a directory."""
    dictionary, info = read_dictionary(path)
    known = {"model", "layer", "module", "module_path", "context", "prepend_bos", "dataset", "l0"}
    known |= {"schema_version", "architecture", "k", "d_model", "n_latents"}
    return dictionary, Origin(
        model=info.get("model", ""),
        site=Site(info["layer"], info["module"]) if info.get("layer") is not None else None,
        module_path=info.get("module_path", ""),
        context=info.get("context"),
        prepend_bos=info.get("prepend_bos"),
        dataset=info.get("dataset", ""),
        l0=info.get("l0"),
        provenance={key: value for key, value in info.items() if key not in known},
    )


def write(path: Path, dictionary: Dictionary, origin: Origin) -> None:
    """Publish a dictionary in a directory."""
    publish(path, dictionary, as_info(origin))


def as_info(origin: Origin) -> dict[str, Any]:
    """What dictionary.json says of an origin."""
    site = origin.site
    return origin.provenance | {
        "layer": site.layer if site else None,
        "module": site.module if site else None,
        "model": origin.model,
        "module_path": origin.module_path,
        "context": origin.context,
        "prepend_bos": origin.prepend_bos,
        "dataset": origin.dataset,
        "l0": origin.l0,
    }
