"""The ladder's rungs compute the same layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernel_ladder import cases, measurement
from experiments.kernel_ladder.rungs import RUNGS, before, built, rung_of, train, train_with_y

pytest.importorskip("triton")
TINY = cases.Shape(20, 16, 8, 3, 2)


def make_inputs():
    return [a.astype(jnp.float32) for a in cases.make_inputs(TINY, 0)], cases.make_routing(TINY, 0)


@pytest.mark.slow
def test_every_rung_computes_the_layer():
    inputs, plan = make_inputs()
    expected = rung_of("xla").layer(*inputs, plan)
    outputs = {}
    for rung in RUNGS:
        if rung.name == "ptx":
            continue  # inline PTX: compiled by the audit, run on GPUs
        with built(rung, "float32", plan.block_rows):
            out = rung.layer(*measurement.prepared(rung, inputs), plan)
        outputs[rung.name] = np.asarray(out)
        if rung.name.startswith("fp8"):
            squares = np.vdot(out, out) + np.vdot(expected, expected)
            difference = 1 - 2 * np.vdot(out, expected) / squares
            assert difference < 5e-3  # four roundings, few numbers
        else:
            np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5, err_msg=rung.name)
    np.testing.assert_array_equal(outputs["fp8"], outputs["fp8_once"])


@pytest.mark.slow
def test_the_gradient_from_y_is_the_one_without_it():
    from moe_kernels.experts import grouped

    from moe_jax.moe.experts import swiglu

    inputs, plan = make_inputs()
    x, _, gate_up, down = inputs
    y = grouped(swiglu(grouped(x, gate_up, plan, gathered=True)), down, plan)
    y = jnp.nan_to_num(y)  # rows of unused blocks
    (_, gradients), by_row = train_with_y(y, *inputs, plan, x)
    np.testing.assert_allclose(by_row[plan.row], gradients[1], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(train(*inputs, plan, x)[1][1], gradients[1])


def test_the_rung_before():
    ladder = {rung.name: before(rung) for rung in RUNGS}
    assert RUNGS[0].name == "ragged_dot"
    assert ladder["ragged_dot"] is None
    assert ladder["xla"] == "ragged_dot"
    assert ladder["raster"] == "epilogue"
    assert ladder["fp8"] == ladder["fp8_once"] == "raster"


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_of_a_measurement(monkeypatch, capsys):
    """measure() on the CPU: XLA's rungs are compiled, and the kernels are interpreted."""
    import jax

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    some = [rung_of("ragged_dot")._replace(layer=fail), rung_of("xla")]
    monkeypatch.setattr(measurement, "possible", lambda arch: some)
    monkeypatch.setattr(measurement, "TRAINED", ("xla",))
    monkeypatch.setattr(measurement, "DTYPE", "float32")
    monkeypatch.setattr(cases, "DTYPE", "float32")
    steps, seconds = measurement.measure(TINY, 0, 2)
    assert set(steps) == {"xla"}
    assert set(seconds) == {"xla", "xla train", "with y", "gemm"}
    assert "ragged_dot: left out: RESOURCE_EXHAUSTED" in capsys.readouterr().out
    assert steps["xla"].seconds.low <= steps["xla"].seconds.high
