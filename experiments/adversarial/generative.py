"""Generative adversarial distillation from a teacher's text, beside distillation without adversary.

All arms go on from one student per seed that was warmed up on the teacher's continuations
(sequence-level distillation, Kim & Rush, arXiv:1606.07947), with one discriminator trained on that
student. They then spend the same FLOPs. A student is judged by bits on real held-out text. It is
also judged, over temperatures, by the teacher's bits on what it writes against its own bits on what
the teacher writes. Fluent and repetitive text wins the first and loses the second.
"""

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.adversarial.generative_students import (
    BYTES,
    PROMPT,
    REWARDED,
    WarmStart,
    continuations,
    train_arm,
)
from experiments.adversarial.lab import Lab
from experiments.adversarial.settings import student_config
from moe_jax.adversarial.generative import distinct
from moe_jax.base.result import Measurement
from moe_jax.config import ModelConfig
from moe_jax.model.abstract import graph_of
from moe_jax.objectives.distillation import States
from moe_jax.study.arms import Run, Runs, run_arms
from moe_jax.study.results import Comparison, interval_of, seed_mean

TUNING_SEED = 100
RATES = {
    "sequence_kd": (6e-3, 3e-3, 1e-3),
    "on_policy_kd": (6e-3, 3e-3, 1e-3),
    "adversarial": (3e-4, 1e-4, 3e-5),
}
"""Learning rates. The best on a seed that is not reported is used, the adversary's also for frozen
and random rewards."""
TEMPERATURES = (0.5, 0.7, 0.8, 1.0, 1.2)

ARMS = {
    "warm": "the common start, no more training",
    "sequence_kd": "goes on with the teacher's text",
    "on_policy_kd": "its own text, the teacher's probabilities",
    "adversarial": "rewarded for fooling the discriminator, which keeps learning",
    "frozen": "control: the discriminator of the warm-up, frozen",
    "random": "control: random rewards",
}
CONTROLS = ("frozen", "random", "on_policy_kd")
"""The adversary is compared with the best of these."""


def frontier(lab: Lab, start: WarmStart, student: States) -> dict[str, list[float]]:
    """Three numbers for each of TEMPERATURES.

    teacher_on_own: the teacher's bits a byte on the student's text. own_on_teacher: the student's
    bits on the teacher's text. distinct: the share of distinct 4-grams in the student's text.
    """
    documents = np.concatenate(list(lab.held_out.values()))
    prompts = documents[np.random.default_rng(5).permutation(len(documents))]
    prompts = prompts[: lab.scale.samples, :PROMPT].astype(np.int32)
    of_teacher = continuations(lab.teacher_model, lab.teacher, prompts, 3)
    found: dict[str, list[float]] = {"teacher_on_own": [], "own_on_teacher": [], "distinct": []}
    for index, temperature in enumerate(TEMPERATURES):
        own = start.continued(student, prompts, 50 + index, temperature)
        reader = _written_bits(lab, lab.teacher_model)
        found["teacher_on_own"].append(reader(lab.teacher, own, 1.0))
        reader = _written_bits(lab, start.model)
        found["own_on_teacher"].append(reader(student, of_teacher, temperature))
        found["distinct"].append(distinct(jnp.asarray(own[:, PROMPT:]), 4))
    return found


def _written_bits(lab: Lab, model: ModelConfig) -> Any:
    """bits(state, rows, temperature): a model's mean bits a byte of what follows the prompts."""
    graph = graph_of(model)

    def nats(state: States, tokens: Any, temperature: Any) -> Any:
        built = nnx.merge(graph, *state)
        hidden, _ = built.hidden(tokens[:, :-1], jnp.ones_like(tokens[:, :-1]))
        logits = built.logits(hidden)[..., :BYTES] / temperature
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        return -picked[:, PROMPT - 1 :].mean()

    compiled = lab.compiled(("written", model), lambda: nats)

    def bits(state: States, rows: np.ndarray, temperature: float) -> float:
        return float(compiled(state, jnp.asarray(rows, jnp.int32), temperature)) / math.log(2)

    return bits


