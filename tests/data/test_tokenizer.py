import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.base.errors import UserError
from moe_jax.data.tokenizer import LONGEST_PIECE, Tokenizer, make_tokenizer
from tests.data.small_corpus import TEXTS, quiet

KINDS = {
    kind: make_tokenizer(kind, TEXTS.values(), quiet) for kind in ("bytes", "bpe:320", "bpe:9000")
}
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
LIKE_CODE = st.text(" \n\r\tab1'=_é", max_size=40)

each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@settings(deadline=None)
@given(text=UNICODE | LIKE_CODE)
def test_round_trip_and_byte_lengths(kind: str, text: str):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & {tokenizer.bos, tokenizer.eos}


@each_kind
def test_vocabulary_is_what_was_asked(kind: str):
    tokenizer = KINDS[kind]
    assert tokenizer.kind == kind
    assert tokenizer.vocabulary == (258 if kind == "bytes" else int(kind[4:]))
    assert (tokenizer.bos, tokenizer.eos) == (tokenizer.vocabulary - 2, tokenizer.vocabulary - 1)
    assert tokenizer.byte_lengths.shape == (tokenizer.vocabulary,)
    assert tokenizer.byte_lengths[[tokenizer.bos, tokenizer.eos]].tolist() == [0, 0]


@each_kind
def test_json_round_trip(kind: str):
    tokenizer = KINDS[kind]
    copy = Tokenizer.from_json(tokenizer.to_json())
    assert copy.fingerprint == tokenizer.fingerprint
    for text in TEXTS.values():
        assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("text", ["", "{}", "3", json.dumps({"kind": "bytes"})])
def test_broken_json(text: str):
    with pytest.raises(UserError, match="no stored tokenizer"):
        Tokenizer.from_json(text)


@each_kind
def test_batch_is_the_same_as_one_by_one(kind: str):
    texts = [*TEXTS.values()]
    batch = KINDS[kind].encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [KINDS[kind].encode(t).tolist() for t in texts]


@each_kind
def test_decode_drops_what_is_no_text(kind: str):
    tokenizer = KINDS[kind]
    ids = [tokenizer.bos, *tokenizer.encode("hi"), tokenizer.eos, tokenizer.vocabulary, -1]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode([]) == ""


def test_decode_replaces_broken_characters():
    tokenizer = KINDS["bytes"]
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_training_is_deterministic():
    again = make_tokenizer("bpe:320", TEXTS.values(), quiet)
    assert again.fingerprint == KINDS["bpe:320"].fingerprint


def test_text_that_looks_special_is_text():
    tokenizer = KINDS["bpe:320"]
    assert tokenizer.decode(tokenizer.encode("<bos><|endoftext|></s>")) == "<bos><|endoftext|></s>"


def test_a_line_break_and_its_indentation_are_one_token():
    tokenizer = KINDS["bpe:320"]
    assert "\n    " in [tokenizer.decode([i]) for i in tokenizer.encode("x:\n    return")]


def test_numbers_are_cut_into_groups_of_three():
    tokenizer = make_tokenizer("bpe:400", ["1234567890 " * 50], quiet)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["123", "456", "7"]


def test_a_word_without_an_end_is_learned_in_time_and_lost_nowhere():
    """Uncut, the time of training grows with the square of the word."""
    letters = np.random.default_rng(0).choice(list("abcdefghij"), 200_000)
    word = "".join(letters)
    began = time.process_time()
    tokenizer = make_tokenizer("bpe:600", [word, "é" * 99_999, " " * 99_999], quiet)
    ids = tokenizer.encode(word)
    # 0.4 s, and 10 s uncut.
    assert time.process_time() - began < 4
    assert tokenizer.decode(ids) == word
    assert len(ids) < 0.6 * len(word)


def test_the_cut_is_no_part_of_the_tokenizer():
    tokenizer = make_tokenizer("bpe:300", ["ab" * 3000], quiet)
    assert f"{{1,{LONGEST_PIECE}}}" not in tokenizer.to_json()
    assert tokenizer.decode(tokenizer.encode("ab" * 3000)) == "ab" * 3000
