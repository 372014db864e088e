"""The source of a language model: a directory or the hub, and errors with their remedy."""

import gc
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saerelay.demo import MODEL_DIR
from saerelay.errors import ModelError
from saerelay.files import odd_file, read_json
from saerelay.hub import explain_hub
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import ModelSpec

_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the names of classes that predict the next token."""

_MOST = {"layer": 4_096, "block": 4_096, "expert": 65_536, "head": 65_536}
"""The most modules that a configuration may ask for under keys with these words; no model comes near."""

TOKENIZER_REMEDY = "Put a tokenizer.json beside its config.json, or give token ids (data.tokens) instead of text."


class Location(NamedTuple):
    """The arguments of `from_pretrained`."""

    name_or_path: str
    """A hub id, or the path of a directory."""
    options: dict[str, Any]
    """Keyword arguments."""
    is_directory: bool

    @property
    def gguf(self) -> str:
        """The GGUF file in the directory that holds the model; "" if it is saved in the format of transformers."""
        return self.options.get("gguf_file", "")

    @property
    def weights(self) -> list[Path]:
        """The files in a directory that hold weights."""
        directory = Path(self.name_or_path)
        if self.gguf:
            return [directory / self.gguf]
        return sorted(directory.glob("*.safetensors"))


def locate(spec: ModelSpec) -> Location:
    """Find a model: a directory, or a hub id and its revision.

    Raises ModelError if the name can only mean a directory or a file, and no model is there.
    """
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    path = MODEL_DIR if spec.name == "demo" else Path(spec.name).expanduser()
    if path.is_dir():
        refuse_pipes(path)
        gguf = _gguf_in(path, spec.gguf_file)
        options["local_files_only"] = True
        if gguf:
            options["gguf_file"] = gguf
        return Location(str(path), options, is_directory=True)

    if path.is_file() and path.suffix == ".gguf":
        return locate(spec.changed(name=str(path.parent), gguf_file=path.name))
    if path.exists() or can_only_be_a_path(spec.name):
        problem = "not a directory" if path.exists() else "no such directory"
        raise ModelError(
            f"{path}: {problem}. Pass a directory with a config.json, a .gguf file, or a hub id such as "
            "EleutherAI/pythia-70m."
        )
    options["revision"] = spec.revision or None
    if spec.gguf_file:
        options["gguf_file"] = spec.gguf_file
    return Location(spec.name, options, is_directory=False)


def _gguf_in(directory: Path, asked: str) -> str:
    """The GGUF file that holds the model of a directory; "" if it is saved in the format of transformers.

    Raises ModelError if neither is there, or if several GGUF files could be meant.
    """
    if asked:
        if not (directory / asked).is_file():
            raise ModelError(f"{directory}: no file {asked} here (model.gguf_file). {_listed(directory)}")
        return asked
    _refuse_adapter(directory / "adapter_config.json")
    if (directory / "config.json").is_file():
        return ""
    found = sorted(path.name for path in directory.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(f"{directory}: holds several GGUF files; set model.gguf_file to one. {_listed(directory)}")
    raise ModelError(
        f"{directory}: no Hugging Face model here (config.json is missing). "
        "Pass a directory that save_pretrained has written, or a .gguf file."
    )


def _listed(directory: Path) -> str:
    """The GGUF files of a directory, in a sentence."""
    found = sorted(path.name for path in directory.glob("*.gguf"))
    return f"There are: {', '.join(found)}." if found else "There is no GGUF file."


def resolved_revision(spec: ModelSpec) -> str:
    """The commit that a hub model's revision stands for now; for a directory, the recipe's revision.

    Raises ModelError if the commit cannot be determined, and what `transformers` raises if there is no
    such model.
    """
    from transformers.utils.hub import cached_file

    location = locate(spec)
    if location.is_directory:
        return spec.revision
    revision = location.options["revision"]
    path = cached_file(location.name_or_path, location.gguf or "config.json", revision=revision)
    commit = commit_of(str(path))
    if not commit:
        raise ModelError(
            f'"{spec.name}": the commit of its revision cannot be determined from {path}; set model.revision to a '
            "commit."
        )
    if location.gguf:
        return commit
    adapter = cached_file(
        location.name_or_path,
        "adapter_config.json",
        revision=commit,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if adapter:
        _refuse_adapter(Path(adapter))
    return commit


def commit_of(path: str) -> str:
    """The commit that a file in the hub's cache belongs to; "" if its path does not tell.

    >>> commit_of(f"cache/models--me--x/snapshots/{40 * 'a'}/part/model.gguf") == 40 * "a"
    True
    """
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", path)
    return found[1] if found else ""


def can_only_be_a_path(name: str) -> bool:
    """Whether a name can only mean a path on this machine, whether or not it exists.

    >>> can_only_be_a_path("~/model"), can_only_be_a_path("user/model")
    (True, False)
    """
    return name.startswith(("/", ".", "~"))


def refuse_pipes(directory: Path) -> None:
    """Raise ModelError for a directory with a pipe or a device among its files, which could be read forever."""
    odd = odd_file(directory)
    if odd:
        raise ModelError(f"{odd}: not a regular file; replace it by a copy of its content")


def _refuse_adapter(path: Path) -> None:
    """Raise ModelError for an adapter, which would be applied to the weights only if `peft` happens to be installed."""
    if not path.is_file():
        return
    try:
        about = read_json(path)
    except ValueError:
        about = {}
    base = about.get("base_model_name_or_path") if isinstance(about, dict) else None
    raise ModelError(
        f"{path.parent}: holds an adapter ({path.name}; its base model: {base or 'not named'}), which transformers "
        "would apply only if `peft` is installed. To merge it into the weights, set model.name to its base model and "
        f"model.adapter to this directory; to use the model here without it, remove {path.name}."
    )


def read_config(spec: ModelSpec) -> Any:
    """The model's transformers configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    location = locate(spec)
    if location.gguf:
        require_packages(spec, "a GGUF file", "gguf", "accelerate")
    config = AutoConfig.from_pretrained(location.name_or_path, **location.options)
    _check_counts(spec, config.to_dict())
    if location.gguf and not config.architectures and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        # A GGUF file holds a whole language model, but names no class of transformers.
        config.architectures = [getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "__name__", "")]
    return config


