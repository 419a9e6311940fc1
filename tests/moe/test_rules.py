from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import MoEConfig
from moe_jax.moe.route import route
from moe_jax.moe.rules import RoutingContext, expert_capacity, limit_groups
from tests import oracle

T, E, K = 37, 8, 2
SOFTMAX = MoEConfig(experts=E, experts_per_token=K, gate="softmax", bias_rate=0)
CHOICE = replace(SOFTMAX, rule="expert_choice", allow_acausal=True)
ROUNDING = replace(SOFTMAX, rule="token_rounding", rounding_tile=8)
KEY = jax.random.key(5)


def draw_logits(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(T, E)).astype(np.float32)


def routed(config, logits, context=RoutingContext(), **extra):  # noqa: B008
    return route(jnp.asarray(logits), jnp.zeros(E), config, context, **extra)


def chosen_sets(experts) -> list[set[int]]:
    return [{int(e) for e in row if e < E} for row in np.asarray(experts)]


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("normalise", [True, False])
def test_expert_choice_equals_the_formula(factor, normalise):
    logits = draw_logits()
    found = routed(replace(CHOICE, capacity_factor=factor, normalise=normalise), logits)
    scores = oracle.softmax(logits.astype(np.float64))
    capacity = int(np.ceil((factor or 1.0) * T * K / E))
    taken = np.zeros((T, E), bool)
    for expert in range(E):
        taken[np.argsort(-scores[:, expert])[:capacity], expert] = True
    assert chosen_sets(found.experts) == [set(np.flatnonzero(row)) for row in taken]
    total = np.where(taken, scores, 0).sum(axis=1) if normalise else np.ones(T)
    for t in range(T):
        for expert, weight in zip(found.experts[t], found.weights[t], strict=True):
            expected = scores[t, expert] / total[t] if expert < E else 0.0
            np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_expert_choice_loads_are_equal():
    found = routed(CHOICE, draw_logits())
    load = np.bincount(np.asarray(found.experts).ravel(), minlength=E)[:E]
    assert set(load) == {expert_capacity(T, CHOICE, 1.0)}


@pytest.mark.parametrize("tile", [1, 4, 8, 64])
def test_token_rounding_equals_the_formula(tile):
    logits = draw_logits(1)
    config = replace(ROUNDING, rounding_tile=tile)
    found = routed(config, logits, RoutingContext(key=KEY))
    scores = oracle.softmax(logits.astype(np.float64))
    before = [set(np.argsort(-row)[:K]) for row in scores]
    expected = [set() for _ in range(T)]
    for expert in range(E):
        order = sorted(range(T), key=lambda t: (expert not in before[t], -scores[t, expert]))
        count = sum(expert in row for row in before)
        for t in order[: tile * int(np.floor(count / tile + 0.5))]:
            expected[t].add(expert)
    assert chosen_sets(found.experts) == expected
    load = np.bincount(np.asarray(found.experts).ravel(), minlength=E)[:E]
    assert all(load % tile == 0)


def test_token_rounding_is_top_k_outside_training():
    logits = draw_logits()
    np.testing.assert_array_equal(routed(ROUNDING, logits).experts, routed(SOFTMAX, logits).experts)


