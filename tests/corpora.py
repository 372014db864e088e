"""What tests of corpora share: documents that can be told apart, and what is in a corpus of them."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saerelay.data.corpus import SPLITS, Corpus
from saerelay.errors import DataError
from saerelay.planning.facts import ModelFacts, TokenFacts

MakeCorpus = Callable[..., Corpus]
"""The fixture `make_corpus`."""

BOS, EOS = 1, 2
ALL_THERE_IS = 10**6
"""More sequences than any of these corpora has."""
FACTS = ModelFacts(
    name="demo",
    revision="",
    family="gpt_neox",
    dtype="float32",
    device="cpu",
    n_layers=8,
    d_model=192,
    d_attn_z=192,
    tokens=TokenFacts(
        vocab_size=4096,
        max_context=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ),
    has_lm_head=True,
    layer_params=1,
    model_params=8,
)


def texts(n: int, words: int = 40) -> list[str]:
    """Documents of which every piece tells the document."""
    return [f"m{i}x " * words for i in range(n)]


def write_jsonl(path: Path, documents: list[Any], key: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(documents)))
    return path


def save_tokens(path: Path, array: Any, dtype: Any = np.uint16) -> str:
    np.save(path, np.asarray(array, dtype))
    return str(path)


def ids_of(rows: np.ndarray, prepend_bos: bool = True) -> list[int]:
    """The documents' ids in a split, with the sequences joined again."""
    return rows[:, int(prepend_bos) :].ravel().tolist()


def documents_of(rows: np.ndarray) -> list[list[int]]:
    """The documents in a split; the last may be cut."""
    return [list(group) for is_eos, group in itertools.groupby(ids_of(rows), lambda i: i == EOS) if not is_eos]


def contents(corpus: Corpus) -> bytes:
    return b"".join(getattr(corpus, split).tobytes() for split in SPLITS)


def message(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as info:
        call()
    assert info.value.__cause__ is None and (info.value.__suppress_context__ or info.value.__context__ is None)
    return str(info.value)
