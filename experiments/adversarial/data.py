"""Adversarial data: a discriminator that refines a pool with junk, and DoReMi, beside baselines.

Every way of choosing from the pool (pool.py) trains the same student for the same steps. Only the
documents differ, or how often each is drawn.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.adversarial.lab import PLAIN, Lab, Method
from experiments.adversarial.pool import SOURCES, STATISTICS, Pool
from experiments.adversarial.settings import BATCH, LENGTH, run_config, student_config
from experiments.adversarial.text import batch_of, shuffled_batches, windows_of
from moe_jax.adversarial.reweight import (
    doremi_update,
    excess_selection,
    group_excess,
    item_weights,
)
from moe_jax.base.result import Measurement
from moe_jax.config import DistillConfig, TrainConfig
from moe_jax.objectives.adversarial import WEIGHT, weighted
from moe_jax.objectives.distillation import online_objective
from moe_jax.study.arms import Runs, run_arms, seed_values
from moe_jax.study.results import Comparison, interval_of, seed_mean
from moe_jax.train.state import TrainState

MARK = 0.3 / np.log(2)
"""Bits by which the filter should beat uniform sampling (0.3 nats)."""

ARMS = {
    "uniform": "all documents",
    "clean_only": "the oracle: the real documents",
    "filter": "adversarial: iterated discriminator, AUC stop",
    "doremi": "adversarial: DoReMi's min-max over five sources",
    "one_shot": "one discriminator, the true share kept",
    "excess": "half of the candidates, by loss less the teacher's",
    "lowest_teacher": "the true share, lowest teacher loss",
    "balance": "five sources alike",
    "random_scores": "control: as many as the filter's, at random",
    "permuted_scores": "control: the filter's scores, permuted",
    "seed_swapped": "control: junk as the seed",
    "seed_elsewhere": "control: the filter with a seed from one stretch of the text",
    "seed_only": "control: nothing but the seed",
    "extra_rounds": "control: 4 rounds after the stop",
    "clean_pool": "control: a pool without junk, filtered",
}
KD_ARMS = ("uniform", "filter", "doremi", "one_shot", "permuted_scores")
"""Arms that are run with a teacher, too (names with kd_)."""


def doremi_weights(lab: Lab, pool: Pool) -> np.ndarray:
    """float[SOURCES]: the averaged weights of DoReMi's game.

    A reference model is trained on the pool as it is. Then a proxy model and the weights play: the
    weights grow where the proxy's loss exceeds the reference's.
    """

    def play() -> dict[str, Any]:
        config = run_config(student_config(), lab.scale.data_steps, pool.seed)
        shares = pool.proportions()
        reference = lab.train(config, (rows for rows, _ in pool.mixture(shares))).model_states()
        step = lab.step(config, Method("weighted", weighted))
        read = lab.reader(config.model)
        state = lab.start(config.model, pool.seed)
        weights = jnp.asarray(shares, jnp.float32)
        total = np.zeros(len(SOURCES))
        game = pool.mixture(shares)
        for _ in range(config.steps):
            rows, source = next(game)
            batch = batch_of(rows)
            group = jnp.asarray(source)
            losses = read(state.model_states(), batch), read(reference, batch)
            weights = doremi_update(weights, group_excess(*losses, group, len(SOURCES)))
            of_row = item_weights(weights, jnp.asarray(shares), group)
            state, _ = step(state, {**batch, WEIGHT: of_row})
            total += np.asarray(weights)
        return {"weights": (total / config.steps).tolist()}

    return np.array(lab.store.once(f"data-doremi-weights-{pool.seed}", play)["weights"])


def train_on_excess(lab: Lab, pool: Pool, config: TrainConfig) -> TrainState:
    """A student on the half of each 2 · BATCH candidates with the largest excess loss.

    The excess is the student's loss less the teacher's, so the choice changes as the student
    learns, and a batch can be chosen only after the update before it.
    """
    windows = pool.windows.reshape(-1, LENGTH + 1)
    reference = lab.nats(lab.teacher_model, lab.teacher, windows)
    read = lab.reader(config.model)
    step = lab.step(config)
    state = lab.start(config.model, config.seed)
    candidates = shuffled_batches(np.arange(len(windows)), config.seed, 2 * BATCH)
    for _ in range(config.steps):
        index = next(candidates)
        loss = read(state.model_states(), batch_of(windows[index]))
        chosen = excess_selection(loss, jnp.asarray(reference[index]), BATCH)
        state, _ = step(state, batch_of(windows[index[np.asarray(chosen)]]))
    return state


def batches_of(lab: Lab, pool: Pool, choice: str) -> Iterator[np.ndarray]:
    """The windows that an arm's student reads."""
    if choice == "balance":
        return (windows for windows, _ in pool.mixture(np.ones(len(SOURCES))))
    if choice == "doremi":
        return (windows for windows, _ in pool.mixture(doremi_weights(lab, pool)))
    if choice == "seed_only":
        return shuffled_batches(windows_of(pool.clean_seed), pool.seed)
    chosen = pool.windows[pool.kept(choice)].reshape(-1, LENGTH + 1)
    return shuffled_batches(chosen, pool.seed)


