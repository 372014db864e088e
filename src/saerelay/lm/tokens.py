"""The tokenizer, the text of single tokens, and token ids that a caller gives."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerelay.errors import DataError, ModelError
from saerelay.lm.source import TOKENIZER_REMEDY, loading, locate, read_config, without_collection
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import ModelSpec


def has_vocabulary(tokenizer: Any) -> bool:
    """Whether a tokenizer knows more than special tokens; AutoTokenizer makes one up if there are no files."""
    return len(tokenizer) > len(tokenizer.added_tokens_decoder)


@without_collection()
def load_tokenizer(spec: ModelSpec) -> Any:
    """Load the model's fast tokenizer.

    >>> tokenizer = load_tokenizer(ModelSpec())
    >>> tokenizer.decode(tokenizer.encode("def f(x):"))
    'def f(x):'

    Raises ModelError if the model has none, or only a slow one, or if its files are damaged.
    """
    from transformers import AutoTokenizer

    with loading(spec):
        location = locate(spec)
        file = Path(location.name_or_path) / "tokenizer.json"
        try:
            if file.is_file() and not file.with_name("tokenizer_config.json").is_file():
                tokenizer = _bare_tokenizer(spec, file)
            else:
                tokenizer = AutoTokenizer.from_pretrained(location.name_or_path, **location.options)
        except Exception as error:
            if type(error) is not Exception:
                raise
            # This is all that the package `tokenizers` raises for a file that it cannot read.
            raise ModelError(f'"{spec.name}": its tokenizer.json cannot be read ({error}); restore the file.') from None

    if not has_vocabulary(tokenizer) or not tokenizer.is_fast:
        raise ModelError(f'"{spec.name}" has no fast tokenizer. {TOKENIZER_REMEDY}')
    return tokenizer


def _bare_tokenizer(spec: ModelSpec, file: Path) -> Any:
    """The tokenizer of a tokenizer.json alone, with BOS and EOS from the configuration.

    AutoTokenizer would add the default tokens of its family, with ids that the model does not
    have.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    config = read_config(spec).get_text_config()
    for role in ("bos", "eos"):
        token_id = first_id(getattr(config, f"{role}_token_id"))
        token = None if token_id is None else tokenizer.convert_ids_to_tokens(token_id)
        setattr(tokenizer, f"{role}_token", token)
    return tokenizer


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token; "<7>" if the tokenizer has no token 7.

    >>> tokenizer = load_tokenizer(ModelSpec())
    >>> [token_text(tokenizer, token) for token in (*tokenizer.encode("if x:"), 10**6)]
    ['if', ' x', ':', '<1000000>']
    """
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"<{token}>"
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)

    # SentencePiece writes a leading space as "▁", and omits it when it decodes the first token.
    if piece.startswith("▁") and not text.startswith(" "):
        return f" {text}"
    return text


def first_id(ids: int | list[int] | None) -> int | None:
    """A configuration's BOS or EOS id; of several, the first."""
    if isinstance(ids, list):
        return ids[0]
    return ids


def special_ids(tokenizer: Any) -> list[int]:
    """The ids of special tokens that stand for no text; the token for unknown text is not one of them.

    >>> special_ids(load_tokenizer(ModelSpec()))
    [0]
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    return [token for token in tokenizer.all_special_ids if token != unknown]


def checked_ids(tokens: Tensor | np.ndarray, facts: ModelFacts) -> Tensor:
    """Return token ids as a tensor of a type that a model can look up; DataError if they are not ids of this model."""
    if isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu":  # such as those of `Suite.tokens`
        tokens = torch.from_numpy(tokens.astype(np.int64))
    if isinstance(tokens, Tensor) and tokens.dtype in (torch.uint16, torch.uint32, torch.uint64):
        tokens = tokens.long()
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        given = f"shape {tuple(tokens.shape)}, {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens)
        raise DataError(f"expected token ids as an integer tensor (sequences, positions), found {given}")
    if tokens.is_cpu and tokens.numel():  # checking ids on a GPU would make the host wait
        lowest, highest = (int(end) for end in tokens.aminmax())
        n_known = facts.tokens.vocab_size
        if lowest < 0 or highest >= n_known:
            raise DataError(
                f"the token ids range from {lowest} to {highest}, but {facts.name} knows only 0 to {n_known - 1}; use "
                "the model's own tokenizer"
            )
    return tokens
