"""The programs of several layers, from those of one (parallel.gradient_split)."""

from dataclasses import dataclass

from jax import Array, lax

from moe_jax.parallel.executor.interface import Tree
from moe_jax.parallel.gradient_split import Split


@dataclass(frozen=True)
class Piece:
    """The layers of a piece in a scan, so that one layer is compiled for all."""

    layer: Split

    def forward(self, p: Tree, x: Array, own: Tree, c: Tree) -> tuple[Array, Array, Tree, Tree]:
        """(y, loss, others of every layer, saved)"""

        def step(x: Array, layer: tuple[Tree, Tree]) -> tuple[Array, Tree]:
            (y, loss, others), saved = self.layer.forward(layer[0], x, (layer[1], c))
            return y, (loss, others, saved)

        y, (losses, others, saved) = lax.scan(step, x, (p, own))
        return y, losses.sum(), others, saved

    def backward_input(
        self, p: Tree, own: Tree, c: Tree, saved: Tree, dy: Array
    ) -> tuple[Array, Tree]:
        """(dx, kept)"""

        def step(dy: Array, layer: tuple[Tree, Tree, Tree]) -> tuple[Array, Tree]:
            p, own, saved = layer
            return self.layer.backward_input(p, (own, c), saved, dy)

        return lax.scan(step, dy, (p, own, saved), reverse=True)

    def backward_weight(self, p: Tree, own: Tree, c: Tree, saved: Tree, kept: Tree) -> Tree:
        """dp of every layer"""

        def step(_: None, layer: tuple[Tree, Tree, Tree, Tree]) -> tuple[None, Tree]:
            p, own, saved, kept = layer
            return None, self.layer.backward_weight(p, (own, c), saved, kept)

        return lax.scan(step, None, (p, own, saved, kept))[1]
