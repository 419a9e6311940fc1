"""Adversarial data: a discriminator that refines a pool with junk, and DoReMi, beside baselines.

A pool of documents is 60% real text of three domains, 25% shuffled (a document's bytes in random
order) and 15% repetitive (a short piece of it again and again). Every way of choosing trains the
same student for the same steps; what differs is the documents, or how often each is drawn.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from adversarial_lab import (
    BATCH,
    LENGTH,
    WINDOWS,
    Lab,
    Runs,
    Scale,
    batch_of,
    difference,
    measured,
    over_seeds,
    run_config,
    shuffled_batches,
    student_config,
    windows_of,
)
from flax import nnx

from moe_jax.adversarial.filter import (
    FilterConfig,
    Filtered,
    best,
    iterated_filter,
    ngram_features,
    one_shot_filter,
)
from moe_jax.adversarial.reweight import (
    doremi_update,
    excess_selection,
    group_excess,
    item_weights,
)
from moe_jax.base.result import Measurement
from moe_jax.distill.teacher import split_model
from moe_jax.objectives.adversarial import WEIGHT, sequence_nats, states, weighted_objective
from moe_jax.objectives.distillation import DistillConfig, online_objective

SOURCES = ("code", "prose", "tables", "shuffled", "repetitive")
CLEAN = 0.6
JUNK = {"shuffled": 0.25, "repetitive": 0.15}
SEED_SHARE = 0.15
"""Clean seed documents, as a share of the pool's size."""
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
FACTS = ("precision", "recall", "one_shot_precision", "clean_pool_kept", "elsewhere_kept")


class Pool:
    """A seed's documents, made and judged once."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab, self.seed, size = lab, seed, lab.scale.pool
        self.rng = np.random.default_rng([seed, 7])
        clean, domain = lab.text.draw("pool", round(CLEAN * size), seed)
        junk = [self._junk(kind, round(JUNK[kind] * size)) for kind in JUNK]
        self.documents = clean + junk[0] + junk[1]
        kinds = [np.full(len(part), 3 + i) for i, part in enumerate(junk)]
        self.source = np.concatenate([domain, *kinds])
        self.clean = self.source < 3
        self.clean_seed, _ = lab.text.draw("seed", round(SEED_SHARE * size), seed)
        self.other_seed, _ = lab.text.draw("stretch", round(SEED_SHARE * size), seed)
        half = len(self.clean_seed) // 2
        self.junk_seed = self._junk("shuffled", half) + self._junk("repetitive", half)
        self.windows = windows_of(self.documents).reshape(-1, WINDOWS, LENGTH + 1)
        self.share = float(self.clean.mean())

    def _junk(self, kind: str, count: int) -> list[bytes]:
        """Made of real text."""
        role_seed = 1000 + self.seed + 50 * int(self.rng.integers(1 << 20))
        texts, _ = self.lab.text.draw("pool", 2 * count + 10, role_seed)
        texts = [texts[i] for i in self.rng.permutation(len(texts))[:count]]
        if kind == "shuffled":
            return [bytes(self.rng.permutation(np.frombuffer(t, np.uint8))) for t in texts]
        pieces = [t[: int(self.rng.integers(8, 33))] for t in texts]
        return [(p * len(t))[: len(t)] for p, t in zip(pieces, texts, strict=True)]

    def kept(self) -> dict[str, np.ndarray]:
        """bool[documents] of every arm that is a choice of the pool's documents."""

        def compute() -> dict[str, Any]:
            seed, pool, junk, other = (
                ngram_features(part, buckets=2048)
                for part in (self.clean_seed, self.documents, self.junk_seed, self.other_seed)
            )
            found, forced = (
                iterated_filter(seed, pool, FilterConfig(extra=e), self._rng()) for e in (0, 4)
            )
            share = found.kept.mean()
            permuted = found.kept[self._rng(1).permutation(len(pool))]
            clean = iterated_filter(seed, pool[self.clean], FilterConfig(), self._rng())
            nats = self.lab.nats(
                self.lab.teacher_model, self.lab.teacher, self.windows.reshape(-1, LENGTH + 1)
            )
            chosen = {
                "uniform": np.ones(len(pool), bool),
                "clean_only": self.clean,
                "filter": found.kept,
                "one_shot": one_shot_filter(seed, pool, self.share, self._rng()).kept,
                "lowest_teacher": best(-nats.reshape(-1, WINDOWS).mean(-1), self.share),
                "random_scores": best(self._rng(2).random(len(pool)), share),
                "permuted_scores": permuted,
                "seed_swapped": iterated_filter(junk, pool, FilterConfig(), self._rng()).kept,
                "seed_elsewhere": iterated_filter(other, pool, FilterConfig(), self._rng()).kept,
                "extra_rounds": forced.kept,
                "clean_pool": _spread(clean, self.clean),
            }
            precision = float(self.clean[found.kept].mean())
            recall = float(found.kept[self.clean].mean())
            return {
                "kept": {k: np.flatnonzero(v).tolist() for k, v in chosen.items()},
                "auc": found.auc,
                "forced_auc": forced.auc,
                "precision": precision,
                "recall": recall,
                "one_shot_precision": float(self.clean[chosen["one_shot"]].mean()),
                "elsewhere_kept": float(np.mean(chosen["seed_elsewhere"])),
                "clean_pool_kept": float(clean.kept.mean()),
            }

        self.facts = self.lab.once(f"data-filters-{self.seed}", compute)
        return {
            name: np.isin(np.arange(len(self.documents)), kept)
            for name, kept in self.facts["kept"].items()
        }

    def _rng(self, part: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, part])

    def mixture(self, weights: np.ndarray, rows: int = BATCH) -> Iterator[tuple[Any, Any]]:
        """(windows, their sources), a source drawn by its weight and then one of its windows."""
        rng = self._rng(3)
        places = [np.flatnonzero(self.source == s) for s in range(len(SOURCES))]
        while True:
            source = rng.choice(len(SOURCES), rows, p=weights / weights.sum())
            document = [rng.choice(places[s]) for s in source]
            yield self.windows[document, rng.integers(0, WINDOWS, rows)], source

    def proportions(self) -> np.ndarray:
        return np.bincount(self.source, minlength=len(SOURCES)) / len(self.source)


