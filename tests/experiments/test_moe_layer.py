"""The layer's experiment on small sizes: what it compares computes the same, and it writes all."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import moe_layer
from moe_cases import Shape, layer, make_inputs, moe_config, slope
from moe_peers import VARIANTS, ragged_layer, to_torch, transformers_block

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
    assert slope(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)


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
    ours = layer(softmax)(*inputs.arguments)
    theirs = transformers_block(SHAPE, inputs, variant)(to_torch(inputs.x[None]))
    np.testing.assert_allclose(theirs.detach().numpy()[0], ours, rtol=1e-4, atol=1e-5)


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
    monkeypatch.setattr("moe_peers.missing_package", lambda: "torch")
    moe_layer.main(["--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    found = {m["name"]: m for m in result["measurements"]}
    assert set(NAMES) <= set(found)
    assert found["forward_over_transformers"]["value"] is None
    assert "absent: torch" in found["forward_over_transformers"]["baseline"]
    assert found["saved_bytes_of_formula"]["value"] == 1
    assert found["deterministic"]["value"] == 1
    assert found["forward_of_gemm"]["value"] > 0
    assert jnp.isfinite(found["slope_time_T"]["value"])
    assert {"rates.png", "scaling.png"} <= {p.name for p in (tmp_path / "plots").iterdir()}
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") > 10