def require_packages(spec: ModelSpec, what: str, *packages: str) -> None:
    """Raise ModelError unless some packages are installed; together they are the extra named after the first."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModelError(
            f'"{spec.name}": reading {what} needs {" and ".join(missing)}, which cannot be imported here. '
            f'Install them with: pip install "saerelay[{packages[0]}]"'
        )


def quantisation(config: Any) -> str:
    """How the weights of a model are quantised, such as "bitsandbytes"; "" for plain weights."""
    given = getattr(config, "quantization_config", None)
    if not given:
        return ""
    keys = given if isinstance(given, dict) else given.to_dict()
    method = keys.get("quant_method") or "a method that its configuration does not name"
    return str(getattr(method, "value", method))


def _check_counts(spec: ModelSpec, keys: dict[Any, Any]) -> None:
    """Raise ModelError for an absurd number of layers, experts or heads, which would take days to build."""
    for key, value in keys.items():
        if isinstance(value, dict):
            _check_counts(spec, value)
        if not isinstance(value, int) or re.search("dim|size|width", str(key)):
            continue
        for word, most in _MOST.items():
            if word in str(key) and value > most:
                raise ModelError(
                    f'"{spec.name}": its configuration says {key} = {value:.3g}, but at most {most:,} is allowed. '
                    "Check its config.json."
                )


def model_class(config: Any) -> Any:
    """The transformers class to load a model with: the one with the LM head, if the model has a head."""
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if is_causal_lm(config) else AutoModel


def is_causal_lm(config: Any) -> bool:
    """Whether the saved weights include an LM head that predicts the next token.

    The class that the model was saved from decides, since a backbone without its head is of the same
    family.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    has_own_class = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    family_has_one = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    saved_from = config.architectures or ()
    return (has_own_class or family_has_one) and any(name.endswith(_CAUSAL_ENDINGS) for name in saved_from)


