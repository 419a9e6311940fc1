"""The programs of several layers, from those of one (parallel.gradient_split)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.parallel.executor.interface import Tree
from moe_jax.parallel.executor.slots import Stack, add_at
from moe_jax.parallel.gradient_split import Split


class Forward(NamedTuple):
    """What a piece computes forward."""

    y: Array
    loss: Array
    """The sum over its layers."""
    others: Tree
    """Of every layer."""
    saved: Tree
    """Of every layer."""


class Work(NamedTuple):
    """The operands of a piece for one micro-batch."""

    p: Stack
    """Parameters."""
    own: Stack
    """Constants of each layer."""
    c: Tree
    """(constants of all layers, the micro-batch's context)"""

    def layer(self, index: Array) -> tuple[Tree, Tree]:
        """(parameters, constants) of a layer."""
        return self.p.layer(index), (self.own.layer(index), self.c)

    @property
    def indices(self) -> Array:
        """The layers in order."""
        return jnp.arange(jax.tree.leaves(self.p.arrays)[0].shape[1], dtype=jnp.int32)


@dataclass(frozen=True)
class Piece:
    """The layers of a piece in a scan, so that one layer is compiled for all."""

    layer: Split

    def forward(self, work: Work, x: Array) -> Forward:
        """All layers in order."""

        def step(x: Array, index: Array) -> tuple[Array, Tree]:
            p, c = work.layer(index)
            (y, loss, others), saved = self.layer.forward(p, x, c)
            return y, (loss, others, saved)

        return _forward(*lax.scan(step, x, work.indices))

    def backward_input(self, work: Work, saved: Stack, dy: Array) -> tuple[Array, Tree]:
        """(dx, kept of every layer)"""

        def step(dy: Array, index: Array) -> tuple[Array, Tree]:
            return self.layer.backward_input(*work.layer(index), saved.layer(index), dy)

        return lax.scan(step, dy, work.indices, reverse=True)

    def backward_weight(self, work: Work, saved: Stack, kept: Stack, sums: Tree) -> Tree:
        """`sums`, [chunks, layers, …], with the gradients of the parameters added."""

        def step(sums: Tree, index: Array) -> tuple[Tree, None]:
            p, c = work.layer(index)
            dp = self.layer.backward_weight(p, c, saved.layer(index), kept.layer(index))
            return add_at(sums, (work.p.slot, index), dp), None

        return lax.scan(step, sums, work.indices)[0]

    def overlapped(
        self, work: Work, x: Array, other: Work, saved: Stack, dy: Array, sums: Tree
    ) -> tuple[Forward, Array, Tree]:
        """The forward of `work`, and the whole backward of `other`: (Forward, dx, sums).

        A turn of the loop has a layer of the forward, from the first on, and one of the backward,
        from the last on. Neither reads from the other. So XLA's scheduler may put the transfers of
        one under the products of the other, which it never does across loops.
        """

        def step(carry: tuple[Array, Array, Tree], index: Array) -> tuple[Any, Any]:
            x, dy, sums = carry
            p_of_x, c_of_x = work.layer(index)
            index = work.indices[-1] - index
            p, c = other.layer(index)
            old = saved.layer(index)
            forward, backward = self.layer.overlapped((p_of_x, x, c_of_x), (p, c, old, dy))
            (y, loss, others), new = forward
            dx, kept = backward
            dp = self.layer.backward_weight(p, c, old, kept)
            sums = add_at(sums, (other.p.slot, index), dp)
            return (y, dx, sums), (loss, others, new)

        (y, dx, sums), of_forward = lax.scan(step, (x, dy, sums), work.indices)
        return _forward(y, of_forward), dx, sums


def _forward(y: Array, of_layers: tuple[Array, Tree, Tree]) -> Forward:
    losses, others, saved = of_layers
    return Forward(y, losses.sum(), others, saved)
