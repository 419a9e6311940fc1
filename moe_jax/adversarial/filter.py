"""A discriminator drops the documents that it can tell from a clean seed, round after round.

The discriminator is logistic regression on hashed n-grams, as in classifier filters (DCLM,
arXiv:2406.11794). It is adversarial: each round trains it against the documents that the earlier
rounds have kept. The selection plays the generator of a GAN (arXiv:1406.2661). One round alone is
the classifier filter, which is the baseline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from moe_jax.base.errors import require

Features = Float[np.ndarray, "N buckets"]


@dataclass(frozen=True)
class FilterConfig:
    """Settings of the iterated filter."""

    drop: float = 0.1
    """Share of the kept documents, the lowest in score, that a round drops."""
    stop: float = 0.5
    """The rounds end once the held-out AUC of the seed against the kept documents is not above
    this."""
    rounds: int = 30
    """The largest number of rounds before the stop."""
    extra: int = 0
    """Rounds after the stop. They are a control that shows the effect of stopping."""
    decay: float = 1.0
    """Weight of |w|²/2 in the logistic loss."""

    def __post_init__(self) -> None:
        require(0 < self.drop < 1, f"filter.drop is {self.drop}: it must lie between 0 and 1")
        require(0 <= self.stop <= 1, f"filter.stop is {self.stop}: it must lie between 0 and 1")
        require(self.rounds > 0, f"filter.rounds is {self.rounds}: it must be positive")
        require(self.extra >= 0, f"filter.extra is {self.extra}: it must not be negative")
        require(self.decay > 0, f"filter.decay is {self.decay}: it must be positive")


class Filtered(NamedTuple):
    """A filter's decision for each document of the pool, and its course."""

    kept: Bool[np.ndarray, "N"]
    score: Float[np.ndarray, "N"]
    """Sum of the discriminators' logits over the rounds that a document took part in."""
    auc: list[float]
    """Held-out AUC at the beginning of each round. The last one is that of the stop."""


def ngram_features(
    documents: Sequence[bytes], orders: Sequence[int] = (1, 2, 3), buckets: int = 4096
) -> Features:
    """log(1 + count) of each hashed byte n-gram, over the square root of the document's length.

    Rows are not normalised to length 1. A document that repeats itself has few distinct n-grams,
    and the small sum of its features shows it. UserError: a document shorter than the longest
    n-gram.
    """
    longest = max(orders)
    short = min(map(len, documents), default=longest)
    require(short >= longest, f"a document of {short} bytes has no n-gram of order {longest}")
    features = np.zeros((len(documents), buckets), np.float32)
    for row, document in zip(features, documents, strict=True):
        data = np.frombuffer(document, np.uint8)
        for order in orders:
            row += np.bincount(_hashes(data, order) % buckets, minlength=buckets)
        row[:] = np.log1p(row) / np.sqrt(len(data))
    return features


def _hashes(data: np.ndarray, order: int) -> np.ndarray:
    """FNV-1a of every n-gram, uint32."""
    # FNV's offset basis and prime. The order is added to the basis, so that equal bytes hash
    # differently in n-grams of different orders.
    value = np.full(len(data) - order + 1, 2166136261 + order, np.uint32)
    for index in range(order):
        value = (value ^ data[index : len(value) + index]) * np.uint32(16777619)
    # FNV's low bits mix poorly, and a bucket is the hash modulo a power of two.
    return value ^ (value >> np.uint32(15))


class Logistic(NamedTuple):
    """P(clean) = sigmoid(w·x + b)."""

    w: Float[np.ndarray, "buckets"]
    b: float

    def logits(self, features: Features) -> Float[np.ndarray, "N"]:
        return features @ self.w + self.b


