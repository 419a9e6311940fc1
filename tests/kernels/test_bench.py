"""The benchmark measures what it says: run whole in the interpreter, where times mean nothing."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "kernels"))
import bench

from moe_jax.moe.plan import make_plan

pytest.importorskip("triton")
TINY = bench.Shape(6, 16, 8, 2, 1)


@pytest.mark.slow
def test_a_row_holds_every_call_and_the_limit(tmp_path):
    row = bench.bench("tiny", TINY, "float32", rounds=1, size=32)
    kinds = {f"{name} {kind}" for name in bench.LAYERS for kind in ("forward", "train", "backward")}
    assert {"plain gemm", "grouped gemm"} | kinds <= row["calls"].keys()
    assert row["calls"]["plain gemm"]["of_gemm"] == pytest.approx(1)
    found = row["calls"]["triton forward"]
    assert found["teraflops"] * found["milliseconds"] * 1e9 == pytest.approx(TINY.flops)
    assert found["bytes"] > 0
    bench.draw([row], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_every_layer_computes_the_same():
    inputs = bench.make_inputs(TINY, "float32")
    plan = make_plan(inputs.experts, TINY.experts)
    found = {name: layer(*inputs[:4], plan) for name, layer in bench.LAYERS.items()}
    for name, out in found.items():
        np.testing.assert_allclose(out, found["xla"], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_decoding_and_tuning_run(monkeypatch):
    monkeypatch.setattr(bench, "DECODING", (1,))
    rows = bench.bench_decode("tiny", TINY, "float32", rounds=1)
    names = {f"{n} forward T={t}" for n in ("triton", "xla") for t in (1,)}
    assert rows["decoding"].keys() == names
    monkeypatch.setattr(bench, "OPERATIONS", ("up",))
    tuned = bench.tune("tiny", TINY, "float32", rounds=1, most=2)
    assert len(tuned["tuned_ms"]["up"]) == 2


def test_what_does_not_fit_is_left_out_with_a_line(capsys):
    class Program:
        def compile(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    assert bench.runnable(Program(), (), "xla train") is None
    assert capsys.readouterr().out == "xla train: left out: RESOURCE_EXHAUSTED: out of memory\n"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    assert jax.default_backend() == "cpu"
    assert bench.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_grid_keeps_the_work():
    for name in ("1.4B", "7B", "30B", "120B"):
        flops = {shape.flops for key, shape in bench.SONIC.items() if f" {name} " in key}
        assert len(flops) == 1
