"""Generative adversarial distillation from a teacher's text, beside distillation without adversary.

All arms go on from one student per seed that was warmed up on the teacher's continuations
(sequence-level distillation, Kim & Rush, arXiv:1606.07947), with one discriminator trained on that
student. They then spend the same FLOPs. A student is judged by bits on real held-out text, and over
temperatures by the teacher's bits on what it writes against its own bits on what the teacher
writes: fluent and repetitive text wins the first and loses the second.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adversarial_lab import (
    BATCH,
    LENGTH,
    Lab,
    Runs,
    difference,
    flops,
    measured,
    over_seeds,
    run_config,
    shuffled_batches,
    student_config,
    windows_of,
)
from flax import nnx

from moe_jax.adversarial.generative import distinct, group_advantage, make_discriminator
from moe_jax.base.result import Measurement
from moe_jax.config import ModelConfig
from moe_jax.distill.teacher import split_model
from moe_jax.model.attention import document_context
from moe_jax.model.generate import generate
from moe_jax.objectives.adversarial import (
    ADVANTAGE,
    DiscriminatorState,
    GenerativeConfig,
    State,
    make_discriminator_step,
    policy_objective,
    states,
)
from moe_jax.objectives.distillation import OWN, DistillConfig, online_objective, own_batch
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.step import TrainState

PROMPT = 16
"""Bytes that are given and continued."""
PROMPTS = 4
SETTINGS = GenerativeConfig(group=8)
TUNING_SEED = 100
RATES = {
    "sequence_kd": (6e-3, 3e-3, 1e-3),
    "on_policy_kd": (6e-3, 3e-3, 1e-3),
    "adversarial": (3e-4, 1e-4, 3e-5),
}
"""Learning rates; the best on a seed that is not reported is used. Frozen and random rewards take
the adversary's."""
TEMPERATURES = (0.5, 0.7, 0.8, 1.0, 1.2)
BYTES = 256
"""Ids that are written."""

ARMS = {
    "warm": "the common start, no more training",
    "sequence_kd": "goes on with the teacher's text",
    "on_policy_kd": "its own text, the teacher's probabilities",
    "adversarial": "rewarded for fooling the discriminator, which keeps learning",
    "frozen": "control: the discriminator of the warm-up, frozen",
    "random": "control: random rewards",
}
REWARDED = ("adversarial", "frozen", "random")


def continuations(
    model: ModelConfig, state: State, prompts: np.ndarray, seed: int, temperature: float = 1.0
) -> np.ndarray:
    """int[B, LENGTH + 1]: prompts int[B, PROMPT] and what a model writes after them."""
    written = generate(
        split_model(model)[0],
        state,
        jnp.asarray(prompts, jnp.int32),
        jax.random.key(seed),
        count=LENGTH + 1 - PROMPT,
        vocabulary=BYTES,
        temperature=temperature,
    )
    return np.concatenate([prompts, np.asarray(written)], axis=1)