def fit(clean: Features, other: Features, decay: float = 1.0) -> Logistic:
    """Minimises mean over clean of -log P + mean over other of -log(1 - P) + decay/n · |w|²/2.

    n counts all documents. Both classes weigh the same, however many documents they have, so that
    the logit is the log of their density ratio.
    """
    # scikit-learn's LogisticRegression(C=2 / decay, class_weight="balanced", tol=1e-6) reaches the
    # same minimum (to 1e-8). It was 1.0 to 1.2 times as slow on pools of 600 documents and 2 to 4
    # times on 100, for four more packages. Logits that differ by 1e-3 change which documents the
    # later rounds see: in one pool of three, 35 of 600 decisions changed.
    x = np.concatenate([clean, other]).astype(np.float64)
    sign = np.concatenate([np.ones(len(clean)), -np.ones(len(other))])
    weight = np.concatenate(
        [np.full(len(clean), 1 / len(clean)), np.full(len(other), 1 / len(other))]
    )

    def loss_and_gradient(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w = theta[:-1]
        margin = sign * (x @ w + theta[-1])
        slope = -weight * sign * expit(-margin)
        loss = weight @ np.logaddexp(0, -margin) + decay / len(x) * (w @ w) / 2
        return loss, np.append(slope @ x + decay / len(x) * w, slope.sum())

    start = np.zeros(x.shape[1] + 1)
    theta = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B").x
    return Logistic(theta[:-1], float(theta[-1]))


def auc(positive: Float[np.ndarray, "P"], negative: Float[np.ndarray, "N"]) -> float:
    """P(s+ > s-) + P(s+ = s-)/2 over all pairs, by ranks (Mann-Whitney). 0.5 is chance."""
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    pairs = len(positive) * len(negative)
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / pairs)


def discriminate(
    seed: Features, pool: Features, rng: np.random.Generator, decay: float = 1.0
) -> tuple[float, Float[np.ndarray, "N"]]:
    """(held-out AUC of the seed against the pool, held-out logits of the pool).

    Each of two folds is scored by the discriminator that was fitted on the other one, so that no
    document is scored by a discriminator that has seen it. UserError: fewer than two documents.
    """
    require(
        len(seed) >= 2 and len(pool) >= 2,
        f"a seed of {len(seed)} and a pool of {len(pool)} documents leave nothing to hold out",
    )
    seed_fold = _fold(len(seed), rng)
    pool_fold = _fold(len(pool), rng)
    logits = np.zeros(len(pool))
    aucs = []
    for fold in (0, 1):
        discriminator = fit(seed[seed_fold != fold], pool[pool_fold != fold], decay)
        logits[pool_fold == fold] = discriminator.logits(pool[pool_fold == fold])
        # An AUC within each fold: the logits of two discriminators have no common scale.
        seed_logits = discriminator.logits(seed[seed_fold == fold])
        aucs.append(auc(seed_logits, logits[pool_fold == fold]))
    return float(np.mean(aucs)), logits


def _fold(count: int, rng: np.random.Generator) -> Int[np.ndarray, "N"]:
    """0 or 1 for each document, half of each, in random order."""
    return rng.permutation(np.arange(count) % 2)


def iterated_filter(
    seed: Features, pool: Features, config: FilterConfig, rng: np.random.Generator
) -> Filtered:
    """Drops the lowest share of the pool in each round, until the AUC reaches `config.stop`.

    A round fits the discriminator to the seed and the kept documents, adds its logits to the kept
    documents' scores, and drops those with the lowest sums.
    """
    kept = np.ones(len(pool), bool)
    score = np.zeros(len(pool))
    aucs = []
    extra = config.extra
    stopped = False
    # Two documents for each of the two folds.
    while len(aucs) < config.rounds + config.extra and kept.sum() >= 4:
        current, logits = discriminate(seed, pool[kept], rng, config.decay)
        aucs.append(current)
        stopped = stopped or current <= config.stop
        if stopped and extra == 0:
            break
        extra -= stopped
        score[kept] += logits
        worst = np.flatnonzero(kept)[np.argsort(score[kept], kind="stable")]
        kept[worst[: max(1, round(config.drop * kept.sum()))]] = False
    return Filtered(kept, score, aucs)


def one_shot_filter(
    seed: Features, pool: Features, share: float, rng: np.random.Generator, decay: float = 1.0
) -> Filtered:
    """The baseline: one discriminator against the whole pool, whose best `share` is kept."""
    held_out_auc, logits = discriminate(seed, pool, rng, decay)
    return Filtered(best(logits, share), logits, [held_out_auc])


def best(score: Float[np.ndarray, "N"], share: float) -> Bool[np.ndarray, "N"]:
    """Whether each document is among the `share` that scores highest.

    UserError: a share outside (0, 1], or a score that is NaN.
    """
    require(0 < share <= 1, f"a share of {share} cannot be kept: it must lie in (0, 1]")
    require(not np.isnan(score).any(), "a score is NaN: documents cannot be ordered")
    kept = np.zeros(len(score), bool)
    kept[np.argsort(-score, kind="stable")[: max(1, round(share * len(score)))]] = True
    return kept
