"""Specialisation of experts against cases worked out by hand."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.distill import specialise
from moe_jax.distill.upcycle import UpcycleConfig, upcycle
from moe_jax.model.abstract import abstract_states
from moe_jax.model.transformer import Transformer
from tests.conftest import SMALL_MODEL


def test_one_expert_a_domain_is_log_of_the_domains():
    classes = np.repeat([0, 1, 2], 10)
    table = specialise.routing_table(classes[:, None], classes, (3, 3))
    np.testing.assert_array_equal(table, 10 * np.eye(3))
    assert specialise.mutual_information(table) == pytest.approx(math.log(3))


def test_experts_that_ignore_the_domain_share_nothing():
    classes = np.repeat([0, 1], 8)
    experts = np.tile([[0, 1], [2, 3]], (8, 1))
    assert specialise.mutual_information(
        specialise.routing_table(experts, classes, (4, 2))
    ) == pytest.approx(0, abs=1e-12)


def test_a_table_in_between():
    """p = [[3, 1], [1, 3]] / 8: I = log 2 - h(1/4)."""
    expected = math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    assert specialise.mutual_information(np.array([[3, 1], [1, 3]])) == pytest.approx(expected)


def test_nobody_does_not_count():
    table = specialise.routing_table(np.array([[0, 2], [2, 2]]), np.array([1, 0]), (2, 2))
    np.testing.assert_array_equal(table, [[0, 1], [0, 0]])


def test_entropy_of_loads():
    assert specialise.normalised_entropy(np.array([5, 5, 5, 5])) == pytest.approx(1)
    assert specialise.normalised_entropy(np.array([9, 0])) == 0
    assert specialise.normalised_entropy(np.array([2, 2, 0, 0])) == pytest.approx(0.5)


def test_cosines_of_copies_opposites_and_reordered_units():
    gate_up = jax.random.normal(jax.random.key(0), (3, 4, 12))
    down = jax.random.normal(jax.random.key(1), (3, 6, 4))
    inputs = jax.random.normal(jax.random.key(2), (16, 4))
    copies = [jnp.repeat(gate_up[:1], 2, 0), jnp.repeat(down[:1], 2, 0)]
    assert specialise.weight_cosine(*copies) == pytest.approx(1)
    assert specialise.output_cosine(*copies, inputs) == pytest.approx(1)
    opposite = [copies[0], jnp.stack([down[0], -down[0]])]
    assert specialise.weight_cosine(*opposite) == pytest.approx(0)  # (1 - 1) / 2
    assert specialise.output_cosine(*opposite, inputs) == pytest.approx(-1)
    order = np.array([3, 1, 5, 0, 2, 4])  # the same function with its units in another order
    moved = [gate_up[0][:, np.concatenate([order, 6 + order])], down[0][order]]
    same = [jnp.stack([gate_up[0], moved[0]]), jnp.stack([down[0], moved[1]])]
    assert specialise.output_cosine(*same, inputs) == pytest.approx(1, abs=1e-6)
    assert specialise.weight_cosine(*same) < 0.9


def test_mean_over_pairs():
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert specialise.mean_cosine(vectors) == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3)


DENSE = replace(SMALL_MODEL, dense_layers=3, dense_hidden=24)


def measured(config, tokens):
    parameters = nnx.state(Transformer(DENSE, key=jax.random.key(0)), nnx.Param)
    model, parameters, router = upcycle(DENSE, parameters, config)
    classes = np.repeat([0, 1], len(tokens) // 2)
    return specialise.specialisation(model, parameters, router, tokens, classes)


def test_of_upcycled_models():
    """Copies are copies until they are disturbed. Domains of other tokens differ in routing, those
    of the same text do not."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 61, (4, 32))
    copies = measured(UpcycleConfig(experts=4), np.concatenate([text, text]))
    assert [len(values) for values in copies] == [3] * 5
    np.testing.assert_allclose(copies.weight_cosine, 1, atol=1e-6)
    np.testing.assert_allclose(copies.output_cosine, 1, atol=1e-6)
    np.testing.assert_allclose(copies.class_nats, 0, atol=1e-9)
    assert min(copies.token_nats) > 0.1  # the first block's router sees little but the token
    low = rng.integers(0, 5, (4, 32))
    high = rng.integers(30, 35, (4, 32))
    disturbed = measured(UpcycleConfig(experts=4, reinitialised=0.5), np.concatenate([low, high]))
    assert min(disturbed.class_nats) > 0.01
    assert max(disturbed.output_cosine) < 0.95


def test_a_dense_model_is_refused():
    parameters = nnx.state(Transformer(DENSE, key=jax.random.key(0)), nnx.Param)
    router = abstract_states(DENSE)[1]
    with pytest.raises(UserError, match="at least two experts"):
        specialise.specialisation(DENSE, parameters, router, np.zeros((2, 4), int), np.arange(2))