class Stage:
    """What the arms of a seed share: prompts, the teacher's text, the warm student and its
    discriminator."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab, self.seed, self.model = lab, seed, student_config()
        documents, _ = lab.text.draw("pool", lab.scale.pool, seed)
        rng = np.random.default_rng([seed, 11])
        windows = windows_of(documents)
        chosen = windows[rng.permutation(len(windows))[: lab.scale.teacher_text]]
        prompts = chosen[:, :PROMPT].astype(np.int32)
        self.text = np.concatenate(
            [
                continuations(lab.teacher_model, lab.teacher, part, 1000 * seed + index)
                for index, part in enumerate(np.array_split(prompts, max(1, len(prompts) // 512)))
            ]
        )
        config = run_config(self.model, lab.scale.warm_steps, seed)
        self.warm = lab.kept(
            f"generative-warm-{seed}",
            self.model,
            lambda: states(lab.train(config, shuffled_batches(self.text, seed))),
        )
        self.graph, parameters, router = make_discriminator(
            self.model, self.warm[0], self.warm[1], seed
        )
        self.optimizer = optax.adamw(1e-3, weight_decay=0.01)
        self.judge = DiscriminatorState(parameters, router, self.optimizer.init(parameters))
        self.judge_step = lab.compiled(
            "discriminator", lambda: make_discriminator_step(self.graph, self.optimizer)
        )
        for index in range(lab.scale.warm_steps // 8):
            rows = self.rows(index)
            own = continuations(self.model, self.warm, rows[:, :PROMPT], 7000 + index, 0.8)
            self.judge, _, _ = self.judge_step(self.judge, rows, own)

    def rows(self, index: int) -> np.ndarray:
        """The teacher's text of a round: PROMPTS rows, each once for every sample of its group."""
        rng = np.random.default_rng([self.seed, 13, index])
        chosen = self.text[rng.permutation(len(self.text))[:PROMPTS]]
        return np.repeat(chosen, SETTINGS.group, axis=0)

    def restart(self, steps: int, **optim: Any) -> tuple[Any, TrainState]:
        """(config, state) of the warm student with a fresh optimizer and schedule."""
        config = run_config(self.model, steps, self.seed, **optim)
        parameters, router = self.warm
        optimizer = make_optimizer(config.optim, steps).init(parameters)
        fresh = self.lab.start(self.model, self.seed)
        return config, fresh._replace(parameters=parameters, router=router, optimizer=optimizer)


def round_flops() -> float:
    """Of an adversarial round on PROMPTS · group sequences: writing 1/3, the discriminator's update
    on both texts 2 and its scores 1/3, the student's update 1 and the anchor's reading 1/3, in
    units of an update of one sequence."""
    return PROMPTS * SETTINGS.group * 4 * flops(student_config())


def updates(lab: Lab, arm: str) -> int:
    """How many updates of an arm cost as much as the adversary's rounds."""
    if arm in REWARDED:
        return lab.scale.rounds
    own = BATCH * flops(student_config())
    if arm == "on_policy_kd":
        own = own * 4 / 3 + BATCH * flops(lab.teacher_model) / 3
    return round(lab.scale.rounds * round_flops() / own)


def train_arm(lab: Lab, stage: Stage, arm: str, rate: float) -> tuple[State, dict[str, Any]]:
    """(student, what the discriminator did)."""
    if arm == "warm":
        return stage.warm, {}
    steps = updates(lab, arm)
    if arm in REWARDED:
        return rewarded(lab, stage, arm, steps, rate)
    config, state = stage.restart(steps, learning_rate=rate)
    batches: Iterator[Any] = shuffled_batches(stage.text, stage.seed + 100)
    if arm == "sequence_kd":
        return states(lab.train(config, batches, state=state)), {}
    settings = DistillConfig(kind="reverse", on_policy=1.0, prompt=PROMPT)
    step = lab.step(config, "on-policy", online_objective(settings, [lab.teacher_model]))
    for _ in range(steps):
        rows = {"tokens": jnp.asarray(next(batches), jnp.int32)}
        batch = own_batch(settings, stage.model, state, rows, BYTES)
        state, _ = step(state, batch, [lab.teacher])
    return states(state), {}


