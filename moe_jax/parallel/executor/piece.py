"""The programs of several layers, from those of one (parallel.gradient_split)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.parallel.executor.interface import Tree
from moe_jax.parallel.executor.slots import Stack, add_at, put, put_after
from moe_jax.parallel.gradient_split import Split


class Forward(NamedTuple):
    """What a piece computes forward."""

    y: Array
    loss: Array
    """The sum over its layers."""
    others: Tree
    """Of every layer."""
    saved: Tree
    """The slots with those of the layers in theirs."""


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

    def forward(self, work: Work, x: Array, into: Stack) -> Forward:
        """All layers in order. What they save is written into the slot as it comes to be."""

        def step(carry: tuple[Array, Tree], index: Array) -> tuple[Any, Any]:
            x, slots = carry
            p, c = work.layer(index)
            (y, loss, others), saved = self.layer.forward(p, x, c)
            return (y, put(slots, (into.slot, index), saved)), (loss, others)

        (y, slots), (losses, others) = lax.scan(step, (x, into.arrays), work.indices)
        return Forward(y, losses.sum(), others, slots)

    def backward(self, work: Work, saved: Stack, dy: Array, sums: Tree) -> tuple[Array, Tree]:
        """The whole backward: (dx, sums). A layer's two halves follow each other."""

        def step(carry: tuple[Array, Tree], index: Array) -> tuple[tuple[Array, Tree], None]:
            dy, sums = carry
            p, c = work.layer(index)
            old = saved.layer(index)
            dx, kept = self.layer.backward_input(p, c, old, dy)
            dp = self.layer.backward_weight(p, c, old, kept)
            return (dx, add_at(sums, (work.p.slot, index), dp)), None

        return lax.scan(step, (dy, sums), work.indices, reverse=True)[0]

    def backward_input(
        self, work: Work, saved: Stack, dy: Array, into: Stack
    ) -> tuple[Array, Tree]:
        """(dx, the slots with what backward_weight reads in theirs)"""

        def step(carry: tuple[Array, Tree], index: Array) -> tuple[tuple[Array, Tree], None]:
            dy, slots = carry
            dx, kept = self.layer.backward_input(*work.layer(index), saved.layer(index), dy)
            return (dx, put(slots, (into.slot, index), kept)), None

        return lax.scan(step, (dy, into.arrays), work.indices, reverse=True)[0]

    def backward_weight(self, work: Work, saved: Stack, kept: Stack, sums: Tree) -> Tree:
        """`sums`, [chunks, layers, …], with the gradients of the parameters added."""

        def step(sums: Tree, index: Array) -> tuple[Tree, None]:
            p, c = work.layer(index)
            dp = self.layer.backward_weight(p, c, saved.layer(index), kept.layer(index))
            return add_at(sums, (work.p.slot, index), dp), None

        return lax.scan(step, sums, work.indices)[0]

    def overlapped(
        self,
        forward: tuple[Work, Array, Array],
        backward: tuple[Work, Stack, Array],
        sums: Tree,
    ) -> tuple[Forward, Array, Tree]:
        """A forward and the whole backward of another micro-batch: (Forward, dx, sums).

        `forward` is (work, x, slot) and `backward` is (work, saved, dy). The forward writes into
        its slot of the arrays in which the backward reads `saved`.

        A turn of the loop has a layer of the forward, from the first on, and one of the backward,
        from the last on. Neither reads from the other. So XLA's scheduler may put the transfers of
        one under the products of the other, which it never does across loops.
        """

        work, x, into = forward
        other, saved, dy = backward

        def step(carry: tuple[Array, Array, Tree, Tree], index: Array) -> tuple[Any, Any]:
            x, dy, sums, slots = carry
            p_of_x, c_of_x = work.layer(index)
            last = work.indices[-1] - index
            p, c = other.layer(last)
            old = Stack(slots, saved.slot).layer(last)
            (of_forward, new), (dx, kept) = self.layer.overlapped(
                (p_of_x, x, c_of_x), (p, c, old, dy)
            )
            y, loss, others = of_forward
            dp = self.layer.backward_weight(p, c, old, kept)
            sums = add_at(sums, (other.p.slot, last), dp)
            # Written when the backward has read. Otherwise XLA copies all slots.
            slots = put_after((dx, dp), slots, (into, index), new)
            return (y, dx, sums, slots), (loss, others)

        carry = (x, dy, sums, saved.arrays)
        (y, dx, sums, slots), (losses, others) = lax.scan(step, carry, work.indices)
        return Forward(y, losses.sum(), others, slots), dx, sums

    def shapes_of_layer(self, work: Work, x: Array) -> tuple[Tree, Tree, Tree, Tree]:
        """(loss, others, saved, kept) of one layer, without values."""

        def of_a_layer(x: Array) -> tuple[Tree, Tree, Tree, Tree]:
            p, c = work.layer(jnp.zeros((), jnp.int32))
            (y, loss, others), saved = self.layer.forward(p, x, c)
            kept = self.layer.backward_input(p, c, saved, y)[1]
            return loss, others, saved, kept

        return jax.eval_shape(of_a_layer, x)
