"""The asynchronous products: in this package's interpreter of Gluon, and as they compile."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_kernels import experts_async
from moe_kernels.experts.reference import mixture as reference
from moe_kernels.experts.shapes import using
from moe_kernels.experts_async.shapes import COOPERATIVE, TABLE
from moe_kernels.launch import (
    Tuning,
    UnavailableError,
    async_support,
    asynchronous,
    gluon_interpreter,
    lowering_for,
    require_async,
)

from moe_jax.base.errors import UserError
from moe_jax.moe.implementation import implementation
from moe_jax.moe.plan import make_plan
from moe_jax.train.checks import check_async

pytest.importorskip("triton")

LAUNCHES = "moe_kernels.experts_async.launches"
LARGEST, RMS = 2e-2, 4e-3
"""Of error / max(rms(reference), |reference|)."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Two programs, so that each takes several tiles and both partitions multiply.
    monkeypatch.setattr(f"{LAUNCHES}.multiprocessors", lambda: 2)
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


# 136 deep are two steps and a part. 72 columns end inside a tile's second half. Two buffers are
# filled again within a tile.
TWO_BUFFERS = {f"async {op}": TABLE[op, 64]._replace(tuning=Tuning(4, 2)) for op in ("up", "rows")}
SMALL = (100, 136, 72, 3)


