import gzip
import lzma
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.base.errors import UserError
from moe_jax.data import baselines
from moe_jax.data.baselines import (
    gzip_bits_per_byte,
    ngram_bits_per_byte,
    ngram_probabilities,
    xz_bits_per_byte,
)

FEW_BYTES = st.lists(st.sampled_from([0, 97, 98, 255]), min_size=1, max_size=40).map(bytes)


def by_dictionary(training: bytes, held_out: bytes, order: int) -> list[float]:
    """Witten-Bell interpolation as the formula says it."""
    counts = defaultdict(Counter)
    padded = bytes(order - 1) + training
    for i in range(order - 1, len(padded)):
        for n in range(order):
            counts[padded[i - n : i]][padded[i]] += 1

    def probability(history: bytes, byte: int) -> float:
        lower = probability(history[1:], byte) if history else 1 / 256
        seen = counts[history]
        total = seen.total() + len(seen)
        return (seen[byte] + len(seen) * lower) / total if total else lower

    padded = bytes(order - 1) + held_out
    positions = range(order - 1, len(padded))
    return [probability(padded[i - order + 1 : i], padded[i]) for i in positions]


@settings(deadline=None)
@given(FEW_BYTES, FEW_BYTES, st.integers(1, 7))
def test_ngram_is_the_formula(training: bytes, held_out: bytes, order: int):
    expected = by_dictionary(training, held_out, order)
    np.testing.assert_allclose(ngram_probabilities(training, held_out, order), expected, rtol=1e-12)


@settings(deadline=None, max_examples=20)
@given(FEW_BYTES, FEW_BYTES)
def test_probabilities_sum_to_one(training: bytes, history: bytes):
    last = [ngram_probabilities(training, history + bytes([c]), 5)[-1] for c in range(256)]
    assert sum(last) == pytest.approx(1, abs=1e-12)


def test_chunks_do_not_matter_and_text_is_capped(monkeypatch):
    whole = ngram_bits_per_byte([b"abracadabra" * 9], b"cadabra")
    assert ngram_bits_per_byte([b"abra", b"", b"cadabra" + b"abracadabra" * 8], b"cadabra") == whole
    monkeypatch.setattr(baselines, "TRAINING_BYTES", 99)
    assert ngram_bits_per_byte(iter([b"abracadabra" * 9, b"x"]), b"cadabra") == whole


def test_more_context_helps():
    text = b"the cat sat on the mat. " * 50
    bits = [ngram_bits_per_byte([text], b"the cat sat on the mat. ", n) for n in (1, 2, 3, 5)]
    assert bits == sorted(bits, reverse=True)


def test_counting_in_pieces_changes_nothing(monkeypatch):
    training = bytes(range(97, 105)) * 9 + b"abcabca"
    held_out = b"abcdefgabca"
    whole = ngram_probabilities(training, held_out, 5)
    for size in (1, 3, 10):
        monkeypatch.setattr(baselines, "PIECE", size)
        np.testing.assert_array_equal(ngram_probabilities(training, held_out, 5), whole)


@pytest.mark.parametrize("piece", [7, 600, 100_000])
def test_compressors(monkeypatch, piece):
    monkeypatch.setattr(baselines, "COMPRESSED", piece)
    data = b"some text, and some text again" * 20
    read = []
    assert gzip_bits_per_byte(data, read.append) == 8 * len(gzip.compress(data, 9)) / len(data)
    assert xz_bits_per_byte(data, read.append) == 8 * len(lzma.compress(data, preset=9)) / len(data)
    ngram_bits_per_byte([data], data, on_bytes=read.append)
    assert sum(read) == 3 * len(data)


def test_no_bytes():
    for function in (gzip_bits_per_byte, xz_bits_per_byte):
        with pytest.raises(UserError, match="no held-out bytes"):
            function(b"")
    with pytest.raises(UserError, match="no held-out bytes"):
        ngram_bits_per_byte([b"a"], b"")
    with pytest.raises(UserError, match="no training bytes"):
        ngram_bits_per_byte([], b"a")


@pytest.mark.parametrize("order", [0, 8])
def test_impossible_order(order: int):
    with pytest.raises(UserError, match=f"order is {order}"):
        ngram_bits_per_byte([b"a"], b"a", order)
