"""The teacher's cache: what it holds, how it survives, how it is read."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.data.batches import Windows, train_batches
from moe_jax.data.tokenizer import make_tokenizer
from moe_jax.data.tokens import TokenArray
from moe_jax.distill import losses
from moe_jax.distill.cache import CacheConfig, build_cache
from moe_jax.distill.chunked import LazyLogits, vocabulary_chunks
from moe_jax.distill.teacher import Teacher
from moe_jax.model.abstract import graph_of
from moe_jax.model.transformer import Transformer
from moe_jax.moe.module import RouterBias
from tests.conftest import SMALL_MODEL
from tests.distill.formulas import kl, softmax

LENGTH = 16
TOKENIZER = make_tokenizer("bytes", ())
MODEL = replace(SMALL_MODEL, vocabulary=300, layers=1, dense_layers=0)  # rows beyond the tokenizer


def make_teacher(seed=0):
    model = Transformer(MODEL, key=jax.random.key(seed))
    _, parameters, router = nnx.split(model, nnx.Param, RouterBias)
    return Teacher(MODEL, parameters, router, TOKENIZER)


def make_array(count=LENGTH * 21 + 1):
    tokens = np.random.default_rng(0).integers(0, 256, count).astype(np.uint16)
    starts = np.arange(0, count, 37)
    tokens[starts] = TOKENIZER.bos
    return TokenArray(tokens, starts, count, TOKENIZER)


TEACHER = make_teacher()
ARRAY = make_array()
SAMPLED = CacheConfig(count=12, batch=4, shard=8)
TOP_K = replace(SAMPLED, kind="top_k", count=5)


def build(folder, config=SAMPLED, teacher=TEACHER, array=ARRAY, say=lambda line: None):
    return build_cache(folder, teacher, array, LENGTH, config, say)


def probabilities(index):
    """The teacher's distributions in a window, directly."""
    window = Windows(ARRAY, LENGTH, 0, 21)[index]
    model = nnx.merge(graph_of(MODEL), TEACHER.parameters, TEACHER.router)
    logits = model(*(jnp.asarray(window[k][None, :LENGTH]) for k in ("tokens", "segments")))
    return softmax(np.asarray(logits[0])[:, : TOKENIZER.vocabulary])


@pytest.mark.parametrize("index", [0, 7, 20])
def test_top_k_holds_the_best_tokens_and_their_probabilities(tmp_path, index):
    cache = build(tmp_path, TOP_K)
    assert len(cache) == 21
    stored = cache[index]
    p = probabilities(index)
    tokens = stored["teacher_tokens"]
    np.testing.assert_array_equal(tokens, np.argsort(-p, axis=-1, kind="stable")[:, :5])
    expected = np.take_along_axis(p, tokens, -1)
    # float16 keeps a logarithm of size 8 to 0.4%.
    np.testing.assert_allclose(np.exp(stored["teacher_log_p"]), expected, rtol=1e-2)


def test_samples_follow_the_teacher(tmp_path):
    """Chi-square of 4,000 draws against the teacher's probabilities at one position."""
    cache = build(tmp_path, replace(SAMPLED, count=200, shard=4), array=make_array(5 * LENGTH))
    p = probabilities(0)
    count = 200
    total = 0.0
    freedom = 0
    for position in range(LENGTH):
        likely = p[position] > 0.02
        seen = np.bincount(cache[0]["teacher_tokens"][position], minlength=len(p[0]))
        seen = np.append(seen[likely], seen[~likely].sum())
        expected = count * np.append(p[position][likely], p[position][~likely].sum())
        total += np.sum((seen - expected) ** 2 / expected)
        freedom += likely.sum()
    assert freedom > 40  # enough likely tokens for the statistic to mean something
    assert abs(total - freedom) < 4 * np.sqrt(2 * freedom)


def test_no_sample_lies_beyond_the_tokenizer_and_draws_differ(tmp_path):
    cache = build(tmp_path)
    drawn = np.stack([cache[i]["teacher_tokens"] for i in range(len(cache))])
    assert drawn.max() < TOKENIZER.vocabulary
    other = build(tmp_path, replace(SAMPLED, seed=1))
    assert other.folder != cache.folder
    assert (other[0]["teacher_tokens"] != drawn[0]).any()


def test_bytes_per_token(tmp_path):
    config = replace(SAMPLED, shard=32)
    cache = build(tmp_path, config)
    lines = []
    size = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert size / (21 * LENGTH) == pytest.approx(cache.bytes_per_token, abs=0.1)
    assert cache.bytes_per_token == pytest.approx(24, abs=0.1)
    assert build(tmp_path, replace(TOP_K, shard=32)).bytes_per_token == pytest.approx(22, abs=0.1)
    build(tmp_path / "other", config, say=lines.append)
    assert "24.0 bytes each" in lines[0]


def test_a_killed_build_goes_on_where_it_stopped(tmp_path):
    whole = build(tmp_path / "whole")

    def killed(line):
        if line.startswith("teacher: 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", say=killed)
    lines = []
    resumed = build(tmp_path / "cut", say=lines.append)
    assert lines[-1] == "teacher: 1 of 1 shards"
    for shard in whole.shards():
        assert whole.path(shard).read_bytes() == resumed.path(shard).read_bytes()
    again = []
    build(tmp_path / "cut", say=again.append)
    assert again == []


def test_samples_do_not_depend_on_the_batch(tmp_path):
    one = build(tmp_path / "one")
    two = build(tmp_path / "two", replace(SAMPLED, batch=2))
    assert one.path(1).read_bytes() == two.path(1).read_bytes()


def flip(data: bytes) -> bytes:
    return data[:5] + bytes([data[5] ^ 1]) + data[6:]


