"""What the backward pass keeps of a norm, the router's product, and a layer with `remat dots`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.feed_forward import FeedForward
from moe_jax.model.linear import product
from moe_jax.model.norm import rms_norm
from moe_jax.model.stages import REMAT_POLICIES
from moe_jax.moe.layer import project

EPSILON = 1e-6


def plain_norm(x, scale):
    wide = x.astype(jnp.float32)
    return (wide / jnp.sqrt(jnp.mean(wide**2, -1, keepdims=True) + EPSILON) * scale).astype(x.dtype)


def plain_project(x, matrix):
    return x.astype(jnp.float32) @ matrix


def kept(function, *arguments):
    """(shape, type) of the arrays that a derivative holds."""
    leaves = jax.tree.leaves(jax.vjp(function, *arguments)[1])
    return {(leaf.shape, str(leaf.dtype)) for leaf in leaves if leaf.size > 1}


@pytest.mark.parametrize(
    ("function", "plain", "shape"),
    [
        (lambda x, scale: rms_norm(x, scale, EPSILON), plain_norm, (16,)),
        (project, plain_project, (16, 4)),
    ],
    ids=["norm", "router"],
)
def test_the_arguments_alone_are_kept_and_gradients_are_the_formulas(function, plain, shape):
    x = jax.random.normal(jax.random.key(0), (8, 16), jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), shape)
    assert kept(function, x, weight) == {((8, 16), "bfloat16"), (shape, "float32")}
    for dtype in (jnp.float32, jnp.bfloat16):
        given = (x.astype(dtype), weight)
        out, pull = jax.vjp(function, *given)
        d_out = jax.random.normal(jax.random.key(2), out.shape).astype(out.dtype)
        for one, other in zip(pull(d_out), jax.vjp(plain, *given)[1](d_out), strict=True):
            assert one.dtype == other.dtype
            # a rounding of bfloat16, or of sums of 16 numbers in float32
            tolerance = 1e-2 if one.dtype == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(
                np.asarray(one, float), np.asarray(other, float), rtol=tolerance, atol=tolerance
            )


def test_a_feed_forward_keeps_its_input_and_the_input_of_each_product():
    layer = FeedForward(
        4, 6, std=1.0, out_std=1.0, dtype=jnp.dtype("float32"), key=jax.random.key(0)
    )
    found = kept(layer, jnp.ones((2, 8, 4), jnp.bfloat16))
    assert {shape for shape, dtype in found if dtype == "bfloat16"} == {
        (2, 8, 4),
        (2, 8, 12),
        (2, 8, 6),
    }


def test_dots_keeps_products_and_full_keeps_none():
    x = jnp.ones((2, 8, 4))
    first, second = jnp.ones((4, 16)), jnp.ones((16, 3))

    def layer(x):
        return jnp.sin(product(jax.nn.silu(product(x, first, "float32")), second, "float32"))

    results = {((2, 8, 16), "float32"), ((2, 8, 3), "float32")}
    assert results <= kept(jax.checkpoint(layer, policy=REMAT_POLICIES["dots"]), x)
    assert not results & kept(jax.checkpoint(layer, policy=REMAT_POLICIES["full"]), x)