def rewarded(
    lab: Lab, stage: Stage, arm: str, rounds: int, rate: float
) -> tuple[State, dict[str, Any]]:
    """The policy gradient on the discriminator's scores, or on those of a control."""
    config, state = stage.restart(rounds, learning_rate=rate, weight_decay=0.0)
    step = lab.step(config, "policy", policy_objective(SETTINGS, stage.model))
    scores = lab.compiled("scores", lambda: _scorer(stage.graph))
    judge, accuracy = stage.judge, []
    own_mask = np.broadcast_to(np.arange(LENGTH) >= PROMPT - 1, (PROMPTS * SETTINGS.group, LENGTH))
    rng = np.random.default_rng([stage.seed, 17])
    for index in range(rounds):
        rows = stage.rows(10_000 + index)
        own = continuations(
            stage.model, states(state), rows[:, :PROMPT], 9000 + index, SETTINGS.temperature
        )
        after, _, right = stage.judge_step(judge, rows, own)
        accuracy.append(float(right))
        judge = after if arm == "adversarial" else judge
        rewards = scores(judge, own) if arm != "random" else rng.standard_normal(len(own))
        advantage = group_advantage(jnp.reshape(jnp.asarray(rewards), (PROMPTS, SETTINGS.group)))
        batch = {
            "tokens": jnp.asarray(own, jnp.int32),
            "segments": jnp.ones(own.shape, jnp.int32),
            OWN: jnp.asarray(own_mask),
            ADVANTAGE: advantage.reshape(-1).astype(jnp.float32),
        }
        state, _ = step(state, batch, stage.warm)
    return states(state), {"accuracy": accuracy}


def _scorer(graph: Any) -> Any:
    def scores(judge: DiscriminatorState, tokens: Any) -> Any:
        return nnx.merge(graph, judge.parameters, judge.router)(tokens)

    return scores


def frontier(lab: Lab, stage: Stage, student: State) -> dict[str, list[float]]:
    """Over TEMPERATURES: the teacher's bits a byte on the student's text, the student's on the
    teacher's, and distinct 4-grams of the student's text."""
    documents = np.concatenate(list(lab.held.values()))
    prompts = documents[np.random.default_rng(5).permutation(len(documents))]
    prompts = prompts[: lab.scale.samples, :PROMPT].astype(np.int32)
    taught = continuations(lab.teacher_model, lab.teacher, prompts, 3)
    found: dict[str, list[float]] = {"teacher_on_own": [], "own_on_teacher": [], "distinct": []}
    for index, temperature in enumerate(TEMPERATURES):
        own = continuations(stage.model, student, prompts, 50 + index, temperature)
        on_own = _written_bits(lab, lab.teacher_model, lab.teacher, own, 1.0)
        on_taught = _written_bits(lab, stage.model, student, taught, temperature)
        found["teacher_on_own"].append(on_own)
        found["own_on_teacher"].append(on_taught)
        found["distinct"].append(distinct(jnp.asarray(own[:, PROMPT:]), 4))
    return found


def _written_bits(
    lab: Lab, model: ModelConfig, state: State, rows: np.ndarray, temperature: float
) -> float:
    """Bits a written byte of rows under a model read at a temperature."""
    graph = split_model(model)[0]

    def build() -> Any:
        def nats(state: State, tokens: Any, temperature: Any) -> Any:
            built = nnx.merge(graph, *state)
            attention = document_context(model, jnp.ones_like(tokens[:, :-1]))
            hidden, _, _ = built.hidden(tokens[:, :-1], attention)
            logits = built.logits(hidden)[..., :BYTES] / temperature
            log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
            picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
            return -picked[:, PROMPT - 1 :].mean()

        return nats

    nats = lab.compiled(("written", model), build)
    return float(nats(state, jnp.asarray(rows, jnp.int32), temperature)) / math.log(2)


def tune(lab: Lab) -> dict[str, float]:
    """The learning rate of each arm."""
    stage: list[Stage] = []

    def compute(arm: str, rate: float) -> dict[str, float]:
        if not stage:
            stage.append(Stage(lab, TUNING_SEED))
        return lab.bits(student_config(), train_arm(lab, stage[0], arm, rate)[0])

    best = {}
    for arm, rates in RATES.items():
        found = {
            rate: lab.once(f"generative-tune-{arm}-{rate:g}", lambda a=arm, r=rate: compute(a, r))[
                "bits"
            ]
            for rate in rates
        }
        best[arm] = min(rates, key=lambda rate: found[rate])
    return {arm: best.get(arm, best["adversarial"]) for arm in ARMS}