def tune(lab: Lab) -> dict[str, float]:
    """The learning rate of each arm."""
    # The start is expensive, and not needed if all trials are finished.
    start = lru_cache(lambda: WarmStart(lab, TUNING_SEED))

    def bits_of(arm: str, rate: float) -> float:
        def train() -> dict[str, float]:
            return lab.bits(student_config(), train_arm(start(), arm, rate)[0])

        return lab.store.once(f"generative-tune-{arm}-{rate:g}", train)["bits"]

    best = {arm: min(rates, key=partial(bits_of, arm)) for arm, rates in RATES.items()}
    return {arm: best.get(arm, best["adversarial"]) for arm in ARMS}


def run(lab: Lab) -> Runs:
    """Every arm with every seed."""
    rates = tune(lab)
    start_of = lru_cache(1)(partial(WarmStart, lab))  # seeds are the outer loop: one is enough

    def run_one(arm: str, seed: int) -> dict[str, Any]:
        start = start_of(seed)
        student, more = train_arm(start, arm, rates[arm])
        return {**lab.bits(start.model, student), **frontier(lab, start, student), **more}

    return run_arms(lab.store, dict.fromkeys(ARMS, lab.scale.seeds), run_one, prefix="generative-")


def frontier_bits(run: Run) -> float:
    """The lowest over temperatures of both cross-entropies' mean: a point of the frontier."""
    pairs = zip(run["teacher_on_own"], run["own_on_teacher"], strict=True)
    return min((a + b) / 2 for a, b in pairs)


def measurements(runs: Runs, lab: Lab) -> list[Measurement]:
    """The agreed names first. The control is the best of CONTROLS."""
    seeds = lab.scale.seeds
    compared = Comparison(runs, seeds)
    control = compared.lowest(CONTROLS)
    agreed = {
        "generative_minus_kd_bits": ("adversarial", "sequence_kd"),
        "generative_control_minus_kd_bits": (control, "sequence_kd"),
        "generative_minus_control_bits": ("adversarial", control),
        "generative_minus_warm_bits": ("adversarial", "warm"),
    }
    rows = [compared.difference(name, arm, base, arm) for name, (arm, base) in agreed.items()]
    for arm in ARMS:
        values = [frontier_bits(run) for run in runs[arm]]
        name = f"generative_{arm}_frontier_bits"
        rows.append(seed_mean(name, values, unit="bits/byte", seeds=seeds))
    rows += [compared.mean(f"generative_{arm}_bits", arm) for arm in ARMS]
    shown = TEMPERATURES.index(0.8)
    for arm in ARMS:
        values = [run["distinct"][shown] for run in runs[arm]]
        name = f"generative_{arm}_distinct_4_grams"
        rows.append(seed_mean(name, values, unit="fraction", seeds=seeds))
    for arm in REWARDED:
        for when, rounds in (("first", slice(0, 10)), ("last", slice(-10, None))):
            values = [float(np.mean(run["accuracy"][rounds])) for run in runs[arm]]
            name = f"generative_{arm}_discriminator_accuracy_{when}"
            rows.append(seed_mean(name, values, unit="fraction", seeds=seeds))
    return rows


def verdict(rows: Mapping[str, Measurement]) -> str:
    """What the discriminator's reward does beside plain distillation."""
    over_kd = interval_of(rows["generative_minus_kd_bits"])
    over_control = interval_of(rows["generative_minus_control_bits"])
    if over_kd.high < 0 and over_control.high < 0:
        effect = "helps"
    else:
        effect = "hurts" if over_kd.low > 0 else "does not help"
    accuracy = "generative_adversarial_discriminator_accuracy"
    return (
        f"Generative: the student rewarded for fooling a discriminator ends {over_kd.mean:+.3f} "
        "bits/byte from sequence KD at equal FLOPs. The best control ends "
        f"{rows['generative_control_minus_kd_bits'].value:+.3f} from it. On the frontier of "
        f"quality and coverage the student has "
        f"{rows['generative_adversarial_frontier_bits'].value:.3f} bits/byte, sequence KD "
        f"{rows['generative_sequence_kd_frontier_bits'].value:.3f}. The discriminator's accuracy "
        f"is {rows[f'{accuracy}_first'].value:.2f} at first and "
        f"{rows[f'{accuracy}_last'].value:.2f} at last. The adversary {effect}."
    )
