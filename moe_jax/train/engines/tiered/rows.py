"""A training state in two parts: the trunk, and the routed experts of the sparse blocks as rows.

The trunk is every parameter but those experts' matrices (the module of multi-token prediction, with
its own experts, belongs to it). An expert's rows are its matrices, its part of every optimizer
moment, and its gradient; the optimizer works on rows as it would on the whole model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.config import TrainConfig
from moe_jax.train.engines.tiered.trunk import Matrices, of_expert, with_experts
from moe_jax.train.optimizer import clipped, make_optimizer


def _experts_alone(matrices: tuple[Any, ...]) -> nnx.State:
    """Parameters of the experts and nothing else, under the names that they have in the model, so
    that the optimizer treats them as it does there."""
    return with_experts(nnx.State({}), matrices)


class RowShapes(NamedTuple):
    """What one expert's rows are made of (abstract arrays)."""

    parameters: tuple[jax.ShapeDtypeStruct, ...]
    moments: tuple[jax.ShapeDtypeStruct, ...]

    def kinds(self) -> dict[str, tuple[int, ...]]:
        """Bytes of the parts of each kind of row, for placement.shelf."""
        parameters = tuple(_bytes(part) for part in self.parameters)
        moments = tuple(_bytes(part) for part in self.moments)
        return {"parameters": parameters, "moments": moments, "gradients": parameters}

    @property
    def parameter_bytes(self) -> int:
        return sum(map(_bytes, self.parameters))

    @property
    def record_bytes(self) -> int:
        """Bytes of an expert with its moments and its gradient."""
        return 2 * self.parameter_bytes + sum(map(_bytes, self.moments))


def _bytes(part: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(part.shape)) * part.dtype.itemsize


def row_shapes(config: TrainConfig) -> RowShapes:
    """Shapes of an expert's rows under the configured optimizer."""
    model = config.model
    width, hidden = model.width, model.moe.expert_hidden
    dtype = jnp.dtype(model.param_dtype)
    parameters = (
        jax.ShapeDtypeStruct((hidden, width), dtype),
        jax.ShapeDtypeStruct((width, 2 * hidden), dtype),
    )
    optimizer = make_optimizer(config.optim, config.steps)
    state = jax.eval_shape(lambda: optimizer.init(_experts_alone(_zeros(parameters))))
    return RowShapes(parameters, tuple(leaf for path, leaf in _leaves(state) if of_expert(path)))


def _zeros(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Matrices:
    return tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


class Due(NamedTuple):
    """The updates that rows lack; arrays of the host or of JAX."""

    start: Int[Any, "n"]
    """The first of them, by the count of updates done before it; ..."""
    stop: Int[Any, "n"]
    """... and the one after the last (nothing is due where it is `start`)."""
    made: Int[Any, "n"]
    """The update that the rows' gradient belongs to; in all others it is zero."""
    norm: Float[Any, "n"]
    """The global gradient norm of that update, for clipping."""


def make_advance(config: TrainConfig) -> Callable[..., tuple[Matrices, Matrices]]:
    """(parameters, moments, gradients, Due) -> (parameters, moments) after the due updates.

    Each row goes through the configured optimizer by itself, at the count and learning rate of the
    update in question: the same arithmetic whenever it is done, and whatever lies beside it. With
    every missed update due (placement.mode exact) that is dense AdamW. With the gradient's own
    alone (sparse) it is lazy AdamW: an expert that no token chose keeps its parameters and moments
    bit for bit, where dense AdamW decays both and lets the parameters drift by the old moments;
    bias correction goes by the updates of the whole model, as in dense AdamW.
    """
    optimizer = make_optimizer(config.optim, config.steps)
    limit = config.optim.clip_norm

    def one(p: Matrices, m: Matrices, g: Matrices, count: Array) -> tuple[Matrices, Matrices]:
        parameters = _experts_alone(p)
        leaves, form = jax.tree_util.tree_flatten_with_path(optimizer.init(parameters))
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

    def row(p: Matrices, m: Matrices, g: Matrices, count: Array, due: Due) -> Any:
        g = clipped(g, due.norm, limit)
        g = jax.tree.map(lambda leaf: jnp.where(count == due.made, leaf, 0), g)
        return jax.tree.map(
            lambda a, b: jnp.where(count < due.stop, a, b), one(p, m, g, count), (p, m)
        )

    def advance(p: Matrices, m: Matrices, g: Matrices, due: Due) -> tuple[Matrices, Matrices]:
        def body(i: Array, held: tuple[Matrices, Matrices]) -> tuple[Matrices, Matrices]:
            return jax.vmap(row)(*held, g, due.start + i, due)

        return lax.fori_loop(0, jnp.max(due.stop - due.start), body, (p, m))

    return advance
