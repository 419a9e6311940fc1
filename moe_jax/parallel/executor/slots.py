"""Slots and sums that a device keeps from tick to tick: trees of arrays with a leading axis."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.parallel.executor.interface import PIPE, Tree
from moe_jax.parallel.mesh import own_copies, varying_axes


def when(name: str, predicate: Array, function: Callable[[Tree], Tree], carry: Tree) -> Tree:
    """function(carry) if the predicate holds, else carry. It is in the jax.named_scope `name`.

    A loop of at most one turn, and not lax.cond: XLA updates the carry of a loop in place, and
    would copy all slots and sums of gradients in each branch of a conditional.
    """

    def turn(state: tuple[Array, Tree]) -> tuple[Array, Tree]:
        old = state[1]
        new = jax.tree.map(lambda a, like: own_copies(a, varying_axes(like)), function(old), old)
        return jnp.zeros_like(state[0]), new

    with jax.named_scope(name):
        return lax.while_loop(lambda state: state[0], turn, (predicate, carry))[1]


Index = Array | int | tuple[Array | int, ...]
"""Of the first dimension, or of as many as it has numbers."""


def at(tree: Tree, index: Index) -> Tree:
    """tree[index]"""
    return jax.tree.map(lambda a: _cut(a, index).reshape(a.shape[len(_numbers(index)) :]), tree)


def put(tree: Tree, index: Index, values: Tree) -> Tree:
    """The tree with `values` at the index."""
    numbers = _numbers(index)

    def one(a: Array, value: Array) -> Array:
        value = value.reshape(*[1] * len(numbers), *value.shape)
        return lax.dynamic_update_slice(a, value, _starts(a, index))

    return jax.tree.map(one, tree, values)


def add_at(tree: Tree, index: Index, values: Tree) -> Tree:
    """The tree with `values` added at the index."""
    return put(tree, index, add(at(tree, index), values))


def put_after(done: Tree, tree: Tree, index: tuple[Array, ...], values: Tree) -> Tree:
    """put(tree, index, values) when all arrays of `done` are there.

    XLA for CPUs drops optimization barriers before it decides what is written in place. So the
    index itself depends on `done` here. It cannot where `done` differs over more devices than an
    array of the tree, and XLA may then copy this array.
    """

    def one(a: Array, value: Array) -> Array:
        before = [leaf for leaf in jax.tree.leaves(done) if varying_axes(leaf) <= varying_axes(a)]
        nothing = [jnp.isnan(leaf.ravel()[0]).astype(jnp.int32) for leaf in before]
        # 0, because no count is negative.
        return put(a, (index[0] + (sum(nothing) >> 31), *index[1:]), value)

    return jax.tree.map(one, tree, values)


def _cut(a: Array, index: Index) -> Array:
    numbers = len(_numbers(index))
    return lax.dynamic_slice(a, _starts(a, index), (*[1] * numbers, *a.shape[numbers:]))


def _starts(a: Array, index: Index) -> list[Array]:
    numbers = _numbers(index)
    return [jnp.asarray(n, jnp.int32) for n in (*numbers, *[0] * (a.ndim - len(numbers)))]


def _numbers(index: Index) -> tuple[Array | int, ...]:
    return index if isinstance(index, tuple) else (index,)


class Stack(NamedTuple):
    """Layers in one slot of arrays [slots, layers, …].

    A loop takes layer after layer from where they lie. A slot taken out first would be a copy.
    """

    arrays: Tree
    slot: Array

    def layer(self, index: Array) -> Tree:
        """The arrays of a layer."""
        return at(self.arrays, (self.slot, index))


def add(tree: Tree, values: Tree) -> Tree:
    """The sum of two trees."""
    return jax.tree.map(jnp.add, tree, values)


def zero_index() -> Array:
    """Index 0, with the type of an index that each device of the pipeline reads from its table."""
    return own_copies(jnp.zeros((), jnp.int32), (PIPE,))


def shapes_of(tree: Tree) -> Tree:
    """Shapes and dtypes, with the axes over which devices differ."""
    return jax.eval_shape(lambda: tree)


def zeros(shapes: Tree, *leading: int) -> Tree:
    """Zeros of the same shapes and types, each device's own over the pipeline as well."""
    # At least one slot, so that a schedule without messages needs no case of its own.
    leading = tuple(max(1, number) for number in leading)

    def empty(leaf: Any) -> Array:
        array = jnp.zeros((*leading, *leaf.shape), leaf.dtype)
        return own_copies(array, {PIPE, *varying_axes(leaf)})

    return jax.tree.map(empty, shapes)
