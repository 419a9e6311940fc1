from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.distill.upcycle import UpcycleConfig, sparse_config, upcycle
from moe_jax.model.abstract import abstract_states, graph_of
from moe_jax.model.transformer import Transformer
from tests.conftest import SMALL_MODEL

DENSE = replace(SMALL_MODEL, dense_layers=3, dense_hidden=24)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 19)))
SEGMENTS = jnp.ones_like(TOKENS)


def dense_parameters(model=DENSE):
    return nnx.state(Transformer(model, key=jax.random.key(0)), nnx.Param)


def run(model, parameters, router):
    built = nnx.merge(graph_of(model), parameters, router)
    hidden, stats = built.hidden(TOKENS, SEGMENTS)
    return built.logits(hidden), stats


def dense_logits(model=DENSE):
    return run(model, dense_parameters(model), abstract_states(model)[1])[0]


CASES = {
    "G=1": UpcycleConfig(),
    "all experts": UpcycleConfig(experts=4, experts_per_token=4),
    "one expert": UpcycleConfig(experts=3, experts_per_token=1),
    "sigmoid": UpcycleConfig(gate="sigmoid"),
    "G=2": UpcycleConfig(experts=8, experts_per_token=4, granularity=2),
    "G=3, sigmoid": UpcycleConfig(experts=9, experts_per_token=3, granularity=3, gate="sigmoid"),
    "first block dense": UpcycleConfig(first=1),
}


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("name", CASES)
def test_the_upcycled_model_is_the_dense_one(name, tied):
    """Equal but for the order of float32 sums (K products with weights that sum to 1)."""
    dense = replace(DENSE, tied_embedding=tied)
    logits, stats = run(*upcycle(dense, dense_parameters(dense), CASES[name]))
    expected = dense_logits(dense)
    assert float(jnp.abs(expected).max()) > 0.5
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    loads = np.asarray(stats.load)
    assert loads.sum() == loads.shape[0] * TOKENS.size * CASES[name].experts_per_token
    if name == "G=1":
        assert (loads > 0).sum() > loads.shape[0] * 2  # the router does spread tokens


def test_a_whole_copy_is_chosen_together():
    config = CASES["G=2"]
    _, stats = run(*upcycle(DENSE, dense_parameters(), config))
    experts = np.sort(np.asarray(stats.experts), axis=-1)
    copies = experts.reshape(*experts.shape[:-1], -1, 2)
    np.testing.assert_array_equal(copies[..., 0] + 1, copies[..., 1])
    assert (copies[..., 0] % 2 == 0).all()


@pytest.mark.parametrize("change", [{"noise": 0.02}, {"reinitialised": 0.5}])
def test_noise_and_reinitialisation_make_experts_differ_a_little(change):
    exact = upcycle(DENSE, dense_parameters(), UpcycleConfig())
    moved = upcycle(DENSE, dense_parameters(), UpcycleConfig(**change))
    was, now = (p["sparse"]["blocks"]["moe"] for _, p, _ in (exact, moved))
    assert not np.allclose(now["down"][0, 0], now["down"][0, 1])
    np.testing.assert_array_equal(was["down"][0, 0], was["down"][0, 1])
    spread = float(jnp.std(now["gate_up"][...]) / jnp.std(was["gate_up"][...]))
    assert 0.95 < spread < 1.05
    if "reinitialised" in change:  # whole units are new in all three matrices, about half of them
        same = (was["down"][...] == now["down"][...]).all(axis=-1)
        gate = (was["gate_up"][...] == now["gate_up"][...]).all(axis=-2)
        assert 0.35 < float(same.mean()) < 0.65
        np.testing.assert_array_equal(gate, jnp.concatenate([same, same], axis=-1))
    assert not np.allclose(run(*moved)[0], dense_logits(), atol=1e-3)


@pytest.mark.slow
def test_experts_part_ways_in_training():
    """Copies under a router that treats them differently get different gradients."""
    model, parameters, router = upcycle(DENSE, dense_parameters(), UpcycleConfig())
    graph = graph_of(model)

    def loss(parameters):
        logits = nnx.merge(graph, parameters, router)(TOKENS[:, :-1], SEGMENTS[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], -1)
        return -picked.mean()

    gradient = jax.grad(loss)(parameters)["sparse"]["blocks"]["moe"]["down"][0]
    assert not np.allclose(gradient[0], gradient[1])


def test_impossible_upcycling_is_one_line():
    cases = [
        (lambda: sparse_config(SMALL_MODEL, UpcycleConfig()), "only a dense model"),
        (lambda: sparse_config(DENSE, UpcycleConfig(first=3)), "leaves no block"),
        (lambda: UpcycleConfig(experts=5, granularity=2), "experts=5 is not a multiple"),
        (lambda: UpcycleConfig(experts_per_token=3, granularity=2), "experts_per_token=3"),
        (
            lambda: sparse_config(
                DENSE, UpcycleConfig(experts=10, experts_per_token=5, granularity=5)
            ),
            "does not divide dense_hidden=24",
        ),
        (lambda: UpcycleConfig(noise=-1), "must not be negative"),
        (lambda: UpcycleConfig(reinitialised=2), "between 0 and 1"),
        (
            lambda: (
                UpcycleConfig(experts_per_token=9)
                and sparse_config(DENSE, UpcycleConfig(experts_per_token=9))
            ),
            "exceeds experts=8",
        ),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
