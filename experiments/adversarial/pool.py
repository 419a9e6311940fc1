"""The pool of documents that the data arms choose from, and what each filter keeps of it.

A pool is 60% real text of three domains, 25% shuffled documents (their bytes in random order) and
15% repetitive ones (a short piece again and again).
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from experiments.adversarial.lab import Lab
from experiments.adversarial.settings import BATCH, LENGTH, WINDOWS
from experiments.adversarial.text import windows_of
from moe_jax.adversarial.filter import (
    FilterConfig,
    Filtered,
    best,
    iterated_filter,
    ngram_features,
    one_shot_filter,
)

SOURCES = ("code", "prose", "tables", "shuffled", "repetitive")
REAL = 3
"""The first REAL sources are real text, the others are junk."""
CLEAN = 0.6
JUNK = {"shuffled": 0.25, "repetitive": 0.15}
SEED_SHARE = 0.15
"""Clean seed documents, as a share of the pool's size."""
STATISTICS = ("precision", "recall", "one_shot_precision", "clean_pool_kept", "elsewhere_kept")
"""Fractions that `filtered` holds beside the documents that were kept."""


class Pool:
    """One seed's documents."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.seed = seed
        size = lab.scale.pool
        # Drawn from by every call of _junk: their order is a part of what a seed means.
        self._junk_rng = np.random.default_rng([seed, 7])
        clean, domain = lab.text.draw("pool", round(CLEAN * size), seed)
        junk = [self._junk(kind, round(JUNK[kind] * size)) for kind in JUNK]
        kinds = [np.full(len(part), REAL + index) for index, part in enumerate(junk)]
        self.documents = clean + junk[0] + junk[1]
        self.source = np.concatenate([domain, *kinds])
        self.clean = self.source < REAL
        self.clean_seed, _ = lab.text.draw("seed", round(SEED_SHARE * size), seed)
        self.stretch_seed, _ = lab.text.draw("stretch", round(SEED_SHARE * size), seed)
        half = len(self.clean_seed) // 2
        self.junk_seed = self._junk("shuffled", half) + self._junk("repetitive", half)
        # [documents, WINDOWS, LENGTH + 1]
        self.windows = windows_of(self.documents).reshape(-1, WINDOWS, LENGTH + 1)
        self.share = float(self.clean.mean())

    def _junk(self, kind: str, count: int) -> list[bytes]:
        """Junk made of real text, so that its bytes are as frequent as in real text."""
        rng = self._junk_rng
        role_seed = 1000 + self.seed + 50 * int(rng.integers(1 << 20))
        texts, _ = self.lab.text.draw("pool", 2 * count + 10, role_seed)
        texts = [texts[i] for i in rng.permutation(len(texts))[:count]]
        if kind == "shuffled":
            return [bytes(rng.permutation(np.frombuffer(t, np.uint8))) for t in texts]
        pieces = [t[: int(rng.integers(8, 33))] for t in texts]
        return [(p * len(t))[: len(t)] for p, t in zip(pieces, texts, strict=True)]

    def rng(self, part: int = 0) -> np.random.Generator:
        """A fresh generator. Each use of chance has its own `part`."""
        return np.random.default_rng([self.seed, part])

    @cached_property
    def filtered(self) -> dict[str, Any]:
        """Every filter's choice (`kept`: document numbers), its AUCs, and STATISTICS."""
        return self.lab.store.once(f"data-filters-{self.seed}", self._filter)

    def kept(self, arm: str) -> np.ndarray:
        """bool[documents]: the choice of an arm that is a choice of documents."""
        return np.isin(np.arange(len(self.documents)), self.filtered["kept"][arm])

    def _filter(self) -> dict[str, Any]:
        parts = (self.clean_seed, self.documents, self.junk_seed, self.stretch_seed)
        seed, pool, junk, stretch = (ngram_features(part, buckets=2048) for part in parts)
        usual = FilterConfig()
        found = iterated_filter(seed, pool, usual, self.rng())
        forced = iterated_filter(seed, pool, FilterConfig(extra=4), self.rng())
        clean = iterated_filter(seed, pool[self.clean], usual, self.rng())
        share = found.kept.mean()
        chosen = {
            "uniform": np.ones(len(pool), bool),
            "clean_only": self.clean,
            "filter": found.kept,
            "one_shot": one_shot_filter(seed, pool, self.share, self.rng()).kept,
            "lowest_teacher": best(-self._teacher_nats(), self.share),
            "random_scores": best(self.rng(2).random(len(pool)), share),
            "permuted_scores": found.kept[self.rng(1).permutation(len(pool))],
            "seed_swapped": iterated_filter(junk, pool, usual, self.rng()).kept,
            "seed_elsewhere": iterated_filter(stretch, pool, usual, self.rng()).kept,
            "extra_rounds": forced.kept,
            "clean_pool": _of_all(clean, self.clean),
        }
        return {
            "kept": {arm: np.flatnonzero(kept).tolist() for arm, kept in chosen.items()},
            "auc": found.auc,
            "forced_auc": forced.auc,
            "precision": float(self.clean[found.kept].mean()),
            "recall": float(found.kept[self.clean].mean()),
            "one_shot_precision": float(self.clean[chosen["one_shot"]].mean()),
            "elsewhere_kept": float(np.mean(chosen["seed_elsewhere"])),
            "clean_pool_kept": float(clean.kept.mean()),
        }

    def _teacher_nats(self) -> np.ndarray:
        """float[documents]: the teacher's mean nats a byte."""
        windows = self.windows.reshape(-1, LENGTH + 1)
        nats = self.lab.nats(self.lab.teacher_model, self.lab.teacher, windows)
        return nats.reshape(-1, WINDOWS).mean(-1)

    def mixture(self, weights: np.ndarray, rows: int = BATCH) -> Iterator[tuple[Any, Any]]:
        """(windows, their sources): a source is drawn by its weight, then one of its windows."""
        rng = self.rng(3)
        places = [np.flatnonzero(self.source == s) for s in range(len(SOURCES))]
        while True:
            source = rng.choice(len(SOURCES), rows, p=weights / weights.sum())
            document = [rng.choice(places[s]) for s in source]
            yield self.windows[document, rng.integers(0, WINDOWS, rows)], source

    def proportions(self) -> np.ndarray:
        """float[SOURCES]: each source's share of the documents."""
        return np.bincount(self.source, minlength=len(SOURCES)) / len(self.source)


def _of_all(found: Filtered, clean: np.ndarray) -> np.ndarray:
    """The choice among the clean documents as a choice among all."""
    kept = np.zeros(len(clean), bool)
    kept[np.flatnonzero(clean)[found.kept]] = True
    return kept
