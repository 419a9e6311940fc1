"""The benchmark measures what it says: run whole in the interpreter, where times mean nothing."""

import jax
import numpy as np
import pytest
from moe_kernels.bench import __main__ as command
from moe_kernels.bench import measure, tune
from moe_kernels.bench.peers import default_peers, load_peers
from moe_kernels.bench.plot import draw
from moe_kernels.bench.programs import runnable
from moe_kernels.bench.shapes import SONIC, Shape, make_inputs

from moe_jax.moe import xla
from moe_jax.moe.plan import make_plan

pytest.importorskip("triton")
TINY = Shape(6, 16, 8, 2, 1)
PEERS = load_peers(["xla=moe_jax.moe.xla:mixture"], "moe_jax.moe.plan:make_plan")


@pytest.mark.slow
def test_a_row_holds_every_call_and_the_limit(tmp_path):
    row = measure.measure_layers("tiny", TINY, "float32", PEERS, rounds=1, size=32)
    kinds = {f"{name} {kind}" for name in PEERS.layers for kind in ("forward", "train", "backward")}
    assert {"plain gemm", "grouped gemm"} | kinds <= row["calls"].keys()
    assert row["calls"]["plain gemm"]["of_gemm"] == pytest.approx(1)
    entry = row["calls"]["triton forward"]
    assert entry["teraflops"] * entry["milliseconds"] * 1e9 == pytest.approx(TINY.flops)
    assert entry["bytes"] > 0
    draw([row], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_every_layer_computes_the_same():
    inputs = make_inputs(TINY, "float32")
    plan = PEERS.make_plan(inputs.experts, TINY.experts)
    outputs = {name: layer(*inputs[:4], plan) for name, layer in PEERS.layers.items()}
    for name, out in outputs.items():
        np.testing.assert_allclose(out, outputs["xla"], rtol=1e-4, atol=1e-5, err_msg=name)


def test_layers_and_plan_are_found_by_name():
    assert PEERS.layers["xla"] is xla.mixture
    assert PEERS.make_plan is make_plan
    assert default_peers().layers.keys() <= PEERS.layers.keys()
    with pytest.raises(ValueError, match=r"'moe_jax\.moe\.xla:nothing' is no MODULE:FUNCTION"):
        load_peers(["xla=moe_jax.moe.xla:nothing"], None)


def test_the_kernels_plan_is_the_default():
    inputs = make_inputs(TINY, "float32")
    plan = default_peers().make_plan(inputs.experts, TINY.experts)
    expected = make_plan(inputs.experts, TINY.experts)
    assert plan.block_rows == expected.block_rows
    np.testing.assert_array_equal(plan.assignment, expected.assignment)


@pytest.mark.slow
def test_decoding_and_tuning_run(monkeypatch):
    monkeypatch.setattr(measure, "DECODING", (1,))
    rows = measure.measure_decoding("tiny", TINY, "float32", PEERS, rounds=1)
    names = {f"{n} forward T={t}" for n in ("triton", "xla") for t in (1,)}
    assert rows["decoding"].keys() == names
    monkeypatch.setattr(tune, "OPERATIONS", ("up",))
    tuned = tune.tune("tiny", TINY, "float32", PEERS, rounds=1, most=2)
    assert len(tuned["tuned_ms"]["up"]) == 2


def test_what_does_not_fit_is_left_out_with_a_line(capsys):
    class Program:
        def compile(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    assert runnable(Program(), (), "xla train") is None
    assert capsys.readouterr().out == "xla train: left out: RESOURCE_EXHAUSTED: out of memory\n"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    assert jax.default_backend() == "cpu"
    assert command.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_grid_keeps_the_work():
    for name in ("1.4B", "7B", "30B", "120B"):
        flops = {shape.flops for key, shape in SONIC.items() if f" {name} " in key}
        assert len(flops) == 1
