"""Adapters, as `peft` saves them: merged into a model's weights in memory, identified by commit or by files.

After the merge there is a plain model: no other part of the package knows that there was an adapter.
"""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from saerelay.errors import ModelError
from saerelay.files import read_json
from saerelay.lm.source import (
    can_only_be_a_path,
    commit_of,
    loading,
    quantisation,
    refuse_pipes,
    require_packages,
)
from saerelay.planning.recipe import ModelSpec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class Adapter(NamedTuple):
    """An adapter whose files are on this machine."""

    name: str
    """A directory, or a hub id with its commit."""
    directory: Path
    is_local: bool

    @property
    def files(self) -> list[Path]:
        """The adapter's files."""
        return [self.directory / CONFIG, self.directory / WEIGHTS]


def find_adapter(spec: ModelSpec) -> Adapter | None:
    """Find a model's adapter, and download it if it is on the hub; None if the model has none.

    Raises ModelError if the adapter does not exist or is not in safetensors, or if `peft` is not installed.
    """
    if not spec.adapter:
        return None
    require_packages(spec, f"it with the adapter {spec.adapter}", "peft")
    path = Path(spec.adapter).expanduser()
    if path.is_dir():
        refuse_pipes(path)
        adapter = Adapter(str(path), path, is_local=True)
    elif path.exists() or can_only_be_a_path(spec.adapter):
        raise ModelError(
            f"{path}: no such directory. Set model.adapter to a directory that `peft` has saved, or to a hub id."
        )
    else:
        adapter = _from_hub(spec.adapter)
    for file in adapter.files:
        if not file.is_file():
            raise ModelError(
                f"{adapter.name}: no adapter here ({file.name} is missing). Set model.adapter to an adapter that "
                "save_pretrained of a peft model has written, in safetensors format."
            )
    return adapter


def _from_hub(reference: str) -> Adapter:
    """The adapter on the hub that is meant by user/name, or user/name@revision."""
    from transformers.utils.hub import cached_file

    name, _, revision = reference.partition("@")
    with loading(ModelSpec(name=name, revision=revision)):
        config = cached_file(name, CONFIG, revision=revision or None)
        commit = commit_of(str(config))
        if not commit:
            raise ModelError(
                f'"{reference}": its commit cannot be determined from {config}; set model.adapter to {name}@COMMIT'
            )
        cached_file(name, WEIGHTS, revision=commit)
    return Adapter(f"{name}@{commit}", Path(str(config)).parent, is_local=False)


def merged(model: Any, spec: ModelSpec) -> Any:
    """Return a model with its adapter merged into its weights; the model itself if it has no adapter.

    Raises ModelError if the adapter does not fit, or cannot be merged.
    """
    adapter = find_adapter(spec)
    if adapter is None:
        return model
    how = quantisation(model.config)
    if how:
        raise ModelError(
            f'"{spec.name}": an adapter can only be merged into plain weights, and these are quantised ({how}). Set '
            "model.name to the unquantised model."
        )
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of keys that do not match; these are checked below
            wrapped = PeftModel.from_pretrained(model, str(adapter.directory))
            expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
            found = set(load_peft_weights(str(adapter.directory), device="cpu"))
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise _does_not_fit(spec, adapter, " ".join(str(error).split())) from None
    # An adapter of embeddings may come with the embeddings themselves.
    known = expected | {name for name, _ in wrapped.named_parameters(remove_duplicate=False)}
    for keys, problem in ((expected - found, "it lacks"), (found - known, "the model has no place for")):
        if keys:
            raise _does_not_fit(spec, adapter, f"{problem} {len(keys)} of its tensors, such as {min(keys)}")
    if not hasattr(wrapped, "merge_and_unload"):
        kind = read_json(adapter.directory / CONFIG).get("peft_type")
        raise ModelError(
            f"{adapter.name}: adapters of the kind {kind} cannot be merged into weights; use a LoRA adapter."
        )
    _untie(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that the embeddings are no longer tied
        return wrapped.merge_and_unload()


def _untie(wrapped: Any) -> None:
    """Give each layer that an adapter changes weights of its own.

    Merged into a head whose weights are also the embeddings, the adapter would change both.
    """
    parameters = list(wrapped.named_parameters(remove_duplicate=False))
    n_uses = Counter(id(parameter) for _, parameter in parameters)
    for name, parameter in parameters:
        path, _, last = name.rpartition(".")
        if path.endswith(".base_layer") and n_uses[id(parameter)] > 1:
            setattr(wrapped.get_submodule(path), last, nn.Parameter(parameter.clone(), requires_grad=False))


def _does_not_fit(spec: ModelSpec, adapter: Adapter, reason: str) -> ModelError:
    try:
        base = read_json(adapter.directory / CONFIG).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    return ModelError(
        f'{adapter.name}: the adapter does not fit "{spec.name}" ({reason}). Set model.name to the model for which the '
        f"adapter was trained: {base or 'its configuration does not name this model'}."
    )
