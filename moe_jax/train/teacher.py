"""Training on a teacher: the task that wraps the objective and the batches of a run."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.base.console import say
from moe_jax.base.initial import named_key
from moe_jax.data.batches import WindowArrays
from moe_jax.data.cache import cache_folder, usable
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokens import TokenData
from moe_jax.distill.cache import CacheConfig, TeacherCache, build_cache
from moe_jax.distill.teacher import Teacher
from moe_jax.model.count import train_flops_per_token
from moe_jax.objectives.base import OWN, Batch, Objective
from moe_jax.objectives.distillation import (
    cached_objective,
    is_on_policy,
    online_objective,
    own_batch,
    text_batch,
)
from moe_jax.train.state import TrainState
from moe_jax.train.task import Task
from moe_jax.train.upcycled import upcycled_state

SHARD_TOKENS = 1 << 15
"""Tokens in one file of the cache. A kill loses at most one file, which a small teacher on a CPU
writes in a minute."""
TEACHER_BATCH = 8
"""Windows that the teacher reads at once for the cache."""


@dataclass(frozen=True)
class TeacherTask(Task):
    """Distillation: from a teacher that reads every batch, or from its cached outputs."""

    teacher: Teacher
    cache: TeacherCache | None = None
    """Arrays for each window of the training text. None: the teacher reads every batch."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.teacher.tokenizer

    @cached_property  # every checkpoint saves it, and it reads all parameters
    def fingerprint(self) -> str | None:
        # runs.teacher has set the teacher's compute dtype to the student's. The fingerprint must
        # not depend on it.
        model = replace(self.teacher.model, compute_dtype="float32")
        return self.teacher._replace(model=model).fingerprint()

    def memory_bytes(self) -> int:
        leaves = jax.tree.leaves((self.teacher.parameters, self.teacher.router))
        return sum(np.asarray(leaf).nbytes for leaf in leaves)

    def prepare(self, data: TokenData) -> Task:
        """The task with the teacher's cache, built or continued where the settings want one."""
        settings = self.config.distill
        if settings.cache_contents is None:
            return self
        kind, count = settings.cache_contents
        length = self.config.data.length
        steps = self.config.last_step
        seen = steps * self.config.batch * length
        tokens = len(data.train.tokens)
        if seen < tokens:
            say(
                f"these {steps} steps see {seen} tokens, the cache holds all {tokens}: "
                "--distill.cache none has the teacher read fewer"
            )
        # Whole teacher batches, so that all of them have one compiled shape.
        shard = max(1, SHARD_TOKENS // length // TEACHER_BATCH) * TEACHER_BATCH
        how = CacheConfig(kind, count, settings.temperature, batch=TEACHER_BATCH, shard=shard)
        folder = cache_folder(self.config.data.cache)
        with usable(folder):
            cache = build_cache(folder, self.teacher, data.train, length, how, say)
        return replace(self, cache=cache)

    @property
    def objective(self) -> Objective:
        settings = self.config.distill
        if self.cache is not None:
            return cached_objective(settings)
        tokens = self.teacher.tokenizer.vocabulary
        same = self.config.model.vocabulary == self.teacher.model.vocabulary
        vocabulary = None if same else tokens
        return online_objective(settings, [self.teacher.model], vocabulary=vocabulary)

    @property
    def operands(self) -> tuple[Any, ...]:
        states = (self.teacher.parameters, self.teacher.router)
        return () if self.cache is not None else ([states],)

    @property
    def beside(self) -> WindowArrays | None:
        return self.cache

    def abstract_batch(self, batch: Batch) -> Batch:
        tokens: Any = batch["tokens"]
        rows, window = tokens.shape
        extra: dict[str, tuple[tuple[int, ...], Any]] = {}
        if self.cache is not None:
            shape = (rows, self.config.data.length, self.cache.config.count)
            extra["teacher_tokens"] = (shape, jnp.int32)
            if self.cache.config.kind == "top_k":
                extra["teacher_log_p"] = (shape, jnp.float32)
        if self.config.distill.on_policy > 0:
            extra[OWN] = ((rows, window - 1), jnp.bool_)
        more: Any = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=tokens.sharding)
            for name, (shape, dtype) in extra.items()
        }
        return batch | more

    def batch(self, state: TrainState, step: int, batch: Batch) -> Batch:
        """The batch of text, or with probability `on_policy` the student's continuations of it.

        Both have the same arrays, so that one compiled step serves both.
        """
        settings = self.config.distill
        if settings.on_policy == 0:
            return batch
        sharding = batch["tokens"].sharding
        if is_on_policy(settings, self.config.seed, step):
            states = (state.parameters, state.router)
            tokenizer = self.teacher.tokenizer
            key = named_key(state.step_key(), "own batch")
            batch = own_batch(
                settings,
                self.config.model,
                states,
                batch,
                key,
                vocabulary=tokenizer.vocabulary,
                end=tokenizer.eos,
            )
        else:
            batch = text_batch(batch)
        # The generator's output is wherever its computation put it.
        return jax.device_put(batch, sharding)

    def first_state(self, state: TrainState) -> TrainState:
        """Upcycled from the teacher where that is asked for."""
        upcycle = self.config.distill.upcycle
        return upcycled_state(self.config, self.teacher, state) if upcycle else state

    def flops_per_token(self) -> float:
        """The student's FLOPs, and those of the teacher's forward pass.

        A forward pass is a third of a training step. A cache costs nothing in training. Tokens that
        the student writes are not counted.
        """
        own = super().flops_per_token()
        if self.cache is not None:
            return own
        return own + train_flops_per_token(self.teacher.model, self.config.data.length) / 3
