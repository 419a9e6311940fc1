"""The discriminator's parts against direct formulas, and what its rounds keep."""

import numpy as np
import pytest

from moe_jax.adversarial import filter as adversary
from moe_jax.adversarial.filter import FilterConfig, iterated_filter, one_shot_filter
from moe_jax.base.errors import UserError

WORDS = [b"alpha ", b"beta ", b"gamma ", b"delta ", b"return ", b"while ", b"(x) ", b"\n    "]


def clean(rng):
    return b"".join(WORDS[i] for i in rng.integers(0, len(WORDS), 60))[:256]


def shuffled(rng):
    return bytes(rng.permutation(np.frombuffer(clean(rng), np.uint8)))


def repetitive(rng):
    return (clean(rng)[:24] * 20)[:256]


@pytest.fixture(scope="module")
def text():
    """(seed, pool, junk) features and which of the pool is clean: 60 clean, 20 of each junk."""
    rng = np.random.default_rng(0)
    pool = [clean(rng) for _ in range(60)]
    junk = [make(rng) for make in (shuffled, repetitive) for _ in range(20)]
    seed = [clean(rng) for _ in range(40)]
    features = (adversary.ngram_features(part, buckets=512) for part in (seed, pool + junk, junk))
    return *features, np.arange(100) < 60


def test_features_are_counts_of_hashed_ngrams():
    one = adversary.ngram_features([b"ababab"], orders=(2,), buckets=64)[0]
    counts = np.sort(np.expm1(one[one > 0] * np.sqrt(6)))
    np.testing.assert_allclose(counts, [2, 3], rtol=1e-5)  # ba twice, ab three times
    both = adversary.ngram_features([b"xyz", b"xyzxyz"], buckets=4096)
    assert (both[0] > 0).sum() == 6  # 3 single bytes, 2 pairs, 1 triple, none colliding
    assert (both[1] > 0).sum() == 9  # and zx, yzx, zxy


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    positive, negative = rng.integers(0, 6, 17), rng.integers(0, 5, 23)  # with ties
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    np.testing.assert_allclose(adversary.auc(positive, negative), np.mean(pairs))
    assert adversary.auc(np.array([2.0, 3.0]), np.array([1.0])) == 1


def test_logistic_regression_by_hand():
    """One binary feature, on in 3/4 of the clean and 1/4 of the others: without decay the logit is
    log(3) with it and -log(3) without it."""
    x = np.array([[1.0], [1.0], [1.0], [0.0]])
    found = adversary.fit(x, 1 - x, decay=1e-9)
    np.testing.assert_allclose(
        found.logits(np.array([[1.0], [0.0]])), [np.log(3), -np.log(3)], rtol=1e-3
    )
    # Twice as many of the others, the same shares: the classes weigh the same, the logits stay.
    again = adversary.fit(x, np.tile(1 - x, (2, 1)), decay=1e-9)
    np.testing.assert_allclose([again.w[0], again.b], [found.w[0], found.b], rtol=1e-2)


def test_the_fit_is_a_minimum_of_the_regularised_loss():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(9, 3)) + 0.5, rng.normal(size=(7, 3))
    found = adversary.fit(a, b, decay=0.3)

    def loss(w, bias):
        one, other = np.exp(-(a @ w + bias)), np.exp(b @ w + bias)
        return np.log1p(one).mean() + np.log1p(other).mean() + 0.3 / 16 * (w @ w) / 2

    best = loss(found.w, found.b)
    for _ in range(50):
        step = 0.05 * rng.normal(size=4)
        assert loss(found.w + step[:3], found.b + step[3]) > best


def test_the_rounds_end_near_the_clean_documents(text):
    seed, pool, _, is_clean = text
    found = iterated_filter(seed, pool, FilterConfig(), np.random.default_rng(3))
    assert found.auc[0] > 0.65
    assert found.auc[-1] <= 0.5 < min(found.auc[:-1])
    assert is_clean[found.kept].mean() > 0.95
    assert found.kept[is_clean].mean() > 0.6


def test_junk_as_the_seed_keeps_junk(text):
    _, pool, junk, is_clean = text
    found = one_shot_filter(junk, pool, 0.4, np.random.default_rng(4))
    assert is_clean[found.kept].mean() < 0.2


def test_a_clean_pool_is_hardly_touched(text):
    """There is nothing to tell apart: the AUC is near a half from the start."""
    seed, pool, _, is_clean = text
    aucs = [
        iterated_filter(seed, pool[is_clean], FilterConfig(), np.random.default_rng(r)).auc[0]
        for r in range(5)
    ]
    assert abs(np.mean(aucs) - 0.5) < 0.1


def test_rounds_forced_after_the_stop_throw_more_away(text):
    seed, pool, _, _ = text
    runs = [
        iterated_filter(seed, pool, FilterConfig(extra=extra), np.random.default_rng(5))
        for extra in (0, 3)
    ]
    assert len(runs[1].auc) == len(runs[0].auc) + 3
    np.testing.assert_allclose(runs[1].auc[: len(runs[0].auc)], runs[0].auc)
    assert not (runs[1].kept & ~runs[0].kept).any()
    assert runs[1].kept.sum() < 0.8 * runs[0].kept.sum()


def test_the_discriminator_does_not_judge_what_it_was_fitted_on():
    """More features than documents, all noise: a fitted score would be perfect, a held-out one is
    chance."""
    rng = np.random.default_rng(6)
    seed, pool = rng.normal(size=(40, 200)), rng.normal(size=(60, 200))
    fitted = adversary.fit(seed, pool, decay=1e-3)
    assert adversary.auc(fitted.logits(seed), fitted.logits(pool)) > 0.99
    assert abs(adversary.discriminate(seed, pool, rng)[0] - 0.5) < 0.15


def test_the_best_share_is_kept_and_bad_input_is_refused():
    np.testing.assert_array_equal(adversary.best(np.array([1.0, 3, 2, 0]), 0.5), [0, 1, 1, 0])
    with pytest.raises(UserError, match="share of 0 "):
        adversary.best(np.zeros(3), 0)
    with pytest.raises(UserError, match="NaN"):
        adversary.best(np.array([0.0, np.nan]), 0.5)
    with pytest.raises(UserError, match=r"filter.drop is 1"):
        FilterConfig(drop=1.0)
    with pytest.raises(UserError, match="document of 2 bytes"):
        adversary.ngram_features([b"ab"])
    with pytest.raises(UserError, match="nothing to hold out"):
        adversary.discriminate(np.ones((1, 2)), np.ones((5, 2)), np.random.default_rng(0))
