"""The byte-level BPE tokenizer inside a GGUF file."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moe_jax.base.errors import UserError
from moe_jax.data.tokenizer import Tokenizer

NORMAL, CONTROL, UNUSED = 1, 3, 5
"""tokenizer.ggml.token_type."""


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE: dict[str, Callable[[], Any]] = {"gpt-2": _gpt2, "smollm": _smollm}
"""How text is cut before merging, by tokenizer.ggml.pre."""


def read_tokenizer(fields: dict[str, Any], vocabulary: int) -> Tokenizer:
    """Our Tokenizer with the file's tokens and merges. UserError: another kind of tokenizer, or
    lists that do not fit the vocabulary or each other."""
    name, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if name != "gpt2" or pre not in PRE:
        raise UserError(
            f"tokenizer {name!r} with pre-tokenizer {pre!r} is not supported: use a model with "
            f"gpt2 and one of {', '.join(PRE)}"
        )
    tokens, merges = (fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise UserError("the tokenizer has no list of tokens or merges")
    if len(tokens) != vocabulary or len(set(tokens)) != vocabulary:
        raise UserError(
            f"{len(set(tokens))} different tokens for {vocabulary} rows of the embedding"
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    wrong = next((merge for merge in merges if merge.count(" ") != 1), None)
    if wrong is not None:
        raise UserError(f"the tokenizer's merge {wrong!r} is not two tokens")
    try:
        model = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))  # pyright: ignore
        model.pre_tokenizer = PRE[pre]()  # pyright: ignore
        model.decoder = decoders.ByteLevel()  # pyright: ignore
        silent = _silent(fields, vocabulary)
        ends = [_special(fields, key, vocabulary) for key in ("bos", "eos")]
        return Tokenizer(f"bpe:{vocabulary}", vocabulary, model, *ends, silent=silent)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the tokenizer's tokens and merges do not fit: {error!r}") from error


def _silent(fields: dict[str, Any], vocabulary: int) -> list[int]:
    """Ids that stand for no text."""
    types = fields.get("tokenizer.ggml.token_type", np.full(vocabulary, NORMAL))
    if not isinstance(types, np.ndarray) or len(types) != vocabulary:
        raise UserError("tokenizer.ggml.token_type does not have one entry a token")
    return np.flatnonzero(np.isin(types, (CONTROL, UNUSED))).tolist()


def _special(fields: dict[str, Any], name: str, vocabulary: int) -> int:
    value = fields.get(f"tokenizer.ggml.{name}_token_id")
    if not isinstance(value, int) or not 0 <= value < vocabulary:
        raise UserError(f"tokenizer.ggml.{name}_token_id is {value!r}: it must be a token")
    return value