def run(lab: Lab) -> Runs:
    """Every arm, with every seed."""
    runs: Runs = {arm: [] for arm in ARMS}
    rates = tune(lab)
    for seed in lab.scale.seeds:
        stage: list[Stage] = []
        for arm in ARMS:

            def compute(arm: str = arm, seed: int = seed, stage: list[Stage] = stage) -> Any:
                if not stage:
                    stage.append(Stage(lab, seed))
                student, more = train_arm(lab, stage[0], arm, rates[arm])
                bits = lab.bits(stage[0].model, student)
                return {**bits, **frontier(lab, stage[0], student), **more}

            runs[arm].append(lab.once(f"generative-{arm}-{seed}", compute))
    return runs


def best_sum(run: Mapping[str, Any]) -> float:
    """The lowest over temperatures of both cross-entropies' mean: a point of the frontier."""
    pairs = zip(run["teacher_on_own"], run["own_on_teacher"], strict=True)
    return min((a + b) / 2 for a, b in pairs)


def measurements(runs: Runs, lab: Lab) -> list[Measurement]:
    """The agreed names first; the control of the adversary is on-policy KD or a reward without one,
    whichever is the better."""
    control = min(
        ("frozen", "random", "on_policy_kd"), key=lambda arm: sum(r["bits"] for r in runs[arm])
    )

    def row(name: str, arm: str, other: str) -> Measurement:
        return measured(name, difference(runs, arm, other), other, lab.scale, f"bits/byte ({arm})")

    found = [
        row("generative_minus_kd_bits", "adversarial", "sequence_kd"),
        row("generative_control_minus_kd_bits", control, "sequence_kd"),
        row("generative_minus_control_bits", "adversarial", control),
        row("generative_minus_warm_bits", "adversarial", "warm"),
    ]
    for arm in ARMS:
        value = over_seeds([best_sum(run) for run in runs[arm]])
        found.append(measured(f"generative_{arm}_frontier_bits", value, None, lab.scale))
    for arm in ARMS:
        value = over_seeds([run["bits"] for run in runs[arm]])
        found.append(measured(f"generative_{arm}_bits", value, None, lab.scale))
    at = TEMPERATURES.index(0.8)
    for arm in ARMS:
        value = over_seeds([run["distinct"][at] for run in runs[arm]])
        found.append(
            measured(f"generative_{arm}_distinct_4_grams", value, None, lab.scale, "fraction")
        )
    for arm in REWARDED:
        for name, part in (("first", slice(0, 10)), ("last", slice(-10, None))):
            values = [float(np.mean(run["accuracy"][part])) for run in runs[arm]]
            full = f"generative_{arm}_discriminator_accuracy_{name}"
            found.append(measured(full, over_seeds(values), None, lab.scale, "fraction"))
    return found


def verdict(values: Mapping[str, Measurement]) -> str:
    """What the discriminator's reward did beside plain distillation."""
    found = values["generative_minus_kd_bits"]
    control = values["generative_control_minus_kd_bits"]
    low, high = found.interval or (-1.0, 1.0)
    over = values["generative_minus_control_bits"].interval or [-1.0, 1.0]
    helps = high < 0 and over[1] < 0
    first, last = (
        values[f"generative_adversarial_discriminator_accuracy_{when}"].value
        for when in ("first", "last")
    )
    both = [
        values[f"generative_{arm}_frontier_bits"].value for arm in ("adversarial", "sequence_kd")
    ]
    return (
        f"generative: the student rewarded for fooling a discriminator ends {found.value:+.3f} "
        f"bits/byte from sequence KD at equal FLOPs (best control {control.value:+.3f}; on the "
        f"frontier {both[0]:.3f} against {both[1]:.3f}; accuracy of the discriminator {first:.2f} "
        f"at first, {last:.2f} at last): "
        + ("it helps" if helps else "it hurts" if low > 0 else "it does not help")
    )
