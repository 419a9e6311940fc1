"""A run whose student starts as the sparse upcycling of its teacher (distill/upcycle.py)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config import ModelConfig, TrainConfig, fields, require
from moe_jax.distill.teacher import Teacher
from moe_jax.distill.upcycle import UpcycleConfig, sparse_config, upcycle
from moe_jax.parallel.rows import place_whole
from moe_jax.train.state import TrainState

SAME = (
    *("vocabulary", "width", "layers", "attention.", "tied_embedding", "norm_epsilon"),
    *("rope_base", "mtp_depth", "moe.shared_experts", "moe.normalise", "moe.scale", "moe.rule"),
    *("moe.groups", "moe.capacity_factor"),
)
"""Settings, or beginnings of their names, that the student must share with its teacher. With others
it would compute another function. The sizes and the number of its experts are its own."""
IMPLEMENTATION = "implementation"
"""Settings whose names end like this change how something is computed, but not its value."""


def upcycle_config(config: TrainConfig, dense: ModelConfig) -> UpcycleConfig:
    """The settings that upcycle the teacher to a student of this shape.

    UserError: the experts do not divide the teacher's feed-forward into equal parts, or do not make
    up whole copies of it.
    """
    moe = config.model.moe
    distill = config.distill
    hidden = dense.dense_hidden
    require(
        hidden % moe.expert_hidden == 0,
        f"distill.upcycle: model.moe.expert_hidden={moe.expert_hidden} does not divide the "
        f"teacher's dense_hidden={hidden}",
    )
    parts = hidden // moe.expert_hidden
    require(
        moe.experts % parts == 0 and moe.experts_per_token % parts == 0,
        f"distill.upcycle: {parts} experts of model.moe.expert_hidden={moe.expert_hidden} are one "
        f"copy of the teacher's dense_hidden={hidden}: make experts={moe.experts} and "
        f"experts_per_token={moe.experts_per_token} multiples of {parts}",
    )
    return UpcycleConfig(
        experts=moe.experts,
        experts_per_token=moe.experts_per_token,
        granularity=parts,
        first=config.model.dense_layers,
        gate=moe.gate,
        noise=distill.upcycle_noise,
        reinitialised=distill.upcycle_reinitialised,
        seed=config.seed,
    )


def require_upcyclable(config: TrainConfig, dense: ModelConfig) -> None:
    """UserError unless the student's shape is the teacher's with experts for feed-forwards.

    The message names the options that mend it.
    """
    wanted = fields(sparse_config(dense, upcycle_config(config, dense)))
    student = fields(config.model)
    same = (*SAME, "dense_hidden") if config.model.dense_layers else SAME
    change = [
        _option(name, value)
        for name, value in wanted.items()
        if name.startswith(same) and not name.endswith(IMPLEMENTATION) and student[name] != value
    ]
    require(not change, f"distill.upcycle needs the teacher's shape: {' '.join(change)}")


def _option(name: str, value: Any) -> str:
    """The setting as it is typed on the command line (tyro)."""
    head, _, leaf = f"model.{name}".replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{head}.{leaf if value else 'no-' + leaf}"
    return f"--{head}.{leaf} {value}"


def upcycled_state(config: TrainConfig, teacher: Teacher, state: TrainState) -> TrainState:
    """The state before the first update, with the teacher's parameters and a fresh optimizer."""
    how = upcycle_config(config, teacher.model)
    # Beside the student, which may live on several devices; the teacher was loaded on one.
    where: Any = jax.tree.leaves(state.parameters)[0].sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, P())  # whole on every device of the student's mesh
    beside = place_whole(teacher.parameters, jax.tree.map(lambda _: where, teacher.parameters))
    _, parameters, router = upcycle(teacher.model, beside, how)

    def placed(new: Any, like: jax.Array) -> jax.Array:
        assert new.shape == like.shape, f"{new.shape} upcycled, {like.shape} in the student"
        # A copy: an update overwrites the student's arrays, and the teacher is still read.
        return jax.device_put(jnp.array(new, like.dtype, copy=True), like.sharding)

    return state._replace(
        parameters=jax.tree.map(placed, parameters, state.parameters),
        router=jax.tree.map(placed, router, state.router),
    )
