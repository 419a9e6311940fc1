"""A scan over layers whose experts are read in place, out of the stack of all layers."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import ExchangeConfig, ParallelConfig
from moe_jax.model.abstract import abstract_states, graph_of, split_model
from moe_jax.model.transformer import Transformer
from moe_jax.parallel.exchange import exchanging
from moe_jax.parallel.mesh import make_mesh
from tests.parallel.in_place import reading_in_place

TOKENS = jnp.arange(24).reshape(2, 12) % 61
SEGMENTS = jnp.ones_like(TOKENS)


def gradient(model):
    """(parameters, router) -> (loss, gradient), of all that the model has."""
    graph = graph_of(model)

    def loss(parameters, router):
        hidden, _ = nnx.merge(graph, parameters, router).hidden(TOKENS, SEGMENTS)
        return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))

    return jax.value_and_grad(loss)


def two_devices(exchange):
    layout = ParallelConfig(expert=2, exchange=exchange)
    return jax.set_mesh(make_mesh(layout, jax.devices()[:2])), exchanging(exchange)


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_the_same_gradients_as_from_slices(small_model, remat):
    model = replace(small_model, remat=remat, layers=4)
    _, *states = split_model(Transformer(model, key=jax.random.key(0)))
    mesh, exchange = two_devices(ExchangeConfig(chunks=3))
    with mesh, exchange:
        expected = jax.jit(gradient(model))(*states)
        with reading_in_place() as read:
            actual = jax.jit(gradient(model))(*states)
    # Of all 3 sparse layers, the 3 experts of a device.
    assert set(read) == {9}
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # float32 sums in another order: the other run multiplies in XLA's path
        scale = float(jnp.max(jnp.abs(two)))
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * scale)


def arrays(jaxpr) -> Iterator[tuple[str, Any]]:
    """(primitive, result) of every equation, those of called functions included."""
    for equation in jaxpr.eqns:
        yield from ((equation.primitive.name, v.aval) for v in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(parameter):
                yield from arrays(getattr(parameter, "jaxpr", parameter))


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize(
    "remat", ["none", *(pytest.param(r, marks=pytest.mark.slow) for r in ("dots", "full"))]
)
def test_kernels_keep_no_copy_of_the_stack_for_each_layer(small_model, remat):
    """The backward pass reads the stack itself. Each layer's copy of it would be kept otherwise."""
    model = replace(small_model, remat=remat, layers=4)
    model = replace(model, moe=replace(model.moe, implementation="triton"))
    moe = model.moe
    mesh, exchange = two_devices(ExchangeConfig(chunks=3))
    with mesh, exchange:
        traced = jax.make_jaxpr(gradient(model))(*abstract_states(model))
    stack = 3 * moe.experts * 2 * moe.expert_hidden * model.width
    scans = [math.prod(aval.shape) for name, aval in arrays(traced.jaxpr) if name == "scan"]
    assert max(scans) == stack  # the gradient
