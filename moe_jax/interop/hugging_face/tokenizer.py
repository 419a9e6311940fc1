"""The byte-level BPE tokenizer in a tokenizer.json."""

import json
from typing import Any

import tokenizers

from moe_jax.base.errors import UserError, brief, quote
from moe_jax.data.tokenizer import Tokenizer

LOSSLESS_STEPS = ("Sequence", "Split", "Digits", "ByteLevel")
"""Kinds of pre-tokenizer that drop no byte and add none."""
PROBE = "  Näïve\tcafé — 日本語 🙂\r\n\n\tdef f(x): return x + 1234567  # 'tis\u00a0x "
"""A tokenizer that loses any text usually loses a part of this one."""
MOST_IDS = 1 << 31


def read_tokenizer(fields: dict[str, Any], rows: int, bos: Any, eos: Any) -> Tokenizer:
    """Our Tokenizer with the file's tokens, merges and pre-tokenizer.

    `rows` of the embedding may be more than there are tokens. Without a bos, eos opens documents,
    too. Our tokenizers lose nothing and never write a special token for a text. So the file's
    normaliser (Unicode NFC), its special tokens and its template are left out. (Bytes that a
    vocabulary lacks are lost all the same, such as SmolLM2's for some control characters.)

    UserError: another kind of tokenizer, or parts that do not fit each other or the embedding.
    """
    model = fields.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not _is_byte_level(fields):
        raise UserError("tokenizer.json is no byte-level BPE: use a model that has one")
    if not _is_nfc(fields.get("normalizer")):
        raise UserError("tokenizer.json changes the text (its normalizer): only NFC is supported")
    special = _special_ids(fields)
    vocabulary = _vocabulary(model, special, rows)
    if bos is not None:
        _require_token("bos", bos, vocabulary)
    _require_token("eos", eos, vocabulary)
    tokens = {token: i for token, i in model["vocab"].items() if i not in special}
    try:
        inner = tokenizers.Tokenizer.from_str(json.dumps(_plain(fields, model, tokens)))
        opening = eos if bos is None else bos
        tokenizer = Tokenizer(f"bpe:{vocabulary}", vocabulary, inner, opening, eos)
        same = tokenizer.decode(tokenizer.encode(PROBE)) == PROBE
    except UserError:
        raise
    except Exception as error:  # the library's own errors have no narrower type
        raise UserError(f"tokenizer.json cannot be used: {brief(error)}") from error
    if not same:
        raise UserError("tokenizer.json loses parts of a text: use a model with another tokenizer")
    return tokenizer


def _plain(fields: dict[str, Any], model: dict[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
    """tokenizer.json with only the model and its pre-tokenizer."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": fields["pre_tokenizer"],
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
        },
        # Dropout, a training-time option, would make encoding random.
        "model": {**model, "vocab": vocab, "dropout": None, "unk_token": None},
    }  # fmt: skip


def _is_byte_level(fields: dict[str, Any]) -> bool:
    """Whether the text is split into pieces and these are written as bytes, with nothing added."""
    first: Any = fields.get("pre_tokenizer")
    steps: Any = first.get("pretokenizers", [first]) if isinstance(first, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return False
    kinds = [step.get("type") for step in steps]
    lossy = any(s.get("behavior") == "Removed" or s.get("add_prefix_space") for s in steps)
    return not lossy and "ByteLevel" in kinds and all(kind in LOSSLESS_STEPS for kind in kinds)


def _is_nfc(normaliser: Any) -> bool:
    """Whether a normaliser is Unicode NFC or none. DeepSeek's files have an empty sequence."""
    if isinstance(normaliser, dict) and normaliser.get("type") == "Sequence":
        steps = normaliser.get("normalizers")
        return isinstance(steps, list) and all(step == {"type": "NFC"} for step in steps)
    return normaliser is None or normaliser == {"type": "NFC"}


def _special_ids(fields: dict[str, Any]) -> set[int]:
    """Ids of special tokens, which stand for no text."""
    entries = fields.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError("tokenizer.json: added_tokens is no list of objects")
    ids = [entry.get("id") for entry in entries]
    if not all(_is_id(i, MOST_IDS) for i in ids):
        raise UserError("tokenizer.json: an added token has no id")
    return set(ids)


def _vocabulary(model: dict[str, Any], special: set[int], rows: int) -> int:
    """Number of ids. UserError: they exceed the embedding's rows, or are not different."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(_is_id(i, MOST_IDS) for i in vocab.values()):
        raise UserError("tokenizer.json: the model's vocab does not map tokens to ids")
    count = max({*vocab.values(), *special}, default=-1) + 1
    if count > rows or len(set(vocab.values())) != len(vocab):
        raise UserError(
            f"tokenizer.json has {len(vocab)} tokens with ids up to {count - 1} for {rows} rows of "
            "the embedding"
        )
    return count


def _require_token(name: str, value: Any, vocabulary: int) -> None:
    if not _is_id(value, vocabulary):
        raise UserError(f"{name}_token_id is {quote(value)}: it must be one of {vocabulary} tokens")


def _is_id(value: Any, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below
