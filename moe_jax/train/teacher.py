"""The teacher of a run: found by name, checked against the student, read by the training step.

find_teacher -> with_teacher (its tokenizer) -> prepare (its cache) -> Lesson (objective, arguments,
batches, first state), which is all that train/loop.py knows of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.base.console import say
from moe_jax.base.errors import UserError
from moe_jax.config import TrainConfig
from moe_jax.data.cache import cache_folder, usable
from moe_jax.data.tokens import TokenData
from moe_jax.distill.cache import CacheConfig, TeacherCache, build_cache
from moe_jax.distill.teacher import Teacher
from moe_jax.model.count import train_flops_per_token
from moe_jax.objectives.distillation import (
    OWN,
    cached_objective,
    is_on_policy,
    online_objective,
    own_batch,
    text_batch,
)
from moe_jax.objectives.next_token import Batch
from moe_jax.parallel.mesh import batch_sharding, replicated
from moe_jax.train.step import Objective, TrainState
from moe_jax.train.upcycled import upcycled_state

PART_TOKENS = 1 << 15
"""Tokens in one file of the cache: what a kill may cost, a minute of a small teacher on a CPU."""
TOGETHER = 8
"""Windows that the teacher reads at once for the cache."""


def identity(teacher: Teacher | None) -> str | None:
    """The teacher's fingerprint, whatever dtype it computes in here."""
    if teacher is None:
        return None
    return teacher._replace(model=replace(teacher.model, compute_dtype="float32")).fingerprint()


def require_same_teacher(mine: str | None, saved: str | None, out: Path) -> None:
    """A run goes on with the teacher that it began with, by fingerprint. UserError otherwise."""
    if mine == saved:
        return
    if saved is None or mine is None:
        what = "without a teacher" if saved is None else "with one: give --distill.teacher"
    else:
        what = "with another one: the teacher has changed since; restore it"
    raise UserError(f"{out} holds a run {what}, or choose another --out")


@dataclass(frozen=True)
class Lesson:
    """What a training step needs of a teacher."""

    config: TrainConfig
    teacher: Teacher
    fingerprint: str
    cache: TeacherCache | None
    """Beside the windows of the training text; None: the teacher reads every batch."""

    @property
    def objective(self) -> Objective:
        """For make_step."""
        settings, model = self.config.distill, self.teacher.model
        if self.cache is not None:
            return cached_objective(settings)
        tokens = self.teacher.tokenizer.vocabulary
        same = self.config.resolved_model().vocabulary == model.vocabulary
        return online_objective(settings, [model], vocabulary=None if same else tokens)

    def arguments(self, mesh: Mesh) -> tuple[Any, ...]:
        """What a step takes besides state and batch, a copy on every device."""
        if self.cache is not None:
            return ()
        state = (self.teacher.parameters, self.teacher.router)
        return ([jax.device_put(state, replicated(mesh))],)

    def rows(self, tokens: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
        """What a batch has besides tokens and segments."""
        batch, length = self.config.batch, self.config.data.length
        extra: dict[str, tuple[tuple[int, ...], Any]] = {}
        if self.cache is not None:
            shape = (batch, length, self.cache.config.count)
            extra["teacher_tokens"] = (shape, jnp.int32)
            if self.cache.config.kind == "top_k":
                extra["teacher_log_p"] = (shape, jnp.float32)
        if self.config.distill.on_policy > 0:
            extra[OWN] = ((batch, tokens.shape[1] - 1), jnp.bool_)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=tokens.sharding)
            for name, (shape, dtype) in extra.items()
        }

    def taught(
        self, step: Callable[..., Any], more: tuple[Any, ...], mesh: Mesh, first: int
    ) -> Callable[..., Any]:
        """(state, batch) -> step of the batch, or of what the student makes of it; `more`: the
        step's `arguments`; `first` updates are done already."""
        settings, number = self.config.distill, first

        def one(state: TrainState, batch: Batch) -> Any:
            nonlocal number
            if settings.on_policy > 0:
                own = is_on_policy(settings, self.config.seed, number)
                batch = self._own(state, batch) if own else text_batch(batch)
                batch = jax.device_put(batch, batch_sharding(mesh))
            number += 1
            return step(state, batch, *more)

        return one

    def _own(self, state: TrainState, batch: Batch) -> Batch:
        model, tokens = self.config.resolved_model(), self.teacher.tokenizer.vocabulary
        return own_batch(self.config.distill, model, state, batch, tokens)

    def first_state(self, state: TrainState) -> TrainState:
        """The state before the first update: upcycled from the teacher where that is asked for."""
        upcycled = self.config.distill.upcycle
        return upcycled_state(self.config, self.teacher, state) if upcycled else state

    def flops_per_token(self) -> float:
        """Of the teacher's forward pass, a third of what its training would take; 0 with a cache.
        What the student writes is not counted."""
        if self.cache is not None:
            return 0.0
        return train_flops_per_token(self.teacher.model, self.config.data.length) / 3


def prepare(config: TrainConfig, teacher: Teacher, fingerprint: str, data: TokenData) -> Lesson:
    """The lesson, with the teacher's cache made (or gone on with) where the settings want one."""
    if config.distill.cache_contents is None:
        return Lesson(config, teacher, fingerprint, None)
    (kind, count), length = config.distill.cache_contents, config.data.length
    seen, tokens = config.steps * config.batch * length, len(data.train.tokens)
    if seen < tokens:
        say(
            f"these {config.steps} steps see {seen} tokens, the cache holds all {tokens}: "
            "--distill.cache none has the teacher read fewer"
        )
    shard = max(1, PART_TOKENS // length // TOGETHER) * TOGETHER
    how = CacheConfig(kind, count, config.distill.temperature, batch=TOGETHER, shard=shard)
    folder = cache_folder(config.data.cache)
    with usable(folder):
        cache = build_cache(folder, teacher, data.train, length, how, say)
    return Lesson(config, teacher, fingerprint, cache)


def teacher_bytes(teacher: Teacher | None) -> int:
    """Bytes of a teacher's parameters."""
    leaves = [] if teacher is None else jax.tree.leaves((teacher.parameters, teacher.router))
    return sum(np.asarray(leaf).nbytes for leaf in leaves)
