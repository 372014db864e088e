"""Where a language model comes from: a directory or the hub, its configuration, and errors with their remedy."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from saerelay.errors import ModelError
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import ModelSpec

_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


_NO_TOKENIZER = (
    "has no fast tokenizer. Put a tokenizer.json beside its config.json, "
    "or give token ids (`data.tokens`) instead of text."
)


def weights_identity(spec: ModelSpec, facts: ModelFacts) -> dict[str, Any]:
    """What tells a model's weights and code from others', as JSON: a hub revision, or the files of a directory.

    >>> from saerelay.lm.facts import read_facts
    >>> sorted(weights_identity(ModelSpec(), read_facts(ModelSpec())))
    ['config', 'files']
    """
    source, options = _source(spec)
    if "local_files_only" not in options:
        return {"name": facts.name, "revision": facts.revision}
    files = [path for path in sorted(Path(source).iterdir()) if path.suffix in (".safetensors", ".py")]
    return {
        "config": hashlib.sha256((Path(source) / "config.json").read_bytes()).hexdigest(),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }


def _is_causal_lm(config: Any) -> bool:
    """Whether the weights include an LM head that predicts the next token, as the saved class says, not the family."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    return known and any(name.endswith(_CAUSAL_ENDINGS) for name in config.architectures or ())


def _skeleton(spec: ModelSpec, config: Any) -> Any:
    """The model without weights."""
    with torch.device("meta"):
        return _auto_class(config).from_config(config, trust_remote_code=spec.trust_remote_code)


def _auto_class(config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if _is_causal_lm(config) else AutoModel


def _source(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """What to pass to `from_pretrained`: a directory, never looking at the hub, or a hub id and its revision."""
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    path = Path(__file__).parent.parent / "demo" if spec.name == "demo" else Path(spec.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: this directory has no config.json, so it holds no Hugging Face model.")
        return str(path), {**options, "local_files_only": True}
    if path.exists() or spec.name.startswith(("/", ".", "~")):
        raise ModelError(
            f"{path}: no such directory. Pass one with a config.json, or a hub id like EleutherAI/pythia-70m."
        )
    return spec.name, {**options, "revision": spec.revision or None}


def _read_config(spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    source, options = _source(spec)
    return AutoConfig.from_pretrained(source, **options)


@contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """Turn what transformers and the hub raise into a ModelError with the remedy, without load reports and bars."""
    from huggingface_hub.errors import HTTPError, StrictDataclassError  # pyright: ignore  # re-exported: httpx or httpx2
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from safetensors import SafetensorError
    from transformers.utils import logging

    builtin = (OSError, ValueError, KeyError, RuntimeError, ImportError)
    bars, quiet_hub, verbosity = (
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
        logging.get_verbosity(),
    )
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()  # these are the hub's too, whose downloads should be seen
        if not quiet_hub:
            enable_progress_bars()
    try:
        yield
    except (*builtin, HTTPError, StrictDataclassError, SafetensorError) as error:
        raise ModelError(_explain(spec, error)) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if quiet_hub:
                disable_progress_bars()


def _explain(spec: ModelSpec, error: BaseException) -> str:
    name, text = spec.name, " ".join(str(error).split())
    if said := explain_hub(name, spec.revision, error):
        return said
    if "trust_remote_code" in text:
        return f'"{name}" needs Python code of its own. If you trust its authors, set model.trust_remote_code = true.'
    if "tokenizer" in text:
        return f'"{name}" {_NO_TOKENIZER} ({text})'
    if isinstance(error, OSError) and ".safetensors" in text:
        return (
            f'"{name}" has no weights as safetensors. If it has pickled ones (pytorch_model.bin), convert them once: '
            f'`AutoModelForCausalLM.from_pretrained("{name}").save_pretrained("DIR")`, and pass DIR. ({text})'
        )
    return f'"{name}" cannot be loaded. Check its files, and that transformers knows the family. ({text})'


def explain_hub(name: str, revision: str, error: BaseException) -> str:
    """What the hub's refusal of a repository means, and the remedy; "" if the hub has nothing to do with the error."""
    from huggingface_hub import errors as hub

    text = " ".join(str(error).split())
    offline = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HTTPError)  # pyright: ignore  # as above
    remedies = (
        (hub.GatedRepoError, f"is gated: accept the licence at https://huggingface.co/{name} and run `hf auth login`."),
        (hub.RepositoryNotFoundError, "is not on the hub. Check the name; if it is private, run `hf auth login`."),
        (hub.RevisionNotFoundError, f'has no revision "{revision}"; see https://huggingface.co/{name}/tree/main.'),
        (hub.HFValidationError, "is neither a directory nor a possible hub id; write EleutherAI/pythia-70m or ./mine."),
        (offline, f"did not come from the hub. Check the name, the network, or pass a local directory. ({text})"),
    )
    chain, link = [error], error
    while (link := link.__cause__ or link.__context__) and link not in chain:
        chain.append(link)
    return next((f'"{name}" {remedy}' for kind, remedy in remedies if any(isinstance(e, kind) for e in chain)), "")
