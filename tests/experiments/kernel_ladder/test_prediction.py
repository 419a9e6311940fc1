"""Predicted times follow from the stated model, and every one is a range."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernel_ladder import cases, compiled, first_run, gains, measurement, xla_path
from experiments.kernel_ladder.calibration import Band
from experiments.kernel_ladder.prediction import Prediction, calibrated, without_y
from experiments.kernel_ladder.program_text import Counted
from experiments.kernel_ladder.ragged_path import expanded_numbers, predict_ragged
from experiments.kernel_ladder.ranges import Range, Step, speed
from experiments.kernel_ladder.rungs import rung_of
from experiments.kernel_ladder.verdict import against_claim
from moe_jax.moe import xla
from moe_jax.moe.plan import make_plan

pytest.importorskip("triton")
from moe_kernels.predict import A100, H100

TINY = cases.Shape(20, 16, 8, 3, 2)
BAND = Band(Range(0.5, 0.9), Range(0.4, 0.8))


def test_overflow_turns_are_those_of_the_loops():
    shape = cases.Shape(1200, 8, 4, 4, 2)  # 600 rows an expert, a share of 656
    random = np.random.default_rng(0)
    hot = random.random((1200, 4)) + np.array([1.0, 0.3, 0, 0])
    chosen = np.argsort(-hot, axis=1)[:, :2]
    plan = xla_plan(chosen)
    counted = xla._loop(plan, jnp.ones((1200, 2)), xla_path.batch_rows(shape) // 4, _turn, 0)
    found = xla_path.turns(np.asarray(plan.counts), shape)
    assert sum(found) == int(counted)
    assert min(found) > 0


def _turn(expert, rows, state):
    return state + 1


def xla_plan(chosen):
    return make_plan(jnp.asarray(chosen, jnp.int32), 4)


def test_xla_pays_for_padding_gathers_and_turns():
    shape = cases.SHAPES["OLMoE-1B-7B"]
    counted = compiled.read_recorded()["OLMoE-1B-7B"]["xla"]["forward"]
    even = np.full(64, 1024)
    step = xla_path.predict_xla(shape, even, counted, "forward", H100)
    assert step.seconds.low < step.seconds.high
    products = shape.flops * 1088 / 1024 / H100.gemm  # C is 1024 + 2 sqrt(1024) rows
    gathers = 2 * 2 * 64 * 1088 * 2048 / H100.memory
    assert step.seconds.low > products + gathers
    skewed = even.copy()
    skewed[0] += 512
    skewed[1] -= 512
    more = xla_path.predict_xla(shape, skewed, counted, "forward", H100)
    # 448 rows beyond C: a turn of 256 and three of 64, each with the expert's matrices.
    matrices = 3 * 2 * 3 * 2048 * 1024 / H100.memory
    assert more.seconds.low - step.seconds.low > 4 * matrices
    assert "4 overflow turns" in more.note


def test_ragged_dot_by_hand():
    counted = Counted(TINY.flops * 3, 5, (), (), 0)
    step = predict_ragged(TINY, counted, "forward", H100)
    rows = 20 * 2 * 3 * (16 + 8)
    assert expanded_numbers(TINY, "forward") == rows
    expected = 3 * TINY.flops / H100.gemm + 4 * rows / H100.memory + 5 * 3e-6
    assert step.seconds.low == pytest.approx(expected)
    assert step.seconds.high > expected
    assert "3x the FLOPs" in step.note
    assert not step.left_out
    large = predict_ragged(TINY, Counted(1.0, 1, (), (), 10**12), "forward", H100)
    assert "1000 GB of temporaries do not fit into 80 GB" in large.left_out
    steps = {"ragged_dot": large, "xla": step}
    found = gains.predicted_gains(steps, 1e-6)
    assert set(found) == {"xla"}
    assert found["xla"].over_ragged_dot is found["xla"].over_before is None


def test_ranges_of_ratios_hold_every_pair():
    assert speed(Range(2, 4), Range(8, 12)) == Range(2, 6)
    assert Range(0.012, 25).text() == "0.012-25"
    assert against_claim(Range(0.5, 1.9)) == "below"
    assert against_claim(Range(2.0, 4.9)) == "inside"
    assert against_claim(Range(1.0, 3.0)) == "partly inside"
    assert against_claim(Range(6.0, 9.0)) == "above"


@pytest.mark.parametrize("device", [H100, A100])
def test_every_prediction_is_a_range(device, without_compiler):
    shape = cases.QUICK["small"]
    prediction = Prediction(shape, device, BAND, compiled.read_recorded()["small"], 0)
    steps = prediction.rungs()
    assert ("fp8" in steps) == (device is H100)
    for name, step in steps.items():
        assert 0 < step.seconds.low < step.seconds.high, name
        assert step.bound is not None
        if rung_of(name).change is not None:
            assert step.seconds == calibrated(step.bound, BAND.forward)
    found = gains.predicted_gains(steps, shape.flops / device.gemm)
    for name, gain in found.items():
        assert gain.of_gemm_bound is not None
        assert gain.of_gemm.low < gain.of_gemm.high <= gain.of_gemm_bound, name
        for field in ("over_xla", "over_ragged_dot"):
            assert getattr(gain, field).low <= getattr(gain, field).high
    assert found["xla"].over_xla == found["ragged_dot"].over_ragged_dot == (1, 1)
    assert found["ragged_dot"].over_before is None
    if device is H100:
        assert steps["fp8_once"].bound < steps["fp8"].bound


def test_training_is_the_sum_of_its_launches(without_compiler):
    shape = cases.QUICK["small"]
    prediction = Prediction(shape, H100, BAND, compiled.read_recorded()["small"], 0)
    train_step = prediction.train()
    bounds = {"forward": 0.0, "backward": prediction.gate_gradient().seconds}
    for launch in first_run.train_launches(shape, 90):
        side = "backward" if first_run.launch_name(launch) in first_run.BACKWARD else "forward"
        bounds[side] += prediction.predictor.time(launch).seconds
    assert train_step.bound == pytest.approx(sum(bounds.values()))
    assert train_step.seconds.low == pytest.approx(
        bounds["forward"] / 0.9 + bounds["backward"] / 0.8
    )
    assert train_step.seconds.high == pytest.approx(
        bounds["forward"] / 0.5 + bounds["backward"] / 0.4
    )
    kept = without_y(shape, train_step, H100)
    assert kept.speedup
    assert 1 < kept.speedup.low < kept.speedup.high


def test_an_idea_is_compared_by_the_bounds_at_both_rates_of_l2():
    own = Step(Range(1, 2), bound=1.0, bound_low_l2=2.0)
    previous = Step(Range(2, 4), bound=3.0, bound_low_l2=4.0)
    assert gains.step_gain(own, previous) == Range(2, 3)
    assert gains.step_gain(own, Step(Range(2, 4), bound=2.0)) == Range(1, 4)


def test_measured_ranges_are_over_the_rounds():
    seconds = {"xla": [2.0, 3.0], "grouped": [1.0, 1.0], "gemm": [0.5, 0.4]}
    seconds |= {"raster train": [3.0, 4.0], "xla train": [6.0, 4.0]}
    found = gains.measured_gains(seconds)
    assert found["grouped"].over_xla == found["grouped"].over_before == (2, 3)
    assert found["grouped"].over_ragged_dot is None
    assert found["grouped"].of_gemm == (0.4, 0.5)
    trained = gains.measured_train(seconds)
    assert trained.over_xla == (1, 2)
    assert trained.of_gemm == pytest.approx((0.3, 0.5))
    assert measurement.speed_without_y(seconds) is None
    assert measurement.speed_without_y({**seconds, "with y": [3.3, 4.0]}) == pytest.approx((1, 1.1))


def test_measurements_are_read_back():
    gain = gains.Gain(Range(0.5, 2), Range(20, 90), Range(1, 1.1), Range(0.3, 0.6), 0.7)
    rows = {m.name: m for m in gains.gain_measurements("OLMoE-1B-7B", "raster", gain, "PREDICTED")}
    assert rows["olmoe_1b_7b_raster_low"].value == 0.5
    assert rows["olmoe_1b_7b_raster_high"].value == 2
    assert gains.recorded_gains(rows, ["OLMoE-1B-7B"]) == {"OLMoE-1B-7B": {"raster": gain}}