def model_skeleton(spec: ModelSpec, config: Any) -> Any:
    """The model without its weights: every module in its place, on torch's meta device."""
    with torch.device("meta"):
        return model_class(config).from_config(config, trust_remote_code=spec.trust_remote_code)


def quantisation_options(location: Location, facts: ModelFacts) -> dict[str, Any]:
    """Options of `from_pretrained` for quantised weights: GGUF weights are made plain, others stay on a GPU."""
    if location.gguf:
        try:
            from transformers import GgufConfig
        except ImportError:  # an older transformers makes them plain by default
            return {}
        return {"quantization_config": GgufConfig(dequantize=True)}
    if facts.quantised and facts.on_gpu:
        return {"device_map": {"": facts.device}}
    return {}


def pinned(spec: ModelSpec, facts: ModelFacts) -> ModelSpec:
    """A model's specification with the plan's commits of the model and of its adapter."""
    return spec.changed(revision=facts.revision, adapter=facts.adapter or spec.adapter)


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause Python's garbage collector.

    Reading a tokenizer of 262,144 tokens and importing transformers make millions of objects that all stay. The
    collector would look through them again and again: 2 s of the 7 s that `saerelay plan` takes for Gemma 3.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# --- errors ------------------------------------------------------------------------------------


@contextmanager
def loading(spec: ModelSpec) -> Iterator[None]:
    """Turn errors of transformers and the hub into a ModelError; print nothing."""
    from huggingface_hub.errors import HTTPError, StrictDataclassError  # pyright: ignore  # re-exported
    from safetensors import SafetensorError

    builtin_errors = (OSError, ValueError, LookupError, RuntimeError, ImportError, OverflowError, struct.error)
    with _only_downloads_shown():
        try:
            yield
        except (*builtin_errors, HTTPError, StrictDataclassError, SafetensorError) as error:
            raise ModelError(_explain(spec, error)) from None


@contextmanager
def _only_downloads_shown() -> Iterator[None]:
    """Silence transformers' load reports and progress bars, but keep those of downloads."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    downloads_were_hidden = are_progress_bars_disabled()

    logging.set_verbosity_error()
    if had_bars:
        logging.disable_progress_bar()  # this hides the hub's bars as well
        if not downloads_were_hidden:
            enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()  # and this shows the hub's bars as well
            if downloads_were_hidden:
                disable_progress_bars()


def _explain(spec: ModelSpec, error: BaseException) -> str:
    """Say what an error in loading means, and what to do about it."""
    name = spec.name
    text = " ".join(str(error).split())
    from_hub = explain_hub(name, spec.revision, error)
    if from_hub:
        return from_hub
    if "trust_remote_code" in text:
        return (
            f'"{name}" needs Python code that comes with it. '
            "If you trust its authors, set model.trust_remote_code = true."
        )
    if isinstance(error, ImportError):
        return f'"{name}" needs a package that is not installed, or does not work here. ({text})'
    if "tokenizer" in text:
        return f'"{name}" has no fast tokenizer. {TOKENIZER_REMEDY} ({text})'
    if isinstance(error, OSError) and ".safetensors" in text:
        return (
            f'"{name}" has no weights in safetensors format. If it has pickled ones '
            "(pytorch_model.bin), convert them once with "
            f'`AutoModelForCausalLM.from_pretrained("{name}").save_pretrained("DIR")`, and pass '
            f"DIR. ({text})"
        )
    return (
        f'"{name}" cannot be loaded. '
        f"Check its files, and that the installed transformers supports this family. ({text})"
    )