def _spread(found: Filtered, clean: np.ndarray) -> np.ndarray:
    kept = np.zeros(len(clean), bool)
    kept[np.flatnonzero(clean)[found.kept]] = True
    return kept


def doremi_weights(lab: Lab, pool: Pool, seed: int) -> np.ndarray:
    """A reference trained on the pool as it is, then the proxy's game; the averaged weights."""

    def compute() -> dict[str, Any]:
        config = run_config(student_config(), lab.scale.data_steps, seed)
        shares = pool.proportions()
        draws = (rows for rows, _ in pool.mixture(shares))
        reference = states(lab.train(config, draws))
        step = lab.step(config, "weighted", weighted_objective)
        state, weights = lab.start(config.model, seed), jnp.asarray(shares, jnp.float32)
        graph = split_model(config.model)[0]

        def build() -> Callable[..., Any]:
            return lambda s, b: sequence_nats(nnx.merge(graph, *s), b, LENGTH)

        nats, total = lab.compiled("batch-nats", build), np.zeros(len(SOURCES))
        game = pool.mixture(shares)
        for _ in range(config.steps):
            rows, source = next(game)
            batch, group = batch_of(rows), jnp.asarray(source)
            losses = nats(states(state), batch), nats(reference, batch)
            excess = group_excess(*losses, group, len(SOURCES))
            weights = doremi_update(weights, excess)
            of_row = item_weights(weights, jnp.asarray(shares), group)
            state, _ = step(state, {**batch, WEIGHT: of_row})
            total += np.asarray(weights)
        return {"weights": (total / config.steps).tolist()}

    return np.array(lab.once(f"data-doremi-weights-{seed}", compute)["weights"])


def excess_batches(lab: Lab, pool: Pool, current: dict[str, Any], seed: int) -> Iterator[Any]:
    """Half of the candidates, by the student's loss less the teacher's; `current` holds the
    student."""
    model = student_config()
    windows = pool.windows.reshape(-1, LENGTH + 1)
    reference = lab.nats(lab.teacher_model, lab.teacher, windows)
    graph = split_model(model)[0]

    def build() -> Callable[..., Any]:
        return lambda s, b: sequence_nats(nnx.merge(graph, *s), b, LENGTH)

    nats = lab.compiled("batch-nats", build)
    for index in shuffled_batches(np.arange(len(windows)), seed, 2 * BATCH):
        loss = nats(states(current["state"]), batch_of(windows[index]))
        chosen = excess_selection(loss, jnp.asarray(reference[index]), BATCH)
        yield batch_of(windows[index[np.asarray(chosen)]])


