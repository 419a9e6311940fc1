"""The asynchronous products: in this package's interpreter of Gluon, and as they compile."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_kernels import experts_async
from moe_kernels.experts.reference import mixture as reference
from moe_kernels.experts.shapes import using
from moe_kernels.experts_async.shapes import COOPERATIVE
from moe_kernels.launch import asynchronous, gluon_interpreter, lowering_for

from moe_jax.moe.plan import make_plan

pytest.importorskip("triton")

LARGEST, RMS = 2e-2, 4e-3
"""Of error / max(rms(reference), |reference|)."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    jax.clear_caches()  # the architecture and the table are no arguments of what is traced


def make_inputs(sizes, chosen, dtype):
    t, d, f, e = sizes
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    weights = jnp.asarray(random.random(chosen.shape), jnp.float32)
    gate_up = draw(e, d, 2 * f) / d**0.5
    down = draw(e, f, d) / f**0.5
    return draw(t, d).astype(dtype), weights, gate_up.astype(dtype), down.astype(dtype)


def assert_close(actual, expected):
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    error = np.abs(actual - expected) / np.maximum(np.sqrt((expected**2).mean()), np.abs(expected))
    assert error.max() <= LARGEST  # NaN, the poison of outputs and of copies, fails as well
    assert np.sqrt((error**2).mean()) <= RMS


def some_experts(tokens, experts, per_token=2):
    random = np.random.default_rng(1)
    return np.stack([random.permutation(experts)[:per_token] for _ in range(tokens)])


def check(sizes, chosen, block_rows, dtype=jnp.bfloat16, arch=90):
    chosen = jnp.asarray(chosen, jnp.int32)
    inputs = make_inputs(sizes, chosen, dtype)
    plan = make_plan(chosen, sizes[3])
    assert plan.block_rows == block_rows
    with lowering_for(arch):
        assert_close(experts_async.mixture(*inputs, plan), reference(*inputs, chosen))


# 136 deep are two steps and a part; 72 columns end inside a tile's second half.
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("tokens", [100, 70])
def test_against_the_reference_by_architecture_and_block(arch, tokens):
    block_rows = 128 if tokens == 100 else 64
    check((tokens, 136, 72, 3 if tokens == 100 else 4), some_experts(tokens, 3), block_rows,
          arch=arch)  # fmt: skip


def test_float16_with_an_expert_without_tokens():
    check((60, 64, 264, 4), some_experts(60, 2), 64, jnp.float16)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_one_partition_that_multiplies(arch):
    with using(COOPERATIVE):
        check((100, 136, 136, 3), some_experts(100, 3), 128, arch=arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("programs", [1, 3])
def test_programs_that_take_many_tiles(monkeypatch, arch, programs):
    monkeypatch.setattr(
        "moe_kernels.experts_async.launches.multiprocessors", lambda: programs
    )
    check((300, 200, 264, 5), some_experts(300, 4), 128, arch=arch)
    chosen = np.zeros((150, 1), np.int32)  # all tokens to one expert
    check((150, 64, 72, 2), chosen, 128, arch=arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_gradients(arch):
    chosen = jnp.asarray(some_experts(100, 3), jnp.int32)
    inputs = make_inputs((100, 136, 72, 3), chosen, jnp.bfloat16)
    plan = make_plan(chosen, 3)
    d_out = jnp.ones_like(inputs[0])
    wide = [a.astype(jnp.float32) for a in inputs]
    expected = jax.vjp(lambda *a: reference(*a, chosen), *wide)[1](d_out.astype(jnp.float32))
    with lowering_for(arch):
        actual = jax.vjp(lambda *a: experts_async.mixture(*a, plan), *inputs)[1](d_out)
    for ours, its in zip(actual, expected, strict=True):
        assert_close(ours, its)


def test_what_tma_and_the_matrix_units_do_not_take():
    chosen = jnp.asarray(some_experts(100, 3), jnp.int32)
    plan = make_plan(chosen, 3)
    with pytest.raises(ValueError, match="^D 136 and F 70: TMA needs multiples of 8$"):
        experts_async.mixture(*make_inputs((100, 136, 70, 3), chosen, jnp.bfloat16), plan)
    with pytest.raises(ValueError, match="^float32: the asynchronous products take bfloat16"):
        experts_async.mixture(*make_inputs((100, 136, 72, 3), chosen, jnp.float32), plan)


def no_wait_for_copies(names):
    wait = names["mbarrier"].wait
    # The first partition, which multiplies, has its barrier in `full`: those count one arrival.
    names["mbarrier"].wait = lambda barrier, parity: wait(barrier, parity) if parity else None


def no_fence(names):
    names["hopper"].fence_async_shared = lambda: None


def too_few_bytes(names):
    expect = names["mbarrier"].expect
    names["mbarrier"].expect = lambda barrier, size: expect(barrier, size // 2)


def early_release(names):
    products = names["hopper"].warpgroup_mma_wait
    names["hopper"].warpgroup_mma_wait = lambda running, deps: products(running and 6, deps)


FAULTS = {
    no_wait_for_copies: "",
    no_fence: "without a fence",
    too_few_bytes: "",
    early_release: "overwritten before its product was done",
}
"""What is broken, and what is said of it. Without words the result is wrong or a thread stops."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_synchronisation_is_seen(monkeypatch, fault):
    language = gluon_interpreter.language

    def broken(machine):
        names = language(machine)
        fault(names)
        return names

    monkeypatch.setattr(gluon_interpreter, "language", broken)
    monkeypatch.setattr("moe_kernels.launch.gluon_machine.WAIT_SECONDS", 2.0)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=FAULTS[fault]):
        check((100, 520, 72, 3), some_experts(100, 3), 128)
