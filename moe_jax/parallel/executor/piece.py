"""The programs of several layers, from those of one (parallel.gradient_split)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.parallel.executor.interface import Tree
from moe_jax.parallel.executor.slots import at
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

    p: Tree
    """Parameters, [layers, …]."""
    own: Tree
    """Constants, [layers, …]."""
    c: Tree
    """(constants of all layers, the micro-batch's context)."""


@dataclass(frozen=True)
class Piece:
    """The layers of a piece in a scan, so that one layer is compiled for all."""

    layer: Split

    def forward(self, work: Work, x: Array) -> Forward:
        """All layers in order."""

        def step(x: Array, layer: tuple[Tree, Tree]) -> tuple[Array, Tree]:
            p, own = layer
            (y, loss, others), saved = self.layer.forward(p, x, (own, work.c))
            return y, (loss, others, saved)

        return _forward(*lax.scan(step, x, (work.p, work.own)))

    def backward_input(self, work: Work, saved: Tree, dy: Array) -> tuple[Array, Tree]:
        """(dx, kept)"""

        def step(dy: Array, layer: tuple[Tree, Tree, Tree]) -> tuple[Array, Tree]:
            p, own, saved = layer
            return self.layer.backward_input(p, (own, work.c), saved, dy)

        return lax.scan(step, dy, (work.p, work.own, saved), reverse=True)

    def backward_weight(self, work: Work, saved: Tree, kept: Tree) -> Tree:
        """dp of every layer"""

        def step(_: None, layer: tuple[Tree, Tree, Tree, Tree]) -> tuple[None, Tree]:
            p, own, saved, kept = layer
            return None, self.layer.backward_weight(p, (own, work.c), saved, kept)

        return lax.scan(step, None, (work.p, work.own, saved, kept))[1]

    def overlapped(
        self, to_do: Work, x: Array, done: Work, saved: Tree, dy: Array
    ) -> tuple[Forward, Array, Tree]:
        """(a forward, dx and dp of a whole backward), of different micro-batches.

        A turn of the loop has a layer of the forward, from the first on, and one of the backward,
        from the last on. Neither reads from the other, so the scheduler of XLA may put the
        transfers of one under the products of the other. It never does so across loops.
        """
        last = len(jax.tree.leaves(saved)[0]) - 1

        def step(carry: tuple[Array, Array], layer: tuple[Array, Tree, Tree]) -> Any:
            index, p, own = layer
            x, dy = carry
            (y, loss, others), new = self.layer.forward(p, x, (own, to_do.c))
            # Not by the scan, which would have to turn round a copy of all parameters.
            p, own, old = at((done.p, done.own, saved), last - index)
            dx, kept = self.layer.backward_input(p, (own, done.c), old, dy)
            dp = self.layer.backward_weight(p, (own, done.c), old, kept)
            return (y, dx), ((loss, others, new), dp)

        layers = (jnp.arange(last + 1), to_do.p, to_do.own)
        (y, dx), (of_forward, dp) = lax.scan(step, (x, dy), layers)
        return _forward(y, of_forward), dx, jax.tree.map(lambda a: a[::-1], dp)


def _forward(y: Array, of_layers: tuple[Array, Tree, Tree]) -> Forward:
    losses, others, saved = of_layers
    return Forward(y, losses.sum(), others, saved)