@pytest.mark.parametrize("damage", [flip, lambda data: data[:-1] + b"x", lambda data: data[:-9]])
def test_a_damaged_shard_is_computed_again_with_a_line(tmp_path, damage):
    cache = build(tmp_path)
    whole = cache.path(1).read_bytes()
    expected = cache[9]["teacher_tokens"]
    cache.path(1).write_bytes(damage(whole))
    said = []
    fresh = build(tmp_path, say=said.append)
    np.testing.assert_array_equal(fresh[9]["teacher_tokens"], expected)
    assert cache.path(1).read_bytes() == whole
    # A shard of another size is noticed at once, and computed as a missing one.
    assert any("is damaged: the teacher reads its text again" in x or "shards" in x for x in said)
    said.clear()
    fresh[10]
    assert build(tmp_path, say=said.append)[9] is not None
    assert said == []


def test_a_shard_that_vanishes_is_computed_again(tmp_path):
    cache = build(tmp_path)
    expected = build(tmp_path)[9]["teacher_tokens"]
    cache.path(1).unlink()
    np.testing.assert_array_equal(cache[9]["teacher_tokens"], expected)


def test_a_disk_that_loses_what_is_written(tmp_path, monkeypatch):
    cache = build(tmp_path)
    cache.path(1).write_bytes(flip(cache.path(1).read_bytes()))
    monkeypatch.setattr("moe_jax.distill.cache.write_atomically", lambda path, data: None)
    with pytest.raises(UserError, match=r"does not read back as written: .*--data\.cache"):
        build(tmp_path)[9]


def test_a_read_that_fails_is_one_line_and_damages_nothing(tmp_path, monkeypatch):
    cache = build(tmp_path)
    before = cache.path(1).read_bytes()

    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(np, "fromfile", fails)
        with pytest.raises(UserError, match=r"cannot read .*000001\.rows: Input/output error"):
            cache[9]
    assert cache.path(1).read_bytes() == before
    assert cache[9] is not None


def test_no_number_of_shards_uses_up_the_open_files(tmp_path):
    """Every shard is read, and the process has as many files open as before."""
    cache = build(tmp_path, replace(SAMPLED, batch=1, shard=1))
    assert len(cache.shards()) == 21
    before = len(os.listdir("/proc/self/fd"))
    rows = [cache[index] for index in range(21)]
    assert len(rows) == 21
    assert len(os.listdir("/proc/self/fd")) == before
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) == 0


def test_another_teacher_text_or_temperature_has_another_cache(tmp_path):
    base = build(tmp_path).folder
    assert build(tmp_path, teacher=make_teacher(1)).folder != base
    assert build(tmp_path, array=make_array(LENGTH * 22)).folder != base
    assert build(tmp_path, replace(SAMPLED, temperature=2.0)).folder != base


def test_batches_bring_the_teacher_to_its_tokens(tmp_path):
    cache = build(tmp_path, TOP_K)
    batches = train_batches(ARRAY, LENGTH, 3, seed=0, beside=cache)
    windows = Windows(ARRAY, LENGTH, 0, 21)
    numbers = {windows[i]["tokens"].tobytes(): i for i in range(21)}
    state = None
    for step in range(9):
        if step == 5:
            state = batches.get_state()
        batch = next(batches)
        for row, tokens in enumerate(batch["tokens"]):
            expected = cache[numbers[tokens.tobytes()]]
            np.testing.assert_array_equal(batch["teacher_tokens"][row], expected["teacher_tokens"])
    last = batch["teacher_tokens"]
    batches.set_state(state)
    for _ in range(4):
        batch = next(batches)
    np.testing.assert_array_equal(batch["teacher_tokens"], last)


def test_another_tokenizer_is_refused(tmp_path):
    other = make_tokenizer("bpe:300", ["some text, some text"], say=lambda line: None)
    array = replace(ARRAY, tokenizer=other)
    with pytest.raises(UserError, match="is not the teacher's") as caught:
        build(tmp_path, array=array)
    assert "\n" not in str(caught.value)


def test_what_a_student_learns_from_each_cache():
    """A student of free logits, trained to the end: top-k with the tail gets the tail's mass right,
    and, renormalised on the top k, a tail that stays whatever it was: its mass and KL are wrong.
    """
    rng = np.random.default_rng(3)
    p = softmax(2 * rng.normal(size=(1, 40)))
    tokens = jnp.asarray(np.argsort(-p)[:, :4])
    log_p = jnp.asarray(np.log(np.take_along_axis(p, tokens, -1)), jnp.float32)
    chunks = vocabulary_chunks([LazyLogits(jnp.zeros((1, 40)), jnp.eye(40))])
    begin = jnp.asarray(4 * rng.normal(size=(1, 40)), jnp.float32)

    def tail(z):
        return losses.top_k_tail(LazyLogits(z, jnp.eye(40)), tokens, log_p, chunks).sum()

    def renormalised(z):
        log_q = jax.nn.log_softmax(jnp.take_along_axis(z, tokens, -1))
        return -jnp.sum(jnp.exp(jax.nn.log_softmax(log_p)) * log_q)

    def learned(loss):
        step = jax.jit(lambda z: z - 0.5 * jax.grad(loss)(z))
        z = begin
        for _ in range(1500):
            z = step(z)
        return float(kl(p, softmax(z))[0]), float(np.take_along_axis(softmax(z), tokens, -1).sum())

    teacher_mass = float(np.take_along_axis(p, tokens, -1).sum())
    tail_kl, tail_mass = learned(tail)
    wrong_kl, wrong_mass = learned(renormalised)
    assert abs(tail_mass - teacher_mass) < 0.01
    assert abs(wrong_mass - teacher_mass) > 0.2
    assert tail_kl < 0.6 * wrong_kl
