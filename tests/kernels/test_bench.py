"""The benchmark measures what it says: run whole in the interpreter, where times mean nothing."""

import json

import jax
import numpy as np
import pytest
from moe_kernels import timing
from moe_kernels.bench import __main__ as command
from moe_kernels.bench import measure, tune
from moe_kernels.bench.launches import LAUNCHES, PRODUCTS, all_work
from moe_kernels.bench.peers import default_peers, load_peers
from moe_kernels.bench.plot import draw
from moe_kernels.bench.programs import runnable
from moe_kernels.bench.shapes import SONIC, Shape, make_inputs
from moe_kernels.experts.shapes import Tiles
from moe_kernels.launch import Support, Tuning

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
def test_decoding_runs(monkeypatch):
    monkeypatch.setattr(measure, "DECODING", (1,))
    rows = measure.measure_decoding("tiny", TINY, "float32", PEERS, rounds=1)
    names = {f"{n} forward T={t}" for n in ("triton", "xla") for t in (1,)}
    assert rows["decoding"].keys() == names


def test_tuning_compiles_and_times_the_operations_own_launches_alone(monkeypatch):
    compiled = []
    real = tune.together

    def together(launches):
        compiled.append([work.function for work in launches])
        return real(launches)

    monkeypatch.setattr(tune, "together", together)
    candidates = [Tiles(16, 16, Tuning()), Tiles(16, 32, Tuning())]
    options = {"rounds": 1, "candidates": lambda _: candidates}
    operations = ("up", "matrix gradient")
    tuned = tune.tune("tiny", TINY, "float32", PEERS, operations=operations, **options)["tuned_ms"]
    assert tuned.keys() == set(operations)
    for operation in operations:
        assert tuned[operation]["fastest"].keys() == {"table", *map(str, candidates)}
        assert tuned[operation]["table"] == tuned[operation]["fastest"]["table"]
    # The table's tiles and two candidates: one launch of `up`, two of the matrices' gradients.
    assert [len(functions) for functions in compiled] == [1, 1, 1, 2, 2, 2]


def test_a_layer_is_the_sum_of_its_launches():
    """The FLOPs of the launches are the layer's, and each launch runs on the arrays it is given."""
    work = all_work(TINY, "float32", PEERS)
    assert work.keys() == set(LAUNCHES)
    assert sum(launch.flops for launch in work.values()) == 3 * TINY.flops
    assert all(launch.flops or launch.bytes for launch in work.values())


@pytest.mark.slow
def test_a_row_of_launches_has_a_rate_for_each(monkeypatch):
    monkeypatch.setattr(measure, "COPIED_BYTES", 1 << 10)
    row = measure.measure_launches("tiny", TINY, "float32", PEERS, rounds=1, size=32)
    calls = row["calls"]
    assert calls.keys() == {"plain gemm", "copy", *LAUNCHES}
    assert calls["plain gemm"]["of_gemm"] == pytest.approx(1)
    assert calls["copy"]["of_copy"] == pytest.approx(1)
    up = calls["up"]
    assert up["teraflops"] * up["microseconds"] * 1e6 == pytest.approx(TINY.flops * 2 / 3)
    assert all("of_gemm" in calls[launch] for launch in PRODUCTS)
    assert all("of_copy" in calls[launch] for launch in ("gate", "schedule", "combine"))


RESOURCES = "RuntimeError: RESOURCE_EXHAUSTED: out of memory"


def test_what_does_not_fit_is_left_out_with_a_line(capsys):
    def make():
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    assert runnable("xla train", make) is None
    assert capsys.readouterr().out == f"xla train: left out: {RESOURCES}\n"


def test_arrays_that_do_not_fit_leave_out_a_shape_and_not_the_run(monkeypatch, tmp_path, capsys):
    def measure_layers(name, *_, **__):
        if name.startswith("OLMoE"):
            raise MemoryError("RESOURCE_EXHAUSTED: make_inputs")
        return {"name": name, "dtype": "bfloat16", "calls": {}}

    monkeypatch.setattr(command, "triton_support", lambda: Support("gpu", ""))
    monkeypatch.setattr(command, "measure_layers", measure_layers)
    file = tmp_path / "bench.json"
    shapes = ["--shapes", "OLMoE-1B-7B", "Qwen3-30B-A3B"]
    assert command.main(["--json", str(file), *shapes]) == 0
    assert "OLMoE-1B-7B: left out: MemoryError: RESOURCE_EXHAUSTED" in capsys.readouterr().out
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["Qwen3-30B-A3B"]


def test_every_call_is_waited_for_once_in_a_batch(monkeypatch):
    """A library with a stream of its own is waited for as JAX is: once, after the batch."""
    waits = []

    class Stream:
        def block_until_ready(self):
            waits.append(1)

    monkeypatch.setattr(timing, "_repeats", lambda _: 50)
    timing.paired({"torch": Stream}, rounds=2)
    assert len(waits) == 2


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    assert jax.default_backend() == "cpu"
    assert command.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_grid_keeps_the_work():
    for name in ("1.4B", "7B", "30B", "120B"):
        flops = {shape.flops for key, shape in SONIC.items() if f" {name} " in key}
        assert len(flops) == 1