def train_arm(lab: Lab, pool: Pool, kept: dict[str, np.ndarray], arm: str, seed: int) -> dict:
    """Bits of the student that was trained on an arm's choice, with a teacher if it is kd_…"""
    config = run_config(student_config(), lab.scale.data_steps, seed)
    choice = arm.removeprefix("kd_")
    if arm == "excess":
        current: dict[str, Any] = {"state": lab.start(config.model, seed)}
        step = lab.step(config, "plain")
        batches = excess_batches(lab, pool, current, seed)
        for _ in range(config.steps):
            current["state"], _ = step(current["state"], next(batches))
        return lab.bits(config.model, states(current["state"]))
    if choice in ("doremi", "balance"):
        even = np.ones(len(SOURCES))
        weights = even if choice == "balance" else doremi_weights(lab, pool, seed)
        rows: Iterator[Any] = (windows for windows, _ in pool.mixture(weights))
    elif choice == "seed_only":
        rows = shuffled_batches(windows_of(pool.clean_seed), seed)
    else:
        rows = shuffled_batches(pool.windows[kept[choice]].reshape(-1, LENGTH + 1), seed)
    if arm.startswith("kd_"):
        objective = online_objective(DistillConfig(), [lab.teacher_model])
        state = lab.train(config, rows, "kd", objective, ([lab.teacher],))
    else:
        state = lab.train(config, rows)
    return lab.bits(config.model, states(state))


def run(lab: Lab) -> Runs:
    """Every arm, with every seed; the run of the filter holds what it found, too."""
    names = [*ARMS, *(f"kd_{arm}" for arm in KD_ARMS)]
    runs: Runs = {name: [] for name in names}
    for seed in lab.scale.seeds:
        pool = Pool(lab, seed)
        kept = pool.kept()
        for arm in names:
            runs[arm].append(
                lab.once(
                    f"data-{arm}-{seed}",
                    lambda: train_arm(lab, pool, kept, arm, seed),  # noqa: B023
                )
            )
        runs["filter"][-1] |= {name: pool.facts[name] for name in FACTS}
        runs["filter"][-1]["rounds"] = len(pool.facts["auc"]) - 1
    return runs


def measurements(runs: Runs, lab: Lab) -> list[Measurement]:
    """The agreed names first; then every arm against uniform sampling."""
    scale: Scale = lab.scale

    def row(name: str, one: str, other: str) -> Measurement:
        return measured(name, difference(runs, one, other), other, scale)

    found = [
        row("data_minus_kd_bits", "kd_filter", "kd_uniform"),
        row("data_control_minus_kd_bits", "kd_one_shot", "kd_uniform"),
        row("data_doremi_minus_kd_bits", "kd_doremi", "kd_uniform"),
        row("data_permuted_minus_kd_bits", "kd_permuted_scores", "kd_uniform"),
        row("data_filter_minus_one_shot_bits", "filter", "one_shot"),
        row("data_extra_rounds_minus_filter_bits", "extra_rounds", "filter"),
        row("data_clean_pool_cost_bits", "clean_pool", "clean_only"),
    ]
    found += [
        row(f"data_{arm}_minus_uniform_bits", arm, "uniform") for arm in ARMS if arm != "uniform"
    ]
    found += [
        measured(f"data_{arm}_bits", over_seeds([r["bits"] for r in runs[arm]]), None, scale)
        for arm in runs
    ]
    for name in (*FACTS, "rounds"):
        values = over_seeds([run[name] for run in runs["filter"]])
        unit = "rounds" if name == "rounds" else "fraction"
        found.append(measured(f"data_filter_{name}", values, None, scale, unit))
    return found


def verdict(values: dict[str, Measurement]) -> str:
    """What the filter and DoReMi did, against the marks."""
    gain = values["data_filter_minus_uniform_bits"]
    kd, control = values["data_minus_kd_bits"], values["data_control_minus_kd_bits"]
    over_one_shot = values["data_filter_minus_one_shot_bits"]
    assert gain.value is not None
    met = "meets" if gain.value <= -MARK else "misses"
    low, high = over_one_shot.interval or (-np.inf, np.inf)
    beats = "better than" if high < 0 else "worse than" if low > 0 else "not to be told from"
    oracle = values["data_clean_only_minus_uniform_bits"].value
    doremi = values["data_doremi_minus_uniform_bits"].value
    return (
        f"data: the iterated filter ends {gain.value:+.3f} bits/byte from uniform sampling ({met} "
        f"the mark of -{MARK:.2f}; the clean-only oracle {oracle:+.3f}, DoReMi {doremi:+.3f}); on "
        f"top of KD {kd.value:+.3f}, where the one-shot classifier, which is not adversarial, has "
        f"{control.value:+.3f}: the iteration is {beats} it ({over_one_shot.value:+.3f} without a "
        "teacher)"
    )
