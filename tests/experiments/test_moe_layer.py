"""The layer's experiment on small sizes: what it compares computes the same, and it writes all."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.moe_layer import run as moe_layer
from experiments.moe_layer import scaling, timing
from experiments.moe_layer.models import MODELS, model_shape
from experiments.moe_layer.peers import VARIANTS, ragged_layer, to_torch, transformers_block
from experiments.moe_layer.timing import Call
from moe_jax.study.layer_case import Shape, layer, make_inputs, moe_config, with_gradients

SHAPE = Shape(24, 16, 8, 6, 2)
NAMES = (
    "forward_of_gemm",
    "train_of_gemm",
    "skewed_forward_of_gemm",
    "forward_over_transformers",
    "train_over_transformers",
    "forward_over_ragged_dot",
    "saved_bytes_of_formula",
    "deterministic",
)


def test_a_power_law_has_its_exponent():
    sizes = [1, 2, 4, 8]
    assert scaling.slope(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_ragged_dot_computes_the_same_layer():
    arguments = make_inputs(SHAPE, 0).arguments
    found = jax.jit(ragged_layer(moe_config(SHAPE)))(*arguments)
    expected = jax.jit(layer(moe_config(SHAPE, "reference")))(*arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_same_layer(variant):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    inputs = make_inputs(SHAPE, 0)
    softmax = replace(moe_config(SHAPE), gate="softmax", bias_rate=0.0)
    run = jax.jit(with_gradients(layer(softmax)))
    out, (dx, d_router, d_gate_up, d_down) = run(inputs.cotangent, inputs.arguments)
    block = transformers_block(SHAPE, inputs, variant)
    x = to_torch(inputs.x[None]).requires_grad_()
    theirs = block(x)
    theirs.backward(to_torch(inputs.cotangent[None]))
    theirs_d = {name: p.grad for name, p in block.named_parameters()}
    pairs = [
        (theirs.detach()[0], out),
        (x.grad[0], dx),
        (theirs_d["gate.weight"], d_router.T),
        (theirs_d["experts.gate_up_proj"], jnp.swapaxes(d_gate_up, 1, 2)),
        (theirs_d["experts.down_proj"], jnp.swapaxes(d_down, 1, 2)),
    ]
    for found, expected in pairs:  # float32 sums of some dozen terms near 1, in another order
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_point_of_a_curve():
    point = scaling.scaling_point(SHAPE, value=24, rounds=1, seed=0)
    assert point.value == 24
    assert min(point.forward, point.train, point.gemm) > 0
    assert 0 < point.forward_bytes < point.train_bytes


def test_slow_calls_leave_the_rounds_and_ratios_stay_within_one(monkeypatch):
    seconds = {"slow": iter([9.0, 8.0, 4.0]), "fast": iter([1.0, 2.0, 1.0, 5.0, 5.0])}
    monkeypatch.setattr(timing, "timed", lambda name: next(seconds[name]))
    slow = Call("slow", "slow", flops=6.0)
    fast = Call("fast", "fast", flops=3.0)
    times = timing.paired_rounds([slow, fast], rounds=4)
    assert np.isnan(times.seconds["slow"][2:]).all()
    assert times.speedup("fast", "slow") == 4.0  # 8 / 2 and 4 / 1
    assert times.rate_of("fast", "slow") == 2.0
    assert times.speedup("fast", "absent") is None
    assert times.rate_of("absent", "slow") is None


@pytest.mark.parametrize("name", MODELS)
def test_real_models_keep_their_experts(name):
    shape = model_shape(name, most_flops=4e9, most_tokens=4096)
    assert (shape.experts, shape.per_token) == MODELS[name][2:]
    assert shape.flops <= 4e9
    assert shape.experts * shape.expert_bytes <= 256e6


def power_law(shape, value, rounds, seed):
    """Stands for scaling_point, whose programs take a second each to compile."""
    return scaling.Point(value, value, 2 * value, value, value**2, 3 * value**2)


@pytest.mark.slow
def test_writes_every_measurement(tmp_path, monkeypatch):
    small = replace(
        moe_layer.QUICK,
        reference=SHAPE,
        gemm=16,
        rounds=2,
        fewer_rounds=1,
        base=SHAPE,
        curves={"T": [8, 16], "E": [4, 8], "K": [1, 2]},
        decoding=(replace(SHAPE, tokens=1),),
        decoding_tokens=(1,),
        megabytes=1,
        models=(),
    )
    monkeypatch.setattr(moe_layer, "QUICK", small)
    monkeypatch.setattr(scaling, "scaling_point", power_law)
    monkeypatch.setattr("experiments.moe_layer.peers.missing_package", lambda: "torch")
    moe_layer.main(["--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    found = {m["name"]: m for m in result["measurements"]}
    assert set(NAMES) <= set(found)
    assert found["forward_over_transformers"]["value"] is None
    assert "absent: torch" in found["forward_over_transformers"]["baseline"]
    assert found["saved_bytes_of_formula"]["value"] == 1
    assert found["deterministic"]["value"] == 1
    assert found["forward_of_gemm"]["value"] > 0
    assert found["slope_time_T"]["value"] == pytest.approx(1)
    assert found["slope_bytes_E"]["value"] == pytest.approx(2)
    assert {"rates.png", "scaling.png"} <= {p.name for p in (tmp_path / "plots").iterdir()}
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") > 10
