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
from moe_jax.model.block import Block
from moe_jax.model.transformer import Transformer
from moe_jax.moe.layer import RouterBias
from moe_jax.train.optimizer import clipped, make_optimizer
from moe_jax.train.step import TrainState

EXPERT = ("down", "gate_up")
"""An expert's matrices in the order of every tuple of them here: that of a sorted tree."""
Matrices = tuple[Array, ...]
"""down [n, F, D], gate_up [n, D, 2F]."""
_HOME = ("sparse", "blocks", "moe")


def without_experts(parameters: nnx.State) -> nnx.State:
    """The trunk's parameters."""
    flat = nnx.to_flat_state(parameters)
    return nnx.from_flat_state([(path, leaf) for path, leaf in flat if not _is_expert(path)])


def with_experts(trunk: nnx.State, matrices: tuple[Any, ...]) -> nnx.State:
    """`trunk` with the stacked experts [layers, E, …] (or anything in their place)."""
    flat = list(nnx.to_flat_state(trunk))
    flat += [((*_HOME, name), nnx.Param(m)) for name, m in zip(EXPERT, matrices, strict=True)]
    return nnx.from_flat_state(flat)


def _is_expert(path: tuple[Any, ...]) -> bool:
    return path[:3] == _HOME and path[3] in EXPERT


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
    model = config.resolved_model()
    width, hidden = model.width, model.moe.expert_hidden
    dtype = jnp.dtype(model.param_dtype)
    parameters = (
        jax.ShapeDtypeStruct((hidden, width), dtype),
        jax.ShapeDtypeStruct((width, 2 * hidden), dtype),
    )
    optimizer = make_optimizer(config.optim, config.steps, clip=False)
    state = jax.eval_shape(lambda: optimizer.init(_experts_alone(_zeros(parameters))))
    return RowShapes(parameters, tuple(leaf for path, leaf in _leaves(state) if of_expert(path)))


def _zeros(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Matrices:
    return tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def of_expert(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of an optimizer's state belongs to the routed experts' matrices."""
    names = [str(getattr(entry, "key", entry)) for entry in path]
    return any(_is_expert(tuple(names[i : i + 4])) for i in range(len(names) - 3))


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
    optimizer = make_optimizer(config.optim, config.steps, clip=False)
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


def init_trunk(config: TrainConfig) -> TrainState:
    """init_state without the experts (jit it: their initialisation is then left out)."""
    model_key, sample_key = jax.random.split(jax.random.key(config.seed))
    model = Transformer(config.resolved_model(), rngs=nnx.Rngs(params=model_key))
    _, parameters, router = nnx.split(model, nnx.Param, RouterBias)
    trunk = without_experts(parameters)
    optimizer = make_optimizer(config.optim, config.steps, clip=False).init(trunk)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, trunk, router, optimizer, jax.random.key_data(sample_key))


def init_experts(config: TrainConfig, layer: Int[Array, ""]) -> Matrices:
    """The experts of one sparse block, [E, …], as init_state makes them."""
    model = config.resolved_model()
    rngs = nnx.Rngs(params=jax.random.split(jax.random.key(config.seed))[0])
    # What Transformer draws before the sparse stack: embedding, head, dense stack.
    for _ in range(1 + (not model.tied_embedding) + (model.dense_layers > 0)):
        rngs.params()
    keys = jax.random.split(rngs.params(), model.moe_layers)
    block = Block(model, sparse=True, rngs=nnx.Rngs(params=keys[layer]))
    return tuple(getattr(block.moe, name)[...] for name in EXPERT)


def assemble(whole: TrainState, trunk: TrainState, rows: Callable[[str], list[Any]]) -> TrainState:
    """The state of the ordinary path: `whole` gives its form (abstract), `trunk` all but the
    experts, rows("parameters" | "moments") their stacked parts [layers, E, …]."""
    parameters = with_experts(trunk.parameters, tuple(rows("parameters")))
    parts, rest = iter(rows("moments")), iter(jax.tree.leaves(trunk.optimizer))
    leaves, form = jax.tree_util.tree_flatten_with_path(whole.optimizer)
    filled = [next(parts) if of_expert(path) else next(rest) for path, _ in leaves]
    return trunk._replace(parameters=parameters, optimizer=jax.tree.unflatten(form, filled))
