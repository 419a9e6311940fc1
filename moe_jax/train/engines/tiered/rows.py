"""The routed experts of the sparse blocks as rows, and the optimizer on rows.

An expert has a row of each kind: its matrices (parameters), its part of every optimizer moment
(moments), and its gradient (gradients). The optimizer works on rows as it would on the whole model.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.config import TrainConfig
from moe_jax.model.trunk import EXPERT, Matrices, of_expert, with_experts
from moe_jax.placement.records.layout import RecordLayout
from moe_jax.train.optimizer import clipped, make_optimizer


def _experts_alone(matrices: tuple[Any, ...]) -> nnx.State:
    """Parameters of the experts and nothing else, under the names that they have in the model.

    So the optimizer treats them as it does there (role_of).
    """
    return with_experts(nnx.State({}), matrices)


class RowShapes(NamedTuple):
    """Shapes and dtypes of the arrays in one expert's rows."""

    parameters: tuple[jax.ShapeDtypeStruct, ...]
    moments: tuple[jax.ShapeDtypeStruct, ...]

    def of(self, kind: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arrays of a kind of row."""
        return self.moments if kind == "moments" else self.parameters

    def layouts(self) -> dict[str, RecordLayout]:
        """The records of each kind on disk."""
        matrices = RecordLayout.of(dict(zip(EXPERT, self.parameters, strict=True)))
        moments = {f"moment_{index}": part for index, part in enumerate(self.moments)}
        return {
            "parameters": matrices,
            "moments": RecordLayout.of(moments),
            "gradients": matrices,
        }

    @property
    def parameter_bytes(self) -> int:
        return sum(map(_bytes, self.parameters))

    @property
    def record_bytes(self) -> int:
        """Bytes of an expert with its moments and its gradient."""
        return 2 * self.parameter_bytes + sum(map(_bytes, self.moments))


def _bytes(part: jax.ShapeDtypeStruct) -> int:
    return math.prod(part.shape) * part.dtype.itemsize


def row_shapes(config: TrainConfig) -> RowShapes:
    """Shapes of an expert's rows under the configured optimizer."""
    model = config.model
    width = model.width
    hidden = model.moe.expert_hidden
    dtype = jnp.dtype(model.param_dtype)
    parameters = (
        jax.ShapeDtypeStruct((hidden, width), dtype),
        jax.ShapeDtypeStruct((width, 2 * hidden), dtype),
    )
    optimizer = make_optimizer(config.optim, config.steps, config.continue_to)
    state = jax.eval_shape(lambda: optimizer.init(_experts_alone(_zeros(parameters))))
    return RowShapes(parameters, tuple(leaf for path, leaf in _leaves(state) if of_expert(path)))


def _zeros(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Matrices:
    return tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


class PendingUpdates(NamedTuple):
    """The updates that each of n rows lacks: start … stop - 1. NumPy or JAX arrays.

    An update is numbered by the count of updates before it.
    """

    start: Int[Any, "n"]
    stop: Int[Any, "n"]
    gradient_update: Int[Any, "n"]
    """The update that the row's gradient belongs to. In all others its gradient is zero."""
    norm: Float[Any, "n"]
    """The global gradient norm of that update, for clipping."""


def make_advance(config: TrainConfig) -> Callable[..., tuple[Matrices, Matrices]]:
    """(parameters, moments, gradients, PendingUpdates) -> (parameters, moments) after the updates.

    Each row goes through the configured optimizer by itself, at the count and learning rate of its
    update. The arithmetic is the same whenever it is done, and whatever lies beside the row.

    placement.mode exact: every missed update is pending, and the result is dense AdamW.
    sparse: the gradient's own update alone is pending, which is lazy AdamW. An expert that no token
    chose keeps its parameters and moments bit for bit. Dense AdamW decays both, and lets the
    parameters drift by the old moments. Bias correction counts the updates of the whole model in
    both modes.
    """
    optimizer = make_optimizer(config.optim, config.steps, config.continue_to)
    limit = config.optim.clip_norm

    def one(p: Matrices, m: Matrices, g: Matrices, count: Array) -> tuple[Matrices, Matrices]:
        parameters = _experts_alone(p)
        leaves, form = jax.tree_util.tree_flatten_with_path(optimizer.init(parameters))
        # The optimizer's state for one expert: its own moments, and counters (the only integers),
        # which all stand at the number of the update.
        moments = iter(m)
        filled = [
            next(moments)
            if of_expert(path)
            else count.astype(leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.integer)
            else leaf
            for path, leaf in leaves
        ]
        state = jax.tree.unflatten(form, filled)
        updates, state = optimizer.update(_experts_alone(g), state, parameters)
        new = [(a + b).astype(a.dtype) for a, b in zip(p, jax.tree.leaves(updates), strict=True)]
        return tuple(new), tuple(leaf for path, leaf in _leaves(state) if of_expert(path))

    def row(p: Matrices, m: Matrices, g: Matrices, count: Array, pending: PendingUpdates) -> Any:
        g = clipped(g, pending.norm, limit)
        # A missed update had a gradient of 0, which Adam and weight decay still act on.
        own = count == pending.gradient_update
        g = jax.tree.map(lambda leaf: jnp.where(own, leaf, 0), g)
        return jax.tree.map(
            lambda a, b: jnp.where(count < pending.stop, a, b), one(p, m, g, count), (p, m)
        )

    def advance(
        p: Matrices, m: Matrices, g: Matrices, pending: PendingUpdates
    ) -> tuple[Matrices, Matrices]:
        def body(i: Array, rows: tuple[Matrices, Matrices]) -> tuple[Matrices, Matrices]:
            # Rows that lack fewer updates than others pass through the rest unchanged.
            return jax.vmap(row)(*rows, g, pending.start + i, pending)

        return lax.fori_loop(0, jnp.max(pending.stop - pending.start), body, (p, m))

    return advance
