"""The tokenizers of published models lose nothing, or are refused."""

import json

import numpy as np
import pytest
import tokenizers

from moe_jax.base.errors import UserError
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop.hugging_face import load, read
from tests.interop import folder as small


def test_the_tokenizer_loses_nothing_and_writes_no_special_token(tmp_path):
    small.write(tmp_path, rows=300)
    config, _, tokenizer = load(tmp_path)
    text = "the tin 123 naïve cafe\u0301 🙂\n\tend<|end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.max() < 260  # 260 and 261 are the special tokens
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = text.removesuffix("<|end|>")
    assert tokenizer.encode(plain).tolist() == theirs.encode(plain, add_special_tokens=False).ids
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocabulary) == (261, 260, 262)
    assert config.vocabulary == 300  # rows that no token uses
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.byte_lengths, tokenizer.byte_lengths)
    assert tokenizer.byte_lengths[260:].tolist() == [0, 0]


def test_without_a_bos_the_eos_opens_a_document(tmp_path):
    small.write(tmp_path, fields={"bos_token_id": None, "eos_token_id": 260})
    tokenizer = read(tmp_path)[2]
    assert (tokenizer.bos, tokenizer.eos) == (260, 260)


TOKENIZERS = {
    "unigram": ({"model": {"type": "Unigram"}}, "no byte-level BPE"),
    "no model": ({"model": None}, "no byte-level BPE"),
    "metaspace": ({"pre_tokenizer": {"type": "Metaspace"}}, "no byte-level BPE"),
    "prefix space": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        "no byte-level BPE",
    ),
    "lower case in a sequence": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
        "changes the text",
    ),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "changes the text"),
    "removes": (
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"String": "x"}, "behavior": "Removed"},
                    {"type": "ByteLevel", "add_prefix_space": False},
                ],
            }
        },
        "no byte-level BPE",
    ),
    "added": ({"added_tokens": [{"content": "x"}]}, "an added token has no id"),
    "huge id": ({"added_tokens": [{"id": 2**30, "content": "x"}]}, "for 262 rows"),
    "pattern": ({"pre_tokenizer": {"type": "Split"}}, "no byte-level BPE"),
}


NFC = {"type": "NFC"}


@pytest.mark.parametrize(
    "normaliser",
    [NFC, *({"type": "Sequence", "normalizers": steps} for steps in ([], [NFC]))],
    ids=["NFC", "an empty sequence, as DeepSeek's", "a sequence"],
)
def test_nfc_is_left_out_so_that_nothing_is_lost(tmp_path, normaliser):
    small.write(tmp_path)
    small.change_json(tmp_path / "tokenizer.json", {"normalizer": normaliser})
    tokenizer = read(tmp_path)[2]
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "cafe\u0301"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_lose_text_are_refused(tmp_path, name):
    change, message = TOKENIZERS[name]
    small.write(tmp_path)
    small.change_json(tmp_path / "tokenizer.json", change)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    "vocab",
    [{"a": 0}, {"a": "b"}, ["a"], {"a": -1}, None],
    ids=["one byte", "no number", "list", "negative", "none"],
)
def test_vocabularies_that_are_none(tmp_path, vocab):
    small.write(tmp_path)
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"] = vocab
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read(tmp_path)