def train_arm(lab: Lab, pool: Pool, arm: str) -> dict[str, float]:
    """Bits of the student that was trained on an arm's choice, with a teacher if it is kd_…"""
    config = run_config(student_config(), lab.scale.data_steps, pool.seed)
    if arm == "excess":
        state = train_on_excess(lab, pool, config)
    else:
        method = PLAIN
        if arm.startswith("kd_"):
            objective = online_objective(DistillConfig(), [lab.teacher_model])
            method = Method("kd", objective, ([lab.teacher],))
        state = lab.train(config, batches_of(lab, pool, arm.removeprefix("kd_")), method)
    return lab.bits(config.model, state.model_states())


def run(lab: Lab) -> Runs:
    """Every arm with every seed. The filter's runs hold the filter's statistics, too."""

    @cache
    def pool_of(seed: int) -> Pool:
        return Pool(lab, seed)

    names = [*ARMS, *(f"kd_{arm}" for arm in KD_ARMS)]
    plan = dict.fromkeys(names, lab.scale.seeds)
    runs = run_arms(
        lab.store, plan, lambda arm, seed: train_arm(lab, pool_of(seed), arm), prefix="data-"
    )
    for seed, filtered in zip(lab.scale.seeds, runs["filter"], strict=True):
        statistics = pool_of(seed).filtered
        filtered |= {name: statistics[name] for name in STATISTICS}
        filtered["rounds"] = len(statistics["auc"]) - 1
    return runs


def measurements(runs: Runs, lab: Lab) -> list[Measurement]:
    """First the agreed names, then every arm against uniform sampling."""
    seeds = lab.scale.seeds
    compared = Comparison(runs, seeds)
    agreed = {
        "data_minus_kd_bits": ("kd_filter", "kd_uniform"),
        "data_control_minus_kd_bits": ("kd_one_shot", "kd_uniform"),
        "data_doremi_minus_kd_bits": ("kd_doremi", "kd_uniform"),
        "data_permuted_minus_kd_bits": ("kd_permuted_scores", "kd_uniform"),
        "data_filter_minus_one_shot_bits": ("filter", "one_shot"),
        "data_extra_rounds_minus_filter_bits": ("extra_rounds", "filter"),
        "data_clean_pool_cost_bits": ("clean_pool", "clean_only"),
    }
    rows = [compared.difference(name, *pair) for name, pair in agreed.items()]
    others = [arm for arm in ARMS if arm != "uniform"]
    rows += [compared.difference(f"data_{a}_minus_uniform_bits", a, "uniform") for a in others]
    rows += [compared.mean(f"data_{arm}_bits", arm) for arm in runs]
    for key in (*STATISTICS, "rounds"):
        unit = "rounds" if key == "rounds" else "fraction"
        values = seed_values(runs, "filter", key)
        rows.append(seed_mean(f"data_filter_{key}", values, unit=unit, seeds=seeds))
    return rows


def verdict(rows: Mapping[str, Measurement]) -> str:
    """What the filter and DoReMi do, against their marks and their controls."""
    gain = interval_of(rows["data_filter_minus_uniform_bits"])
    over_one_shot = interval_of(rows["data_filter_minus_one_shot_bits"])
    met = "meets" if gain.mean <= -MARK else "misses"
    if over_one_shot.excludes(0):
        beats = "better than" if over_one_shot.high < 0 else "worse than"
    else:
        beats = "not distinguishable from"
    return (
        f"Data: the iterated filter ends {gain.mean:+.3f} bits/byte from uniform sampling and "
        f"{met} the mark of -{MARK:.2f}. The clean-only oracle ends "
        f"{rows['data_clean_only_minus_uniform_bits'].value:+.3f} from it, DoReMi "
        f"{rows['data_doremi_minus_uniform_bits'].value:+.3f}. On top of KD the filter adds "
        f"{rows['data_minus_kd_bits'].value:+.3f}, and the one-shot classifier, which is not "
        f"adversarial, {rows['data_control_minus_kd_bits'].value:+.3f}. Without a teacher the "
        f"iteration is {beats} the one-shot classifier ({over_one_shot.mean:+.3f})."
    )
