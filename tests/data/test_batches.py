import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.base.errors import UserError
from moe_jax.data.batches import shifted_targets, train_batches, validation_batches
from moe_jax.data.tokenizer import make_tokenizer
from moe_jax.data.tokens import TokenArray
from tests.data.small_corpus import Prepare

BYTES = make_tokenizer("bytes", ())


def array_of(*texts: str) -> TokenArray:
    documents = [[BYTES.bos, *BYTES.encode(text).tolist(), BYTES.eos] for text in texts]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    size = sum(len(text.encode()) for text in texts)
    return TokenArray(np.concatenate(documents).astype(np.uint16), starts, size, BYTES)


def counting(tokens: int) -> TokenArray:
    return TokenArray(np.arange(tokens, dtype=np.uint16), np.array([0]), 0, BYTES)


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(iterator, count))


def test_a_window_by_hand():
    array = array_of("ab", "", "c")  # bos a b eos | bos eos | bos c eos
    (batch,) = validation_batches(array, length=5, batch=2, ahead=1)
    a, b, c = b"abc"
    bos = BYTES.bos
    eos = BYTES.eos
    assert batch["tokens"].tolist() == [
        [bos, a, b, eos, bos, eos, bos],
        [eos, bos, c, eos, 0, 0, 0],
    ]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 2, 2, 3], [1, 2, 2, 2, 0, 0, 0]]
    assert batch["tokens"].dtype == batch["segments"].dtype == np.int32


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text("aé\n", max_size=9), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 2),
)
def test_every_byte_is_predicted_once(texts: list[str], length: int, batch: int, ahead: int):
    array = array_of(*texts)
    predicted = 0
    ended = 0
    for windows in validation_batches(array, length, batch, ahead):
        assert windows["tokens"].shape == (batch, length + 1 + ahead)
        targets, mask = shifted_targets(windows["tokens"], windows["segments"], length, 1)
        predicted += (BYTES.byte_lengths[targets] * mask).sum()
        ended += ((targets == BYTES.eos) & mask).sum()
        assert not ((targets == BYTES.bos) & mask).any()
    assert predicted == array.bytes
    assert ended == len(texts)


def test_every_byte_of_a_corpus_is_predicted_once(prepared: Prepare):
    array = prepared().validation
    lengths = array.tokenizer.byte_lengths
    total = 0
    for batch in validation_batches(array, 16, 4):
        targets, mask = shifted_targets(batch["tokens"], batch["segments"], 16, 1)
        total += (lengths[targets] * mask).sum()
    assert total == array.bytes


@pytest.mark.parametrize("numbers", [np, jnp])
def test_shifted_targets(numbers):
    tokens = numbers.array([[5, 6, 7, 8, 9, 0]])
    segments = numbers.array([[1, 1, 1, 2, 2, 0]])
    targets, mask = shifted_targets(tokens, segments, 4, 1)
    assert targets.tolist() == [[6, 7, 8, 9]]
    assert mask.tolist() == [[True, True, False, True]]
    targets, mask = shifted_targets(tokens, segments, 4, 2)
    assert targets.tolist() == [[7, 8, 9, 0]]
    assert mask.tolist() == [[True, False, False, False]]


def test_padding_is_never_a_target():
    _, mask = shifted_targets(np.zeros((1, 4)), np.zeros((1, 4)), 3, 1)
    assert not mask.any()


def test_an_epoch_has_every_window_once_and_epochs_differ():
    windows = 12
    batches = take(train_batches(counting(10 * windows + 1), 10, 4, seed=3), 6)
    first = np.concatenate([batch["tokens"][:, 0] for batch in batches[:3]])
    second = np.concatenate([batch["tokens"][:, 0] for batch in batches[3:]])
    assert sorted(first) == sorted(second) == list(range(0, 120, 10))
    assert list(first) != list(second)
    assert list(first) != sorted(first)


def test_seed_decides_the_order():
    def order(seed: int) -> list:
        batches = take(train_batches(counting(500), 10, 8, seed), 12)
        return np.concatenate([batch["tokens"][:, 0] for batch in batches]).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(2)[:49] != order(1)[49:98]  # nor does one seed go through its neighbour's orders
    assert order(2**32 - 1) != order(0)


@pytest.mark.parametrize("consumed", [0, 1, 5, 13])
def test_resume_is_exact(consumed: int):
    def fresh():
        return train_batches(counting(205), 20, 4, seed=7, ahead=2)

    running = fresh()
    take(running, consumed)
    state = json.loads(json.dumps(running.get_state()))
    resumed = fresh()
    next(resumed)  # whatever it has read ahead must not show
    resumed.set_state(state)
    for expected, actual in zip(take(running, 8), take(resumed, 8), strict=True):
        np.testing.assert_array_equal(actual["tokens"], expected["tokens"])
        np.testing.assert_array_equal(actual["segments"], expected["segments"])
    assert len(json.dumps(state)) < 100


@pytest.mark.parametrize("make", [train_batches, validation_batches])
def test_shares_make_up_the_global_batch(make):
    """Equal parts, as of 3 processes, and rows that are not neighbours or are read twice."""
    seed = {"seed": 5} if make is train_batches else {}
    whole = take(make(counting(333), 10, 6, **seed), 5)
    for shares in ([[0, 1], [2, 3], [4, 5]], [[0, 3, 5], [1, 3, 4]]):
        for rows in shares:
            part = take(make(counting(333), 10, 6, rows=rows, **seed), 5)
            for expected, actual in zip(whole, part, strict=True):
                np.testing.assert_array_equal(actual["tokens"], expected["tokens"][rows])
                np.testing.assert_array_equal(actual["segments"], expected["segments"][rows])


def test_the_position_is_the_same_for_every_share():
    """So a run goes on with another number of processes."""
    halves = [train_batches(counting(333), 10, 4, seed=2, rows=rows) for rows in ([0, 1], [2, 3])]
    for half in halves:
        take(half, 9)
    first, second = (half.get_state() for half in halves)
    assert first == second
    whole = train_batches(counting(333), 10, 4, seed=2)
    whole.set_state(first)
    expected = next(whole)["tokens"]
    rows = np.concatenate([next(half)["tokens"] for half in halves])
    np.testing.assert_array_equal(rows, expected)


def test_too_little_text_to_train_on():
    train_batches(counting(13), 10, 2, seed=0, ahead=2)
    with pytest.raises(UserError, match=r"12 tokens, fewer than the 13 .*data\.length=10"):
        train_batches(counting(12), 10, 2, seed=0, ahead=2)


def test_one_window_is_an_epoch():
    batches = take(train_batches(counting(11), 10, 2, seed=0), 2)
    assert all((batch["tokens"] == np.arange(11)).all() for batch in batches)