@pytest.mark.parametrize(
    ("tokens", "experts", "block_rows", "dtype", "arch"),
    [
        (100, 3, 128, jnp.bfloat16, 90),
        (70, 4, 64, jnp.float16, 100),  # one expert has no tokens
        pytest.param(70, 4, 64, jnp.bfloat16, 90, marks=pytest.mark.slow),
        pytest.param(100, 3, 128, jnp.bfloat16, 100, marks=pytest.mark.slow),
    ],
)
def test_against_the_reference(tokens, experts, block_rows, dtype, arch):
    with using(TWO_BUFFERS):
        check((tokens, 136, 72, experts), some_experts(tokens, 3), block_rows, dtype, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_one_partition_that_multiplies(arch):
    with using(COOPERATIVE):
        check((100, 136, 136, 3), some_experts(100, 3), 128, arch=arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("programs", [1, 132])
def test_many_tiles_by_one_program_and_one_by_each(monkeypatch, arch, programs):
    monkeypatch.setattr(f"{LAUNCHES}.multiprocessors", lambda: programs)
    check((300, 200, 264, 5), some_experts(300, 4), 128, arch=arch)
    chosen = np.zeros((150, 1), np.int32)  # all tokens to one expert
    check((150, 64, 72, 2), chosen, 128, arch=arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_gradients(arch):
    chosen = jnp.asarray(some_experts(100, 3), jnp.int32)
    inputs = make_inputs(SMALL, chosen, jnp.bfloat16)
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
    with pytest.raises(ValueError, match=r"^D 136 and F 70: TMA needs multiples of 8$"):
        experts_async.mixture(*make_inputs((100, 136, 70, 3), chosen, jnp.bfloat16), plan)
    assert experts_async.misfit(jnp.float32, 136, 72).startswith("float32: the asynchronous")


def no_wait_for_copies(names):
    wait = names["mbarrier"].wait
    # The first turns wait for copies with parity 0, and for free buffers with parity 1.
    names["mbarrier"].wait = lambda barrier, parity: wait(barrier, parity) if parity else None


def no_fence(names):
    names["hopper"].fence_async_shared = lambda: None


def too_few_bytes(names):
    expect = names["mbarrier"].expect
    names["mbarrier"].expect = lambda barrier, size: expect(barrier, size // 2)


def early_release(names):
    products = names["hopper"].warpgroup_mma_wait
    # A tile has more steps than buffers: the first ones are filled again before its last wait.
    names["hopper"].warpgroup_mma_wait = lambda running, deps: products(100 * running, deps)


def no_order(names):
    allocate, wait = names["mbarrier"].allocate_mbarrier, names["mbarrier"].wait
    load = names["tma"].async_load
    made = []
    names["mbarrier"].allocate_mbarrier = lambda batch: made.append(allocate(batch)) or made[-1]
    # The order of the partitions that multiply is the last of the kernel's barriers.
    names["mbarrier"].wait = lambda barrier, parity: (
        None if barrier in (made[3].index(0), made[3].index(1)) else wait(barrier, parity)
    )

    def late(*arguments):
        time.sleep(0.02)  # the second partition is at its barrier before the first copy
        load(*arguments)

    names["tma"].async_load = late


FAULTS = {
    no_wait_for_copies: None,
    no_fence: "without a fence",
    no_order: None,
    too_few_bytes: None,
    early_release: "overwritten before its product was done",
}
"""What is broken, and what is said of it. Without words the result is wrong or a thread stops."""


@pytest.mark.parametrize(
    "fault",
    [
        no_fence,
        early_release,
        no_order,
        pytest.param(no_wait_for_copies, marks=pytest.mark.slow),
        pytest.param(too_few_bytes, marks=pytest.mark.slow),
    ],
)
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


def on_a_gpu(monkeypatch, capability):
    """An H100 or another card, for the probe alone."""
    monkeypatch.delenv("TRITON_INTERPRET")
    device = SimpleNamespace(device_kind="card", compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    library = SimpleNamespace(create_tma_descriptor_parameter=None)
    monkeypatch.setattr(asynchronous, "_launcher", lambda: library)
    versions = {"triton": "3.9.0", "jaxlib": "0.11.2"}
    monkeypatch.setattr(asynchronous.importlib.metadata, "version", versions.get)
    return versions


@pytest.mark.parametrize(
    ("capability", "name"), [("9.0", "gpu"), ("10.0", "gpu"), ("12.0", "none")]
)
def test_cards_by_compute_capability(monkeypatch, capability, name):
    on_a_gpu(monkeypatch, capability)
    assert async_support().name == name
    assert capability in async_support().reason


def test_reasons_of_old_packages(monkeypatch):
    versions = on_a_gpu(monkeypatch, "9.0")
    monkeypatch.setattr(asynchronous, "_launcher", SimpleNamespace)
    versions["jaxlib"] = "0.10.2"
    with pytest.raises(UnavailableError, match=r"jaxlib 0\.10\.2 passes no TMA .*'triton'$"):
        require_async()
    versions["triton"] = "3.6.0"
    assert async_support() == ("none", "triton is 3.6.0, and their Gluon needs 3.9 or newer")


def test_auto_never_takes_them(monkeypatch):
    on_a_gpu(monkeypatch, "9.0")
    monkeypatch.setattr("moe_jax.moe.implementation.launch_fault", lambda: "")
    assert implementation("auto") == "triton"


def test_a_run_that_cannot_have_them_is_refused(small_model):
    moe = replace(small_model.moe, implementation="triton_async", expert_hidden=12)
    model = replace(small_model, width=64, compute_dtype="float32", moe=moe)
    with pytest.raises(UserError, match="triton_async cannot run: float32: the asynchronous"):
        check_async(model)
    with pytest.raises(UserError, match="triton_async cannot run: D 64 and F 12: TMA needs"):
        check_async(replace(model, compute_dtype="bfloat16"))
    check_async(replace(model, compute_dtype="bfloat16", moe=replace(moe, expert_hidden=16)))


class Launcher:
    """jaxlib's launcher, which notes what it gets."""

    TritonKernel = staticmethod(lambda **arguments: arguments)

    def __init__(self):
        self.parameters = []
        for name in ("array", "scalar", "tma_descriptor"):
            setattr(self, f"create_{name}_parameter", partial(self.note, name))

    def note(self, *values, **named):
        return (*values, named) if named else values

    def TritonKernelCall(self, kernel, *rest):  # noqa: N802
        self.kernel, *self.grid, self.parameters = (kernel, *rest)
        return SimpleNamespace(to_proto=lambda name, metadata: b"call")


def test_the_call_that_jaxlib_gets(monkeypatch):
    library = Launcher()
    monkeypatch.setattr(asynchronous, "_launcher", lambda: library)
    metadata = SimpleNamespace(
        name="kernel",
        num_warps=12,
        shared=1000,
        tensordesc_meta=[{"elem_type": 10, "swizzle": 3, "block_size": [1, 64, 64]}],
    )
    compiled = SimpleNamespace(metadata=metadata, asm={"ptx": "text"})
    monkeypatch.setattr(asynchronous, "compile_gluon", lambda *_: compiled)
    out = [jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)]

    def call(x, matrix):
        return asynchronous.call_gluon(
            None, (x, matrix), out, (132,), 4, boxes={1: (1, 64, 128)}, constants={}
        )

    with lowering_for(90):
        shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 24), (2, 24, 16))]
        text = jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "@triton_kernel_call_ffi" in text
    assert library.kernel["num_warps"] == 12
    assert library.kernel["ptx"] == "text"
    assert library.kernel["compute_capability"] == 90
    assert library.grid == [132, 1, 1]
    kinds = [parameter[0] for parameter in library.parameters]
    assert kinds == ["array", "tma_descriptor"] + 6 * ["scalar"] + ["array"]
    described = library.parameters[1][1]
    assert described["shape"] == (2, 24, 16)
    assert described["strides"] == [384, 16, 1]
    assert [p[1] for p in library.parameters[2:8]] == [2, 24, 16, 384, 16, 1]


LOWER = """
import json, sys
import jax, jax.numpy as jnp
from moe_kernels.audit.cases import AsyncCase, audit_case
from moe_kernels.audit.rules import broken_rules
from moe_kernels.experts_async import mixture
from moe_kernels.launch import async_support, lowering_for
from moe_kernels.schedule import schedule_shape

arch = int(sys.argv[1])
cases = [AsyncCase(64, arch), AsyncCase(128, arch), AsyncCase(128, arch, cooperative=True)]
rows = [row for case in cases for row in audit_case(case)]
bf16 = jnp.bfloat16
shapes = [((512, 64), bf16), ((512, 2), jnp.float32), ((4, 64, 64), bf16), ((4, 32, 64), bf16)]
arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
with lowering_for(arch):
    support = async_support()
    calls = 0
    if support.name == "lower":
        program = jax.jit(mixture).trace(*arrays, schedule_shape(512, 2, 4, 128))
        calls = program.lower(lowering_platforms=("cuda",)).as_text().count("triton_kernel_call")
broken = [rule for row in rows for rule in broken_rules(row)]
print(json.dumps({"rows": rows, "broken": broken, "calls": calls, "reason": support.reason}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90", "100"])
def test_what_they_compile_to(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LOWER, arch],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["rows"]) == 9
    assert not found["broken"]
    for row in found["rows"]:
        # Hopper gathers by cp.async, and Blackwell by TMA.
        assert bool(row["cp_async"]) == (row["kernel"] == "up_async" and arch == "90")
    if found["calls"] == 0:
        assert "passes no TMA descriptors" in found["reason"]  # jaxlib before 0.11
    else:
        assert found["calls"] == 3  # up, rows, combine
