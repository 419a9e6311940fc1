"""tokenizer.json and tokenizer_config.json for a tokenizer of ours."""

from typing import Any

from moe_jax.data.tokenizer import Tokenizer, byte_characters

BOS = "<|bos|>"
EOS = "<|eos|>"


def tokenizer_files(tokenizer: Tokenizer, length: int) -> dict[str, dict[str, Any]]:
    """The two files by name. `length`: the context that the second one names.

    Ids are the same as ours. A text is opened by bos, as documents are in training.
    """
    model = tokenizer.model_fields() or _of_bytes()
    vocab = model["model"]["vocab"]
    contents = {i: token for token, i in vocab.items()}
    special = {i: contents[i] for i in tokenizer.silent if i in contents}
    # Also in the model's own vocabulary: the library numbers added tokens without a gap.
    for i, wanted in ((tokenizer.eos, EOS), (tokenizer.bos, BOS)):
        special.setdefault(i, contents.get(i) or _unused(wanted, vocab))
        vocab[special[i]] = i
    bos = special[tokenizer.bos]
    fields = model | {
        "added_tokens": [_added(i, content) for i, content in sorted(special.items())],
        "post_processor": _opened_by(bos, tokenizer.bos),
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": special[tokenizer.eos],
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": fields, "tokenizer_config.json": settings}


def _of_bytes() -> dict[str, Any]:
    """Single bytes as a byte-level BPE without merges."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
        },
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
        },
        "model": {"type": "BPE", "vocab": byte_characters(), "merges": []},
    }  # fmt: skip


def _unused(content: str, vocab: dict[str, int]) -> str:
    """`content`, made longer until no token of the vocabulary is called so."""
    while content in vocab:
        content = f"<{content}>"
    return content


def _added(i: int, content: str) -> dict[str, Any]:
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **switches, "special": True}


def _opened_by(token: str, i: int) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            begin,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }
