"""A scan over layers whose experts are read in place, out of the stack of all layers."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe_jax.config import ExchangeConfig, ParallelConfig
from moe_jax.model.abstract import abstract_states, graph_of
from moe_jax.parallel.exchange import exchanging
from moe_jax.parallel.mesh import make_mesh

TOKENS = jnp.arange(24).reshape(2, 12) % 61
SEGMENTS = jnp.ones_like(TOKENS)


def gradient(model):
    """(parameters, router) -> (loss, gradient), of all that the model has."""
    graph = graph_of(model)

    def loss(parameters, router):
        hidden, _ = nnx.merge(graph, parameters, router).hidden(TOKENS, SEGMENTS)
        return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))

    return jax.value_and_grad(loss)


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
    """Kernels get all 3 layers' experts of a device. The backward pass reads the same array."""
    model = replace(small_model, remat=remat, layers=4)
    model = replace(model, moe=replace(model.moe, implementation="triton"))
    layout = ParallelConfig(expert=2, exchange=ExchangeConfig(chunks=3))
    with jax.set_mesh(make_mesh(layout, jax.devices()[:2])), exchanging(layout.exchange):
        traced = jax.make_jaxpr(gradient(model))(*abstract_states(model))
    found = list(arrays(traced.jaxpr))
    experts = model.moe.experts
    shape = (model.width, 2 * model.moe.expert_hidden)
    assert (3 * experts // 2, *shape) in [aval.shape for _, aval in found]
    scanned = [math.prod(aval.shape) for name, aval in found if name == "scan"]
    assert max(scanned) == 3 * experts * math.prod(shape)  # the gradient
