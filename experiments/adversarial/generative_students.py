"""The students of the generative part: a warm start for each seed, and how each arm goes on.

This file builds the discriminator's step. Every other step comes from lab.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.adversarial.lab import PLAIN, Lab, Method
from experiments.adversarial.settings import (
    BATCH,
    LENGTH,
    run_config,
    student_config,
    window_flops,
)
from experiments.adversarial.text import batch_of, shuffled_batches, windows_of
from moe_jax.adversarial.generative import group_advantage, make_discriminator
from moe_jax.base.initial import root_key
from moe_jax.config import DistillConfig, ModelConfig
from moe_jax.model.abstract import graph_of
from moe_jax.model.generate import generate
from moe_jax.objectives.base import OWN
from moe_jax.objectives.distillation import States, online_objective, own_batch
from moe_jax.objectives.policy import (
    ADVANTAGE,
    DiscriminatorState,
    GenerativeConfig,
    make_discriminator_step,
    policy_objective,
)

PROMPT = 16
"""Bytes that are given and continued."""
PROMPTS = 4
"""Prompts of a round."""
SETTINGS = GenerativeConfig(group=8)
BYTES = 256
"""Ids that are written: no specials."""
REWARDED = ("adversarial", "frozen", "random")
"""Arms whose students are rewarded for what they write."""
# Seeds of what students write, apart so that no two kinds of text share their draws.
WARM_TEXT = 7000
ROUND_TEXT = 9000
FIRST_ROUND = 10_000
"""The rounds number the teacher's rows from here, the discriminator's warm-up from 0."""


def continuations(
    model: ModelConfig, state: States, prompts: np.ndarray, seed: int, temperature: float = 1.0
) -> np.ndarray:
    """int[B, LENGTH + 1]: prompts int[B, PROMPT] and what a model writes after them."""
    written = generate(
        graph_of(model),
        state,
        jnp.asarray(prompts, jnp.int32),
        root_key(seed),
        count=LENGTH + 1 - PROMPT,
        vocabulary=BYTES,
        temperature=temperature,
    )
    return np.concatenate([prompts, np.asarray(written)], axis=1)


class WarmStart:
    """What the arms of a seed share: the teacher's text, the warm student, its discriminator."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.seed = seed
        self.model = student_config()
        self.text = self._teacher_text()
        self.student = lab.trained(f"generative-warm-{seed}", self.model, self._train_student)
        self.graph, parameters, router = make_discriminator(self.model, *self.student, seed)
        optimizer = optax.adamw(1e-3, weight_decay=0.01)
        self.discriminator = DiscriminatorState(parameters, router, optimizer.init(parameters))
        self.discriminator_step = lab.compiled(
            "discriminator", lambda: make_discriminator_step(self.graph, optimizer)
        )
        for index in range(lab.scale.warm_steps // 8):
            rows = self.teacher_rows(index)
            own = self.continued(self.student, rows, WARM_TEXT + index, 0.8)
            self.discriminator, _, _ = self.discriminator_step(self.discriminator, rows, own)

    def _teacher_text(self) -> np.ndarray:
        """int[teacher_text, LENGTH + 1]: beginnings of real windows that the teacher continues."""
        lab = self.lab
        documents, _ = lab.text.draw("pool", lab.scale.pool, self.seed)
        windows = windows_of(documents)
        order = np.random.default_rng([self.seed, 11]).permutation(len(windows))
        prompts = windows[order[: lab.scale.teacher_text], :PROMPT].astype(np.int32)
        parts = np.array_split(prompts, max(1, len(prompts) // 512))
        write = partial(continuations, lab.teacher_model, lab.teacher)
        return np.concatenate([write(p, 1000 * self.seed + i) for i, p in enumerate(parts)])

    def _train_student(self) -> States:
        config = run_config(self.model, self.lab.scale.warm_steps, self.seed)
        return self.lab.train(config, shuffled_batches(self.text, self.seed)).model_states()

    def teacher_rows(self, index: int) -> np.ndarray:
        """The teacher's text of a round: PROMPTS rows, each once for every sample of its group."""
        rng = np.random.default_rng([self.seed, 13, index])
        chosen = self.text[rng.permutation(len(self.text))[:PROMPTS]]
        return np.repeat(chosen, SETTINGS.group, axis=0)

    def continued(
        self, student: States, rows: np.ndarray, seed: int, temperature: float
    ) -> np.ndarray:
        """What a student writes after the beginnings of rows."""
        return continuations(self.model, student, rows[:, :PROMPT], seed, temperature)

    def scores(self) -> Callable[[DiscriminatorState, Any], Any]:
        """scores(discriminator, tokens int[B, LENGTH + 1]) -> float[B], the logits of `real`."""

        def read(discriminator: DiscriminatorState, tokens: Any) -> Any:
            return nnx.merge(self.graph, discriminator.parameters, discriminator.router)(tokens)

        return self.lab.compiled("scores", lambda: read)


def round_flops() -> float:
    """FLOPs of an adversarial round on PROMPTS · group sequences.

    In units of an update of one sequence: writing 1/3, the discriminator's update on both texts 2,
    its scores 1/3, the student's update 1, and the anchor's reading 1/3. That is 4.
    """
    return PROMPTS * SETTINGS.group * 4 * window_flops(student_config())


def updates(lab: Lab, arm: str) -> int:
    """How many updates of an arm cost as much as the adversary's rounds."""
    if arm in REWARDED:
        return lab.scale.rounds
    own = BATCH * window_flops(student_config())
    if arm == "on_policy_kd":  # the student writes its batch, and the teacher reads it
        own = own * 4 / 3 + BATCH * window_flops(lab.teacher_model) / 3
    return round(lab.scale.rounds * round_flops() / own)


def train_arm(start: WarmStart, arm: str, rate: float) -> tuple[States, dict[str, Any]]:
    """(student, the discriminator's accuracy in each round if the arm has rounds)."""
    if arm == "warm":
        return start.student, {}
    if arm == "sequence_kd":
        return _train_on_text(start, rate), {}
    if arm == "on_policy_kd":
        return _train_on_own_text(start, rate), {}
    return _train_rewarded(start, arm, rate)


def _train_on_text(start: WarmStart, rate: float) -> States:
    """Sequence-level distillation goes on."""
    lab = start.lab
    config = run_config(start.model, updates(lab, "sequence_kd"), start.seed, learning_rate=rate)
    batches = shuffled_batches(start.text, start.seed + 100)
    return lab.train(config, batches, PLAIN, lab.restart(config, start.student)).model_states()


def _train_on_own_text(start: WarmStart, rate: float) -> States:
    """On-policy distillation: the student's text, the teacher's probabilities."""
    lab = start.lab
    config = run_config(start.model, updates(lab, "on_policy_kd"), start.seed, learning_rate=rate)
    settings = DistillConfig(kind="reverse", on_policy=1.0, prompt=PROMPT)
    step = lab.step(config, Method("on-policy", online_objective(settings, [lab.teacher_model])))
    batches = shuffled_batches(start.text, start.seed + 100)
    state = lab.restart(config, start.student)
    for _ in range(config.steps):
        rows = batch_of(next(batches))
        student = state.model_states()
        key = state.step_key()
        batch = own_batch(settings, start.model, student, rows, key, vocabulary=BYTES)
        state, _ = step(state, batch, [lab.teacher])
    return state.model_states()


def _train_rewarded(start: WarmStart, arm: str, rate: float) -> tuple[States, dict[str, Any]]:
    """The policy gradient on the discriminator's scores, or on those of a control."""
    lab = start.lab
    rounds = updates(lab, arm)
    config = run_config(start.model, rounds, start.seed, learning_rate=rate, weight_decay=0.0)
    step = lab.step(config, Method("policy", policy_objective(SETTINGS, start.model)))
    scores = start.scores()
    state = lab.restart(config, start.student)
    discriminator = start.discriminator
    rng = np.random.default_rng([start.seed, 17])
    accuracy = []
    for index in range(rounds):
        rows = start.teacher_rows(FIRST_ROUND + index)
        own = start.continued(state.model_states(), rows, ROUND_TEXT + index, SETTINGS.temperature)
        # The frozen arm computes the update, too, so that all arms report the accuracy.
        updated, _, right = start.discriminator_step(discriminator, rows, own)
        accuracy.append(float(right))
        if arm == "adversarial":
            discriminator = updated
        random = arm == "random"
        rewards = rng.standard_normal(len(own)) if random else scores(discriminator, own)
        state, _ = step(state, _policy_batch(own, rewards), start.student)
    return state.model_states(), {"accuracy": accuracy}


def _policy_batch(own: np.ndarray, rewards: Any) -> dict[str, jax.Array]:
    """What the student wrote, with each sequence's reward less the mean of its prompt's group."""
    advantage = group_advantage(jnp.reshape(jnp.asarray(rewards), (PROMPTS, SETTINGS.group)))
    # Position t predicts byte t + 1, so the first of the student's own is at PROMPT - 1.
    written = np.broadcast_to(np.arange(LENGTH) >= PROMPT - 1, (len(own), LENGTH))
    return {
        "tokens": jnp.asarray(own, jnp.int32),
        "segments": jnp.ones(own.shape, jnp.int32),
        OWN: jnp.asarray(written),
        ADVANTAGE: advantage.reshape(-1).astype(jnp.float32),
    }