def test_token_rounding_keeps_to_the_groups():
    config = replace(ROUNDING, groups=4, groups_per_token=1, rounding_tile=16)
    found = routed(config, draw_logits(2), RoutingContext(key=KEY))
    assert all(len({e // 2 for e in row}) <= 1 for row in chosen_sets(found.experts))


def test_hash_routing_depends_on_the_token_alone():
    config = replace(SOFTMAX, rule="hash", scale=3.0)
    tokens = jnp.asarray([7, 7, 9, 12345, 7])
    found = routed(config, draw_logits()[:5], RoutingContext(tokens))
    rows = found.experts.tolist()
    assert rows[0] == rows[1] == rows[4]
    assert all(len(set(row)) == K for row in rows)
    np.testing.assert_allclose(found.weights, 3.0 / K)


def test_hash_routing_spreads_tokens():
    config = replace(SOFTMAX, rule="hash")
    found = routed(config, np.zeros((4096, E), np.float32), RoutingContext(jnp.arange(4096)))
    load = np.bincount(np.asarray(found.experts).ravel(), minlength=E)
    # 1024 expected, standard deviation 28: five of them
    assert np.abs(load - 1024).max() < 140


def test_hash_routing_equals_the_formula():
    def mixed(token: int, expert: int) -> int:
        word = (token * 0x9E3779B1) & 0xFFFFFFFF ^ ((expert + 1) * 0x85EBCA77) & 0xFFFFFFFF
        for multiplier in (0x85EBCA6B, 0xC2B2AE35):
            word = ((word ^ (word >> 15)) * multiplier) & 0xFFFFFFFF
        return word ^ (word >> 16)

    config = replace(SOFTMAX, rule="hash")
    found = routed(config, draw_logits(), RoutingContext(jnp.arange(T)))
    for token, row in enumerate(found.experts.tolist()):
        assert row == sorted(range(E), key=lambda e, t=token: -mixed(t, e))[:K]


def test_noisy_top_k_equals_the_formula():
    config = replace(SOFTMAX, rule="noisy_top_k")
    logits, spread = draw_logits(), draw_logits(1)
    found = routed(config, logits, RoutingContext(key=KEY), spread=jnp.asarray(spread))
    noise = np.asarray(jax.random.normal(KEY, (T, E)), np.float64)
    noisy = logits + noise * np.log1p(np.exp(spread.astype(np.float64)))
    for t in range(T):
        experts, weights = oracle.gate(noisy[t], np.zeros(E), config)
        assert found.experts[t].tolist() == experts
        np.testing.assert_allclose(found.weights[t], weights, rtol=1e-4)


def test_noisy_top_k_is_quiet_outside_training():
    config = replace(SOFTMAX, rule="noisy_top_k")
    found = routed(config, draw_logits(), spread=jnp.asarray(draw_logits(1)))
    np.testing.assert_array_equal(found.experts, routed(SOFTMAX, draw_logits()).experts)


def test_noise_is_learned():
    config = replace(SOFTMAX, rule="noisy_top_k")

    def objective(spread):
        found = routed(config, draw_logits(), RoutingContext(key=KEY), spread=spread)
        return (found.weights * jnp.arange(K)).sum()

    assert np.abs(jax.grad(objective)(jnp.zeros((T, E)))).max() > 1e-3


def test_a_token_reaches_at_most_m_nodes():
    config = replace(SOFTMAX, groups=4, groups_per_token=2, group_score="node", experts_per_token=4)
    found = routed(config, draw_logits())
    assert all(len({e // 2 for e in row}) <= 2 for row in chosen_sets(found.experts))


def test_only_kept_groups_stay_selectable():
    scores = jnp.array([[0.9, 0.0, 0.5, 0.5, 0.1, 0.1]])
    config = MoEConfig(experts=6, groups=3, experts_per_token=1)
    by_two = limit_groups(scores, replace(config, group_score="top2"))
    by_one = limit_groups(scores, replace(config, group_score="max"))
    assert np.isfinite(by_two).tolist() == [[False, False, True, True, False, False]]
    assert np.isfinite(by_one).tolist() == [[True, True, False, False, False, False]]


@pytest.mark.parametrize("config", [CHOICE, ROUNDING], ids=lambda c: c.rule)
def test_nan_logits_show_in_the_weights(config):
    logits = np.full((T, E), np.nan, np.float32)
    assert np.isnan(routed(config, logits, RoutingContext(key=KEY)).weights).any()


def test_expert_choice_is_refused_for_autoregressive_training():
    with pytest.raises(UserError, match=r"expert_choice is not causal.*allow_acausal"):
        replace(CHOICE, allow_acausal=False)


@pytest.mark.parametrize(("experts", "per_token"), [(8, 2), (7, 3), (5, 5)])
def test_balanced_equals_the_formula_and_loads_are_equal(experts, per_token):
    config = replace(SOFTMAX, experts=experts, experts_per_token=per_token, rule="balanced")
    tokens = 2 * experts
    logits = np.random.default_rng(0).normal(size=(tokens, experts)).astype(np.float32)
    found = route(jnp.asarray(logits), jnp.zeros(experts), config)
    for t in range(tokens):
        expected = [(t + k * experts // per_token) % experts for k in range(per_token)]
        assert found.experts[t].tolist() == expected
        assert len(set(expected)) == per_token
    scores = oracle.softmax(logits.astype(np.float64))
    chosen = np.take_along_axis(scores, np.asarray(found.experts), axis=1)
    expected = chosen / chosen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.weights, expected, rtol=1e-5)
    assert set(np.bincount(np.asarray(found.experts).ravel())) == {2 * per_token}
