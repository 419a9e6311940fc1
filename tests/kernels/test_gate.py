"""The gate kernel in Triton's interpreter, against the reference and moe_jax's own rules.

Scores may differ in the last place, so the choice is compared twice: with the reference's where
scores are far apart or exactly equal, and, whatever the logits, with jax.lax.top_k of the scores
that the kernel itself returns, which must agree exactly.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from moe_kernels.gate import GateConfig, gate, reference

from moe_jax.config import MoEConfig
from moe_jax.moe.route import KERNEL_RULES, route
from moe_jax.moe.rules import RoutingContext
from moe_jax.parallel.mesh import make_mesh

pytest.importorskip("triton")
# NumPy, the interpreter's arithmetic, warns of NaN and overflow where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

specified = jax.jit(reference.gate, static_argnums=2)
selected = jax.jit(reference.select, static_argnums=1)
SOFTMAX = GateConfig(3, "softmax")
SIGMOID = GateConfig(3, "sigmoid", scale=2.5)
# The logistic function and its exponential, in NumPy and in XLA: a few units in the last place.
CLOSE = {"rtol": 2e-6, "atol": 1e-7}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def draw(tokens, experts, seed=0):
    """Logits in steps of 1/64, so that two differ clearly or not at all, and a bias."""
    random = np.random.default_rng(seed)
    logits = np.round(64 * random.normal(size=(tokens, experts))) / 64
    return jnp.asarray(logits, jnp.float32), jnp.asarray(random.normal(size=experts), jnp.float32)


def assert_exact(actual, logits, bias, config):
    """The choice is top_k's from the returned scores; the weights are the chosen ones' scores."""
    selection = actual.scores if bias is None else actual.scores + bias
    if config.chooses_by_logits(bias is not None):
        selection = logits
    np.testing.assert_array_equal(actual.experts, selected(selection, config))
    weights = np.take_along_axis(np.asarray(actual.scores), np.asarray(actual.experts), axis=1)
    if config.normalise:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    np.testing.assert_allclose(actual.weights, config.scale * weights, rtol=1e-6)


def check(tokens, experts, config, seed=0):
    """Choice, weights and scores."""
    logits, bias = draw(tokens, experts, seed)
    bias = bias if config.function == "sigmoid" else None
    actual = gate(logits, bias, config)
    assert_exact(actual, logits, bias, config)
    for name, one, other in zip(
        ("experts", "weights", "scores"),
        actual,
        specified(logits, bias, config),
        strict=True,
    ):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        np.testing.assert_allclose(one, other, **CLOSE, err_msg=name)


def gradient(function, logits, bias, config):
    """Of an objective that weighs every weight and every score differently."""

    def objective(logits):
        _, weights, scores = function(logits, bias, config)
        each = jnp.arange(weights.size).reshape(weights.shape)
        return jnp.sum(jnp.sin(each) * weights) + jnp.sum(jnp.cos(7 * scores))

    return jax.jit(jax.grad(objective))(logits)


DEEPSEEK = GateConfig(8, "sigmoid", True, 2.5, groups=8, groups_per_token=4, representatives=2)
CASES = {
    "softmax": (37, 8, SOFTMAX),
    "softmax, not normalised": (37, 8, SOFTMAX._replace(normalise=False)),
    "sigmoid": (37, 8, SIGMOID),
    "DeepSeek-V3": (9, 256, DEEPSEEK),
    "Qwen3": (17, 128, GateConfig(8, "softmax")),
    "OLMoE": (33, 64, GateConfig(8, "softmax", normalise=False)),
    "60 experts": (19, 60, GateConfig(4, "softmax")),
    "60 experts in groups of 15": (
        19,
        60,
        GateConfig(4, "sigmoid", groups=4, groups_per_token=2, representatives=2),
    ),
    "6 groups of 10, the best score each": (
        19,
        60,
        GateConfig(4, "softmax", groups=6, groups_per_token=3),
    ),
    "5 groups, 3 representatives": (
        11,
        20,
        GateConfig(3, "sigmoid", groups=5, groups_per_token=1, representatives=3),
    ),
    "more representatives than a group has": (
        11,
        6,
        GateConfig(2, "sigmoid", groups=3, groups_per_token=1, representatives=5),
    ),
    "all groups allowed": (
        11,
        8,
        GateConfig(2, "sigmoid", groups=4, groups_per_token=4, representatives=2),
    ),
    "512 experts, K = 16": (3, 512, GateConfig(16, "softmax")),
    "1100 experts": (2, 1100, GateConfig(2, "softmax")),
    "K = E": (9, 5, GateConfig(5)),
    "E = 1": (9, 1, GateConfig(1)),
    "T = 1": (1, 7, SIGMOID),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    check(*CASES[name])


@pytest.mark.parametrize(
    "name", ["softmax", "softmax, not normalised", "sigmoid", "DeepSeek-V3", "K = E", "E = 1"]
)
def test_the_gradient_is_autodiff_s_of_the_reference(name):
    tokens, experts, config = CASES[name]
    logits, bias = draw(tokens, experts)
    bias = bias if config.function == "sigmoid" else None
    np.testing.assert_allclose(
        gradient(gate, logits, bias, config),
        gradient(reference.gate, logits, bias, config),
        rtol=1e-5,
        atol=1e-6,
    )


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_choice_is_exactly_top_k_of_the_returned_scores(data):
    groups = data.draw(st.sampled_from([1, 2, 3, 5]))
    size = data.draw(st.integers(1, 9))
    kept = data.draw(st.integers(1, groups))
    per_token = data.draw(st.integers(1, kept * size))
    function = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    best = data.draw(st.integers(1, 3))
    config = GateConfig(
        per_token,
        function,
        normalise=data.draw(st.booleans()),
        scale=1.5,
        groups=groups,
        groups_per_token=kept,
        representatives=best,
    )
    tokens = data.draw(st.integers(1, 40))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    logits = random.normal(size=(tokens, groups * size)) * data.draw(st.sampled_from([1e-7, 1, 30]))
    bias = jnp.asarray(random.normal(size=groups * size), jnp.float32)
    bias = bias if data.draw(st.booleans()) else None
    logits = jnp.asarray(logits, jnp.float32)
    assert_exact(gate(logits, bias, config), logits, bias, config)


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID, DEEPSEEK._replace(per_token=3, groups=4)])
def test_ties_go_to_the_lower_index(config):
    logits = jnp.zeros((5, 8)).at[1, 6].set(1).at[2, 1:].set(-3).at[3].set(-jnp.inf).at[4].set(200)
    if config.function == "softmax":
        logits = logits[:3]
    actual = gate(logits, None, config)
    assert actual.experts[0].tolist() == [0, 1, 2]
    assert actual.experts[1, 0] == 6
    np.testing.assert_array_equal(actual.experts, specified(logits, None, config)[0])


def test_saturated_scores_tie_where_a_bias_makes_scores_choose():
    logits = jnp.array([[30.0, 40.0, 35.0, 31.0], [-200.0, -300.0, -250.0, -200.0]])
    assert gate(logits, jnp.zeros(4), GateConfig(2)).experts.tolist() == [[0, 1], [0, 1]]
    assert gate(logits, None, GateConfig(2)).experts.tolist() == [[1, 2], [0, 3]]


def test_logits_that_round_to_one_softmax_score_keep_their_order():
    # exp(-1e-9) is 1 in float32, so the scores are equal.
    logits = jnp.array([[-1e-9, 0.0, -1e-9, -5.0]])
    actual = gate(logits, None, SOFTMAX)
    assert actual.scores[0, 0] == actual.scores[0, 1]
    assert actual.experts.tolist() == [[1, 0, 2]]
    config = MoEConfig(4, experts_per_token=3, gate="softmax", bias_rate=0)
    routing = route(logits, jnp.zeros(4), config)
    assert routing.experts.tolist() == [[1, 0, 2]]


def test_zeros_of_both_signs_keep_the_order_of_top_k():
    logits = jnp.full((1, 4), -200.0)
    bias = jnp.array([-0.0, 0.0, -1.0, 0.0])
    actual = gate(logits, bias, GateConfig(3, normalise=False))
    np.testing.assert_array_equal(actual.experts, jax.lax.top_k(actual.scores + bias, 3)[1])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "config",
    [
        SOFTMAX,
        SIGMOID,
        GateConfig(3, "sigmoid", groups=4, groups_per_token=2, representatives=2),
    ],
)
def test_nan_logits_make_the_weights_nan_and_no_other_token_s(config, sign):
    logits, _ = draw(6, 8)
    nan = np.copysign(np.float32(np.nan), sign)
    logits = logits.at[2, 5].set(nan).at[4].set(nan)
    actual = gate(logits, None, config)
    clean = gate(jnp.nan_to_num(logits), None, config)
    assert np.isnan(actual.weights[jnp.array([2, 4])]).any(axis=1).all()
    assert actual.experts.min() >= 0
    assert actual.experts.max() < 8
    others = jnp.array([0, 1, 3, 5])
    np.testing.assert_array_equal(actual.weights[others], clean.weights[others])
    np.testing.assert_array_equal(actual.experts[others], clean.experts[others])


@pytest.mark.parametrize("groups", [1, 4])
def test_nan_is_chosen_where_moe_jax_chooses_it(groups):
    kept = min(groups, 3)
    config = MoEConfig(experts=8, experts_per_token=3, groups=groups, groups_per_token=kept)
    logits = draw(6, 8)[0].at[2, 5].set(jnp.nan).at[4].set(jnp.nan)
    expected = route(logits, jnp.zeros(8), config)
    actual = route(logits, jnp.zeros(8), config, kernels=True)
    np.testing.assert_array_equal(actual.experts, expected.experts)
    np.testing.assert_array_equal(np.isnan(actual.weights), np.isnan(expected.weights))


BASE = MoEConfig(experts=12, experts_per_token=4, scale=1.5)
CONFIGS = {
    "sigmoid": BASE,
    "softmax": replace(BASE, gate="softmax", bias_rate=0, normalise=False),
    "top2 groups": replace(BASE, groups=4, groups_per_token=2),
    "node groups": replace(BASE, groups=3, groups_per_token=2, group_score="node"),
    "max groups": replace(BASE, groups=3, groups_per_token=2, group_score="max"),
    "softmax groups": replace(
        BASE, gate="softmax", bias_rate=0, groups=3, groups_per_token=2, group_score="top2"
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_moe_jax_s_route(name):
    logits, bias = draw(50, 12)
    actual = route(logits, bias, CONFIGS[name], kernels=True)
    expected = route(logits, bias, CONFIGS[name])
    np.testing.assert_array_equal(actual.experts, expected.experts)
    np.testing.assert_allclose(actual.weights, expected.weights, **CLOSE)
    np.testing.assert_allclose(actual.scores, expected.scores, **CLOSE)
    np.testing.assert_array_equal(actual.logits, expected.logits)


def test_noise_is_added_before_and_learned_from():
    config = replace(BASE, gate="softmax", bias_rate=0, rule="noisy_top_k")
    logits, bias = draw(9, 12)
    spread = jnp.full((9, 12), 0.5)
    context = RoutingContext(key=jax.random.key(1))

    def of_weights(spread, kernels):
        actual = route(logits, bias, config, context, spread, kernels)
        return jnp.sum(actual.weights * jnp.arange(4)), actual.experts

    run = jax.jit(jax.value_and_grad(of_weights, has_aux=True), static_argnums=1)
    (total, experts), slope = run(spread, True)
    (expected_total, expected_experts), expected_slope = run(spread, False)
    np.testing.assert_array_equal(experts, expected_experts)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-6)


def test_other_rules_stay_with_jnp(monkeypatch):
    monkeypatch.setattr("moe_jax.moe.route.gate", None)
    config = replace(BASE, gate="softmax", bias_rate=0, rule="token_rounding")
    assert config.rule not in KERNEL_RULES
    logits, bias = draw(9, 12)
    assert route(logits, bias, config, kernels=True).experts.shape == (9, 4)


def test_no_gradient_reaches_the_bias():
    logits, bias = draw(5, 8)
    objective = lambda b: gate(logits, b, SIGMOID).weights.sum()  # noqa: E731
    assert not np.any(jax.grad(objective)(bias))


def test_gradient_equals_finite_differences():
    logits, bias = draw(3, 8)
    slope = np.asarray(gradient(gate, logits, bias, SIGMOID))
    experts = np.asarray(gate(logits, bias, SIGMOID).experts)
    each = np.sin(np.arange(experts.size).reshape(experts.shape))

    def objective(logits):
        scores = 1 / (1 + np.exp(-logits))
        chosen = np.take_along_axis(scores, experts, axis=1)
        weights = 2.5 * chosen / chosen.sum(axis=1, keepdims=True)
        return (each * weights).sum() + np.cos(7 * scores).sum()

    wide = np.asarray(logits, np.float64)
    for at in np.ndindex(wide.shape):
        step = np.zeros_like(wide)
        step[at] = 1e-6
        numeric = (objective(wide + step) - objective(wide - step)) / 2e-6
        assert abs(slope[at] - numeric) < 1e-5


def test_no_token_at_all():
    actual = gate(jnp.zeros((0, 8)), None, SIGMOID)
    assert (actual.experts.shape, actual.weights.shape, actual.scores.shape) == (
        (0, 3),
        (0, 3),
        (0, 8),
    )


def test_the_same_bits_every_time_and_under_vmap():
    logits, bias = draw(10, 8)
    once = gate(logits, bias, SIGMOID)
    both = jax.vmap(lambda a: gate(a, bias, SIGMOID))(jnp.stack([logits, -logits]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), both, once)
    jax.tree.map(np.testing.assert_array_equal, gate(logits, bias, SIGMOID), once)


def test_each_device_routes_its_own_tokens():
    logits, bias = draw(8, 8)
    mesh = make_mesh(devices=jax.devices()[:2])
    shared = jax.shard_map(
        lambda a: gradient(gate, a, bias, SIGMOID),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    parts = [gradient(gate, half, bias, SIGMOID) for half in jnp.split(logits, 2)]
    np.testing.assert_array_equal(jax.jit(shared)(logits), np.concatenate(parts))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GateConfig(9), "9 experts a token, of 8"),
        (GateConfig(3, groups=3), "1 of 3 groups do not fit 8 experts"),
        (GateConfig(3, groups=4, groups_per_token=1), "3 experts a token, of 2"),
        (GateConfig(3, "tanh"), "function 'tanh': the gate has softmax and sigmoid"),
        (GateConfig(3, representatives=0), "by 0 representatives"),
    ],
)
def test_what_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        gate(jnp.zeros((2, 8)), None, config)


def test_a_bias_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"logits \(2, 8\) and bias \(7,\)"):
        gate(jnp.zeros((2, 8)), jnp.zeros(7), SIGMOID)


def test_without_a_way_to_run_it_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"the devices are cpu.*use implementation 'auto'"):
        gate(jnp.zeros((2, 8)), None, SIGMOID)
