"""Every schedule as a program: gradients, slots that nobody fills, size, and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.equations import dependents
from moe_jax.parallel.executor import Arguments, Stages, device, make_gradient
from moe_jax.parallel.executor.piece import Piece, Work
from moe_jax.parallel.executor.slots import Stack, at
from moe_jax.parallel.gradient_split import split
from moe_jax.parallel.schedules import SCHEDULES, build
from moe_jax.parallel.ticks import tick_table

WIDTH = 6
SIZES = dict.fromkeys(SCHEDULES, (2, 4)) | {"dualpipev": (4, 4)}
"""(P, M) for two devices."""


def first(shared, c):
    return jnp.tanh(c[1]["x"] @ shared["in"])


def layer(p, x, c):
    own, _ = c
    hidden = jax.nn.silu(x @ p["a"] + own)
    return x + hidden @ p["b"], 0.01 * jnp.sum(hidden**2), {"positive": jnp.sum(hidden > 0)}


def last(shared, y, c):
    wrong = c[0] * jnp.sum((y @ shared["out"] - c[1]["target"]) ** 2)
    return wrong, {"wrong": wrong}


STAGES = Stages(first, layer, last)
SPECS = Arguments(P(), P("pipe"), P("pipe"), P(), P())


def make_arguments(layers, microbatches, rows=3):
    keys = iter(jax.random.split(jax.random.key(0), 9))
    normal = lambda *shape: 0.5 * jax.random.normal(next(keys), shape)  # noqa: E731
    return Arguments(
        shared={"in": normal(WIDTH, WIDTH), "out": normal(WIDTH, WIDTH)},
        layers={"a": normal(layers, WIDTH, WIDTH), "b": normal(layers, WIDTH, WIDTH)},
        own=normal(layers, WIDTH),
        constants=jnp.float32(0.7),
        contexts={
            "x": normal(microbatches, rows, WIDTH),
            "target": normal(microbatches, rows, WIDTH),
        },
    )


def expected(arguments):
    """The loss and its gradient, micro-batch by micro-batch and layer by layer."""
    _, layers, own, constants, contexts = arguments

    def total(shared, layers):
        loss = 0.0
        positive = []
        for m in range(len(contexts["x"])):
            c = (constants, jax.tree.map(lambda a, m=m: a[m], contexts))
            x = first(shared, c)
            for i in range(len(own)):
                x, own_loss, others = layer(
                    jax.tree.map(lambda a, i=i: a[i], layers), x, (own[i], c)
                )
                loss += own_loss
                positive.append(others["positive"])
            loss += last(shared, x, c)[0]
        return loss, jnp.stack(positive).reshape(-1, len(own)).sum(axis=0)

    gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (loss, positive), (shared, stacked) = jax.jit(gradient)(arguments.shared, layers)
    return loss, shared, stacked, {"positive": positive}


def pipelined(schedule):
    mesh = jax.make_mesh((2,), ("pipe",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    return jax.jit(make_gradient(schedule, STAGES, mesh, SPECS)), mesh


def check(name):
    P_, M = SIZES[name]
    schedule = build(name, stages=P_, microbatches=M, chunks=2 if name == "interleaved" else 1)
    arguments = make_arguments(2 * schedule.pieces, M)
    gradient, mesh = pipelined(schedule)
    with jax.set_mesh(mesh):
        found = gradient(arguments)
    # In float32. tests.parallel.pipelined_layouts compares whole models in float64.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        tuple(found[:4]),
        expected(arguments),
    )


@pytest.mark.parametrize("name", ["zb-h1"])
def test_the_gradient_is_that_of_the_layers_in_order(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"zb-h1"}))
def test_the_gradient_of_every_other_schedule(name):
    check(name)


def test_an_overlapped_forward_and_backward_read_nothing_from_each_other():
    """So that XLA's scheduler may put the transfers of one under the products of the other."""
    arguments = make_arguments(2, 1)
    constants = (arguments.constants, at(arguments.contexts, 0))
    chunks = jax.tree.map(lambda a: a[None], (arguments.layers, arguments.own))
    work = Work(*(Stack(tree, jnp.int32(0)) for tree in chunks), constants)
    x = arguments.contexts["x"][0]
    p, c = work.layer(0)
    piece = Piece(split(layer, p, x, c))
    _, _, saved, _ = piece.shapes_of_layer(work, x)
    saved = jax.tree.map(lambda a: jnp.zeros((2, len(work.indices), *a.shape), a.dtype), saved)

    def step(x, dy, sums):
        backward = (work, Stack(saved, jnp.int32(0)), dy)
        forward, dx, sums = piece.overlapped((work, x, jnp.int32(1)), backward, sums)
        return forward, (dx, sums)

    (loop,) = (
        equation
        for equation in jax.make_jaxpr(step)(x, x, chunks[0]).eqns
        if equation.primitive.name == "scan"
    )
    body = loop.params["jaxpr"].jaxpr
    carry = loop.params["num_consts"]
    x_in, dy_in = body.invars[carry : carry + 2]
    sums = len(jax.tree.leaves(chunks[0]))
    y, *backward = body.outvars[: 2 + sums]
    slots = len(saved)
    # What the forward saves is written when the backward has read.
    forward = [y, *body.outvars[2 + sums + slots :]]
    assert not dependents(body.eqns, [x_in]) & set(backward)
    assert not dependents(body.eqns, [dy_in]) & set(forward)
    assert {y} <= dependents(body.eqns, [x_in])
    assert set(backward) <= dependents(body.eqns, [dy_in])


def test_slots_that_nobody_filled_are_never_read(monkeypatch):
    """NaN in every slot of messages, activations and gradients before the first tick."""
    zeros = device.zeros

    def poisoned(shapes, *leading):
        empty = zeros(shapes, *leading)
        if not leading or getattr(jax.tree.leaves(shapes)[0], "ndim", 0) < 2:
            return empty  # sums begin with zero
        return jax.tree.map(lambda a: a * jnp.nan if a.dtype == jnp.float32 else a, empty)

    monkeypatch.setattr(device, "zeros", poisoned)
    check("1f1b")


def lowered(name, microbatches, rows=3):
    schedule = build(name, stages=2, microbatches=microbatches)
    gradient, mesh = pipelined(schedule)
    shapes = jax.eval_shape(lambda: make_arguments(4, microbatches, rows))
    with jax.set_mesh(mesh):
        return gradient.lower(shapes), tick_table(schedule)


def test_the_program_does_not_grow_with_the_micro_batches():
    few, many = (lowered("1f1b", number)[0].as_text().count("\n") for number in (4, 64))
    assert many == few


def test_memory_follows_the_schedules_peak():
    """Of compiled programs: a slot costs the same in each, and there is only one copy of it."""
    rows = 4096  # so that activations are nearly all of it
    used = {}
    for name, microbatches in (("gpipe", 16), ("gpipe", 32), ("1f1b", 32)):
        program, table = lowered(name, microbatches, rows)
        used[name, microbatches] = program.compile().memory_analysis().temp_size_in_bytes
        assert table.slots.saved == (microbatches if name == "gpipe" else 2)
    slot = (used["gpipe", 32] - used["gpipe", 16]) / 16
    # Arrays [rows, WIDTH] in float32: six for each of a piece's two layers, and the piece's output.
    # A second copy of the slots would double this.
    assert 0.9 < slot / (13 * rows * WIDTH * 4) < 1.1
    assert used["1f1b", 32] < used["gpipe", 32] - 29 * slot
