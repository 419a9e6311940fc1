"""The ladder's rungs compute the same layer, and its predictions follow from the stated model."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from moe_kernels.launch import MULTIPROCESSORS

from experiments.kernel_ladder import cases, run
from experiments.kernel_ladder import launch_model as model
from experiments.kernel_ladder.report import recorded_gains, verdict
from experiments.kernel_ladder.rungs import RUNGS, before, built, train, train_with_y
from moe_jax.study.results import read_measurements
from tests.figures import cut_off, overlaps, shown_texts

pytest.importorskip("triton")
TINY = cases.Shape(20, 16, 8, 3, 2)
PRODUCT = model.Product(
    depth=256, columns=256, halves=1, bm=128, bn=128, bk=64, stages=3, group=2, resident=1,
    special=0, threads=256, stored=1, gathered=False,
)  # fmt: skip
DEVICE = model.Device(
    name="two", arch=90, multiprocessors=2, gemm=1e12, memory=1e11, l2_bytes=1e6, l2_rate=1e12,
    latency=1e-6, special=1e9,
)  # fmt: skip


def make_inputs():
    return [a.astype(jnp.float32) for a in cases.make_inputs(TINY, 0)], cases.make_routing(TINY, 0)


@pytest.mark.slow
def test_every_rung_computes_the_layer():
    inputs, plan = make_inputs()
    expected = RUNGS[0].layer(*inputs, plan)
    for rung in RUNGS:
        if rung.name == "ptx":
            continue  # inline PTX: compiled by the audit, run on GPUs
        with built(rung, "float32", plan.block_rows):
            out = rung.layer(*inputs, plan)
        if rung.name == "fp8":
            squares = np.vdot(out, out) + np.vdot(expected, expected)
            difference = 1 - 2 * np.vdot(out, expected) / squares
            assert difference < 5e-3  # four roundings, few numbers
        else:
            np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5, err_msg=rung.name)


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


def test_the_order_of_tiles_is_the_kernels():
    """Three blocks of expert 0, none of 1, one of 2, two columns each, groups of two blocks."""
    order = model.order(np.array([300, 0, 1]), PRODUCT)
    assert order == [
        (0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 2, 0), (0, 2, 1), (2, 3, 0), (2, 3, 1),
    ]  # fmt: skip
    block_expert = np.array([0, 0, 0, 2])
    starts = np.array([0, 384, 384])
    counts = np.array([300, 0, 1])
    for tile, (expert, block, column) in enumerate(order):
        first = starts[expert] // 128
        blocks = -(-counts[expert] // 128)
        own = tile // 2
        assert block_expert[own] == expert
        group = first + (own - first) // 2 * 2
        size = min(2, first + blocks - group)
        within = tile - group * 2
        assert (block, column) == (group + within % size, within // size)


def test_what_fits_in_l2_is_read_once():
    tiles = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    source = np.arange(256).reshape(2, 128)
    row = 512
    panel = 512 * 128
    written = 4 * 128 * 128 * 2
    large = model.dram_bytes(tiles, source, PRODUCT, DEVICE)
    assert large == 256 * row + 2 * panel + written
    none = model.dram_bytes(tiles, source, PRODUCT, DEVICE._replace(l2_bytes=0))
    # Two multiprocessors: the tiles of a wave share their rows, nothing outlives the wave.
    assert none == 256 * row + 4 * panel + written


def test_a_step_without_asynchronous_copies_waits():
    flops = 2 * 128 * 128 * 64
    size = 2 * 256 * 64
    compute = flops * 2 / 1e12
    copy = size * 2 / 1e12
    one = model.step_seconds(PRODUCT._replace(stages=1), DEVICE)
    assert one == pytest.approx(1e-6 + copy + compute)
    assert model.step_seconds(PRODUCT, DEVICE) == pytest.approx(compute)
    slow = DEVICE._replace(latency=1e-3)
    assert model.step_seconds(PRODUCT, slow) == pytest.approx((1e-3 + copy) / 2)


def test_the_rung_before():
    assert before(RUNGS[0]) is None
    assert {rung.name: before(rung) for rung in RUNGS}["raster"] == "epilogue"


def test_devices_have_as_many_multiprocessors_as_the_kernels_think():
    for device in model.DEVICES.values():
        assert device.multiprocessors == MULTIPROCESSORS[device.arch]


@pytest.mark.slow
def test_the_experiment_labels_what_it_predicts(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import subprocess

    script = Path(__file__).parents[2] / "experiments/kernel_ladder/run.py"
    command = [sys.executable, script, "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["verdict"].startswith("PREDICTED")
    for m in result["measurements"]:
        assert "PREDICTED" in m["unit"] or "formula" in m["unit"]
    assert (tmp_path / "plots" / "ladder.png").stat().st_size > 1000


@pytest.mark.parametrize("device", ["h100", "a100"])
def test_the_recorded_plot_is_drawn_again_and_is_readable(device, tmp_path, capsys, monkeypatch):
    """The plot has every rung and shape of the result, no label over another, and no code name."""
    drawn = []
    monkeypatch.setattr(run, "save_figures", lambda figures, *_: drawn.append(figures["ladder"]))
    recorded = Path(run.__file__).parent / "results" / f"{device}.json"
    run.main(["--recorded", str(recorded), "--out", str(tmp_path)])
    figure = drawn[0]
    texts = [text.get_text() for text in shown_texts(figure)]
    assert figure.get_suptitle().startswith("PREDICTED for ")
    assert {"OLMoE-1B-7B", "Qwen3-30B-A3B", "DeepSeek-V3"} < set(texts)
    assert sum(text.count(".") == 1 and len(text) == 4 for text in texts) >= 27
    assert not overlaps(figure)
    assert not cut_off(figure)
    names = {rung.name for rung in RUNGS}
    assert not names & set(texts)


def test_recorded_gains_are_those_of_the_verdict():
    path = Path(run.__file__).parent / "results" / "h100.json"
    found = recorded_gains(read_measurements(path), cases.SHAPES)
    assert f"Inline PTX is {1.01:.2f}x" in verdict(found, "label")
    assert "All ideas together are 1.00x" in verdict(found, "label")
