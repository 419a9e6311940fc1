"""The byte-level BPE tokenizer inside of a GGUF file."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moe_jax.base.errors import UserError, brief, quote
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop.fields import Fields

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
    own = Fields(fields, prefix="tokenizer.ggml.")
    name = own.text("model")
    pre = own.text("pre")
    if name != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"tokenizer {quote(name)} with pre-tokenizer {quote(pre)} is not supported: use a "
            f"model with gpt2 and one of {', '.join(PRE_TOKENIZERS)}"
        )
    tokens, merges = _checked_lists(own, vocabulary)
    textless = _textless(own, vocabulary)
    ends = [_special(own, key, vocabulary) for key in ("bos", "eos")]
    try:
        model = tokenizers.Tokenizer(
            models.BPE({token: i for i, token in enumerate(tokens)}, merges)  # pyright: ignore
        )
        model.pre_tokenizer = PRE_TOKENIZERS[pre]()  # pyright: ignore
        model.decoder = decoders.ByteLevel()  # pyright: ignore
        return Tokenizer(f"bpe:{vocabulary}", vocabulary, model, *ends, silent=textless)
    except UserError:
        raise
    except Exception as error:  # the library's own errors have no narrower type
        raise UserError(f"the tokenizer's tokens and merges do not fit: {brief(error)}") from error


def _checked_lists(fields: Fields, vocabulary: int) -> tuple[list[str], list[tuple[str, str]]]:
    tokens = fields.texts("tokens")
    if len(tokens) != vocabulary or len(set(tokens)) != vocabulary:
        raise UserError(
            f"{len(set(tokens))} different tokens for {vocabulary} rows of the embedding"
        )
    pairs = []
    for merge in fields.texts("merges"):
        first, _, second = merge.partition(" ")
        if not second or " " in second:
            raise UserError(f"the tokenizer's merge {quote(merge)} is not two tokens")
        pairs.append((first, second))
    return tokens, pairs


def _textless(fields: Fields, vocabulary: int) -> list[int]:
    """Ids that stand for no text."""
    types = fields.get("token_type", np.full(vocabulary, NORMAL))
    whole = isinstance(types, np.ndarray) and types.dtype.kind in "iu"
    if not whole or len(types) != vocabulary:
        raise UserError("tokenizer.ggml.token_type does not have one whole number a token")
    return np.flatnonzero(np.isin(types, (CONTROL, UNUSED))).tolist()


def _special(fields: Fields, name: str, vocabulary: int) -> int:
    value = fields.get(f"{name}_token_id")
    # type() and not isinstance(), because True is an int.
    if type(value) is not int or not 0 <= value < vocabulary:
        raise UserError(f"tokenizer.ggml.{name}_token_id is {quote(value)}: it must be a token")
    return value
