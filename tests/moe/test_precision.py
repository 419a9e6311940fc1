"""FP8 emulated by the XLA path: equal to the kernels' reference, and trained straight through."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_kernels.experts_fp8.reference import mixture as reference
from moe_kernels.launch import Support

from moe_jax.base.errors import UserError
from moe_jax.config import MoEConfig
from moe_jax.moe import implementation as moe_implementation
from moe_jax.moe import xla
from moe_jax.moe.implementation import implementation
from moe_jax.moe.layer import Gate, Layer, moe_layer
from moe_jax.moe.plan import make_plan
from moe_jax.moe.precision import FP8
from moe_jax.runs.run import run_training
from moe_jax.train import checks
from tests.conftest import make_run
from tests.moe.test_xla import NAMES, ROUTES, D, E, F, K, draw

FP8_CONFIG = MoEConfig(experts=6, experts_per_token=2, expert_hidden=14, precision="fp8")


@partial(jax.jit, static_argnums=(0, 2))
def results(mixture, experts, dtype):
    """The output and every gradient, by name; mixture takes the plan and the experts last."""
    tokens = len(experts)
    arrays = draw((tokens, D), 1), draw((tokens, K), 2), draw((E, D, 2 * F), 3), draw((E, F, D), 4)
    x, weights, gate_up, down = (a.astype(dtype) for a in arrays)
    plan = make_plan(experts, E, None)
    inputs = x, weights.astype(jnp.float32), gate_up, down
    out, pull = jax.vjp(lambda *a: mixture(*a, plan, experts), *inputs)
    return dict(zip(NAMES, (out, *pull(draw((tokens, D), 5).astype(out.dtype))), strict=True))


def by_emulation(*arguments):
    return xla.mixture(*arguments[:-1], rounding=FP8["power_of_two"])


def by_reference(*arguments):
    return reference(*arguments[:4], arguments[5], power_of_two=True)


@pytest.mark.parametrize("name", ["T = 1", "half of all rows on one expert"])
def test_emulation_equals_the_reference_forward_and_every_gradient(name):
    found = results(by_emulation, ROUTES[name], jnp.float32)
    expected = results(by_reference, ROUTES[name], jnp.float32)
    for part, array in expected.items():
        rms = np.sqrt(np.mean(np.square(array)))
        # float32 sums of widths 10 and 6; what rounds to E4M3's neighbour would be an eighth away.
        np.testing.assert_allclose(found[part], array, rtol=1e-4, atol=1e-4 * rms, err_msg=part)


@pytest.mark.slow
def test_emulation_in_16_bits_is_that_in_float32_rounded():
    half = results(by_emulation, ROUTES["balanced"], jnp.bfloat16)
    assert half["out"].dtype == jnp.bfloat16
    whole = results(by_emulation, ROUTES["balanced"], jnp.float32)
    # The inputs of the one are rounded to bfloat16 first: 2^-9, and by chance a step of E4M3.
    for part in NAMES:
        error = np.asarray(half[part], np.float32) - np.asarray(whole[part])
        assert np.sqrt(np.mean(error**2)) < 0.05 * np.sqrt(np.mean(np.square(whole[part]))), part


def test_the_layer_by_kernels_and_by_emulation():
    x, router = draw((2, 9, 20), 0), draw((20, 6), 1)
    parameters = Layer(Gate(router, jnp.zeros(6)), draw((6, 20, 28), 2), draw((6, 14, 20), 3))
    run = jax.jit(moe_layer, static_argnums=2)
    outs = {
        name: run(x, parameters, replace(FP8_CONFIG, implementation=name))[0]
        for name in ("xla", "triton")
    }
    plain = run(x, parameters, replace(FP8_CONFIG, precision="compute"))[0]

    def error(found, expected):
        return np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))

    # Sums in another order: an activation or two that rounds to E4M3's neighbour.
    assert error(outs["xla"], outs["triton"]) < 1e-3
    assert 0.02 < error(outs["xla"], plain) < 0.1, "four roundings to three bits behind the point"


@pytest.mark.slow
def test_a_run_trains_and_evaluates_with_it(tmp_path, small_model):
    config = make_run(tmp_path, replace(small_model, moe=FP8_CONFIG), steps=4, evaluate_every=4)
    run_training(config)
    assert (tmp_path / "run" / "result.json").exists()


def on_a_gpu(monkeypatch, capability):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    support = Support("gpu", f"card, compute capability {capability}")
    reason = f"compute capability {capability} has no FP8 matrix units"
    for module in (checks, moe_implementation):
        monkeypatch.setattr(module, "triton_support", lambda: support)
        monkeypatch.setattr("moe_jax.moe.implementation.launch_fault", lambda: "")
        fp8 = support if capability >= 8.9 else Support("none", reason)
        monkeypatch.setattr(module, "fp8_support", lambda fp8=fp8: fp8)


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_a_gpu_without_fp8_is_refused_in_one_line(monkeypatch, tmp_path, small_model, name):
    moe = replace(FP8_CONFIG, implementation=name)
    config = make_run(tmp_path, replace(small_model, moe=moe))
    on_a_gpu(monkeypatch, 8.0)
    with pytest.raises(
        UserError, match=r"precision fp8 cannot run: compute capability 8\.0 has no"
    ):
        checks.check_kernels(config)
    emulated = replace(config.model, moe=replace(moe, implementation="xla"))
    checks.check_kernels(replace(config, model=emulated))
    on_a_gpu(monkeypatch, 9.0)
    checks.check_kernels(config)


def test_auto_takes_the_kernels_where_there_is_fp8(monkeypatch):
    on_a_gpu(monkeypatch, 9.0)
    assert implementation("auto", "fp8") == "triton"
    on_a_gpu(monkeypatch, 8.0)
    assert (implementation("auto"), implementation("auto", "fp8")) == ("triton", "xla")


def test_settings_that_do_not_go_together():
    with pytest.raises(UserError, match="precision=fp8 needs implementation auto, xla or triton"):
        MoEConfig(precision="fp8", implementation="reference")
    with pytest.raises(UserError, match="fp8_scales=power_of_two needs precision=fp8"):
        MoEConfig(fp8_scales="power_of_two")
