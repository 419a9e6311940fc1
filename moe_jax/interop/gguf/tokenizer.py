"""The byte-level BPE tokenizer inside of a GGUF file."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moe_jax.base.errors import UserError
from moe_jax.data.tokenizer import Tokenizer

# Values of tokenizer.ggml.token_type (llama.cpp, enum llama_token_type).
NORMAL = 1
CONTROL = 3
UNUSED = 5


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {"gpt-2": _gpt2, "smollm": _smollm}
"""How text is split before merging, by tokenizer.ggml.pre. A file has only the name; llama.cpp has
the rules in its source."""


def read_tokenizer(fields: dict[str, Any], vocabulary: int) -> Tokenizer:
    """Our Tokenizer with the file's tokens and merges.

    UserError: another kind of tokenizer, or lists that do not fit the vocabulary or each other.
    """
    name = fields.get("tokenizer.ggml.model")
    pre = fields.get("tokenizer.ggml.pre")
    if name != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"tokenizer {name!r} with pre-tokenizer {pre!r} is not supported: use a model with "
            f"gpt2 and one of {', '.join(PRE_TOKENIZERS)}"
        )
    tokens, merges = _checked_lists(fields, vocabulary)
    try:
        model = tokenizers.Tokenizer(
            models.BPE({token: i for i, token in enumerate(tokens)}, merges)  # pyright: ignore
        )
        model.pre_tokenizer = PRE_TOKENIZERS[pre]()  # pyright: ignore
        model.decoder = decoders.ByteLevel()  # pyright: ignore
        textless = _textless(fields, vocabulary)
        ends = [_special(fields, key, vocabulary) for key in ("bos", "eos")]
        return Tokenizer(f"bpe:{vocabulary}", vocabulary, model, *ends, silent=textless)
    except UserError:
        raise
    except Exception as error:  # the library's own errors have no narrower type
        raise UserError(f"the tokenizer's tokens and merges do not fit: {error!r}") from error


def _checked_lists(
    fields: dict[str, Any], vocabulary: int
) -> tuple[list[str], list[tuple[str, str]]]:
    tokens = fields.get("tokenizer.ggml.tokens")
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise UserError("the tokenizer has no list of tokens or merges")
    if len(tokens) != vocabulary or len(set(tokens)) != vocabulary:
        raise UserError(
            f"{len(set(tokens))} different tokens for {vocabulary} rows of the embedding"
        )
    pairs = []
    for merge in merges:
        first, _, second = merge.partition(" ")
        if not second or " " in second:
            raise UserError(f"the tokenizer's merge {merge!r} is not two tokens")
        pairs.append((first, second))
    return tokens, pairs


def _textless(fields: dict[str, Any], vocabulary: int) -> list[int]:
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
