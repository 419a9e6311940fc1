"""The programs of parallel.gradient_split: results, and where each product is computed."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.config import ExchangeConfig
from moe_jax.model import stages
from moe_jax.model.abstract import split_model
from moe_jax.model.block import Block
from moe_jax.model.parameters import role_of
from moe_jax.parallel.exchange import exchanging
from moe_jax.parallel.gradient_split import SAVEABLE, split
from moe_jax.parallel.mesh import own_copies


def gated(p, x, c):
    hidden = jax.nn.silu(x @ p["gate"]) * (x @ p["up"])
    return x + hidden @ p["down"] + c, jnp.mean(hidden**2), hidden.sum()


def with_a_loop(p, x, c):
    """A loop that yields the outputs, and whose gradient yields those of x and p together."""
    y, _ = lax.scan(lambda y, _: (jnp.tanh(y @ p["up"]), None), x, length=3)
    return y + c, jnp.zeros(()), ()


def arrays():
    keys = iter(jax.random.split(jax.random.key(0), 6))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    p = {name: normal(4, 4) for name in ("gate", "up", "down")}
    return p, normal(3, 4), normal(3, 4), normal(3, 4)


def whole_gradient(function, p, x, c, dy):
    _, pull = jax.vjp(lambda p, x: function(p, x, c)[:2], p, x)
    return pull((dy, jnp.ones(())))


def in_three(function, p, x, c, dy, saveable):
    parts = split(function, p, x, c, saveable)
    outputs, saved = jax.jit(parts.forward)(p, x, c)
    dx, kept = jax.jit(parts.backward_input)(p, c, saved, dy)
    return outputs, jax.jit(parts.backward_weight)(p, c, saved, kept), dx


@pytest.mark.parametrize("remat", SAVEABLE)
@pytest.mark.parametrize("function", [gated, with_a_loop])
def test_the_three_programs_are_the_function_and_its_gradient(function, remat):
    p, x, c, dy = arrays()
    outputs, dp, dx = in_three(function, p, x, c, dy, SAVEABLE[remat])
    for found, expected in (
        (outputs, function(p, x, c)),
        ((dp, dx), whole_gradient(function, p, x, c, dy)),
    ):
        # Compiled in other groups, float32 sums round differently.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
        )


def dots(equations):
    return Counter(equation.primitive.name for equation in equations)["dot_general"]


def test_each_product_is_computed_once():
    p, x, c, _ = arrays()
    # Three products forward, three for x, three for p. A second jax.vjp would repeat two for p.
    assert [dots(part) for part in split(gated, p, x, c).equations] == [3, 3, 3]
    recomputed = split(gated, p, x, c, SAVEABLE["full"])
    # gate and up again, because the gradient of down needs their result.
    assert [dots(part) for part in recomputed.equations] == [3, 5, 3]


def test_a_block_with_experts_splits_without_excess(small_model):
    block = Block(small_model, sparse=True, key=jax.random.key(0))
    graph, p, router = split_model(block)
    tokens = jnp.zeros((2, 12), jnp.int32)
    x = jnp.zeros((2, 12, small_model.width))

    def run(p, x, c):
        context = stages.whole_documents(small_model, tokens, tokens + 1, None)
        y, _, stats = stages.run_block(nnx.merge(graph, p, c), x, context)
        return y, stats.loss, ()

    forward, to_input, to_weight = (dots(part) for part in split(run, p, x, router).equations)
    # Nine matrices: four of attention, the router, two of the experts, two of the shared experts.
    # Attention itself has two products forward and four in the gradient.
    assert (forward, to_input, to_weight) == (9 + 2, 9 + 4, 9)


SENDING = {
    "psum",
    "psum_invariant",
    "pmax",
    "all_to_all",
    "all_gather",
    "reduce_scatter",
    "ppermute",
}


@pytest.mark.parametrize("remat", SAVEABLE)
@pytest.mark.parametrize("kind", ["all_to_all", pytest.param("all_gather", marks=pytest.mark.slow)])
def test_the_gradient_of_the_weights_waits_for_no_device(small_model, kind, remat):
    """A block whose experts lie on two devices."""
    block = Block(small_model, sparse=True, key=jax.random.key(0))
    graph, p, router = split_model(block)
    tokens = jnp.zeros((1, 12), jnp.int32)
    x = jnp.zeros((2, 12, small_model.width))
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: P("expert") if role_of(path) == "expert" else P(), p
    )
    parts = []

    def run(p, x, c):
        context = stages.whole_documents(small_model, tokens, tokens + 1, None)
        y, _, stats = stages.run_block(nnx.merge(graph, p, c), x, context)
        return own_copies(y, ("expert",)), stats.loss, ()

    def local(p, x, router):
        p = own_copies(p, ("expert",))
        parts.extend(split(run, p, x, router, SAVEABLE[remat]).equations)
        return x

    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    chunks = 3 if kind == "all_to_all" else 1
    with jax.set_mesh(mesh), exchanging(ExchangeConfig(kind, chunks=chunks)):
        spread = jax.shard_map(local, in_specs=(specs, P("expert"), P()), out_specs=P("expert"))
        jax.eval_shape(spread, p, x, router)
    forward, to_input, to_weight = (
        {equation.primitive.name for equation in equations} for equations in parts
    )
    assert kind in forward & to_input
    # Loops are equations of their own: further rounds of a full exchange buffer.
    assert not to_weight & SENDING
    # The barriers between lanes hold no product of the weights back in the first half.
    assert dots(parts[2]) >= 9


def test_only_what_depends_on_the_input_is_saved():
    p, x, c, _ = arrays()

    def cast(p, x, c):
        return (
            x @ p["up"].astype(jnp.bfloat16).astype(jnp.float32) + jnp.cumsum(c),
            jnp.zeros(()),
            (),
        )

    saved = jax.eval_shape(split(cast, p, x, c[0]).forward, p, x, c[0])[1]
    # The matrix and its cast are there anyway. Of the product only x is needed.
    assert [leaf.shape for leaf in saved] == [x.shape]
