"""The tokenizer, and the text of single tokens."""

from pathlib import Path
from typing import Any

from saerelay.errors import ModelError
from saerelay.lm.source import _NO_TOKENIZER, _explained, _read_config, _source
from saerelay.planning.recipe import ModelSpec


def load_tokenizer(spec: ModelSpec) -> Any:
    """Load the model's fast tokenizer.

    >>> tokenizer = load_tokenizer(ModelSpec())
    >>> tokenizer.decode(tokenizer.encode("def f(x):"))
    'def f(x):'

    Raises ModelError if the model has none, or only a slow one.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with _explained(spec):
        source, options = _source(spec)
        file = Path(source) / "tokenizer.json"
        if file.is_file() and not file.with_name("tokenizer_config.json").is_file():
            # AutoTokenizer would add its family's default tokens, with ids the model does not have
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
            config = _read_config(spec).get_text_config()
            for role in ("bos", "eos"):
                i = _first_id(getattr(config, f"{role}_token_id"))
                setattr(tokenizer, f"{role}_token", None if i is None else tokenizer.convert_ids_to_tokens(i))
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder) or not tokenizer.is_fast:
        # without files AutoTokenizer makes an empty one
        raise ModelError(f'"{spec.name}" {_NO_TOKENIZER}')
    return tokenizer


def token_text(tokenizer: Any, token: int) -> str:
    """The text that one token stands for, "<7>" where the tokenizer has no token 7.

    >>> tokenizer = load_tokenizer(ModelSpec())
    >>> [token_text(tokenizer, token) for token in (*tokenizer.encode("if x:"), 10**6)]
    ['if', ' x', ':', '<1000000>']
    """
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"<{token}>"
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text  # SentencePiece drops the first


def _first_id(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids
