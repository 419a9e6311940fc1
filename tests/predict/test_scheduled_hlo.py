"""The model's two streams on small programs, and the shares of the layer on absent H100s (slow)."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_jax.base.errors import UserError
from moe_jax.predict.absent import check_target, missing
from moe_jax.predict.collectives import RING_BASE, Fabric
from moe_jax.predict.hardware import Link, card_names, find_card
from moe_jax.predict.hlo_text import parse, shape_bytes
from moe_jax.predict.schedule import replica_group
from moe_jax.predict.scheduled_hlo import Rates, covered_by_products, timeline

ROOT = Path(__file__).parents[2]
FABRIC = Fabric(
    node=2,
    inside=Link("inside", peak=1e9, rate=1e9, hop=0.0, tree_hop=0.0),
    outside=Link("outside", peak=1e8, rate=1e8, hop=0.0, tree_hop=0.0),
)
RATES = Rates(flops=1e12, memory=1e12, fabric=FABRIC)

PROGRAM = """HloModule small, is_scheduled=true

%sliced (p0: f32[8,1000], p1: s32[]) -> f32[1,1000] {
  %p0 = f32[8,1000]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = f32[1,1000]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,1000}
}

%body (state: (s32[], f32[8,1000])) -> (s32[], f32[8,1000]) {
  %state = (s32[], f32[8,1000]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,1000]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,1000]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced
  ROOT %next = (s32[], f32[8,1000]{1,0}) tuple(%i, %x)
}

ENTRY %main (a: f32[1000,1000], b: f32[1000,500]) -> f32[1000,500] {
  %a = f32[1000,1000]{1,0} parameter(0)
  %b = f32[1000,500]{1,0} parameter(1)
  %start = ((f32[1000,500]{1,0}), f32[1000,500]{1,0}) all-to-all-start(%b), replica_groups={{0,1}}
  %copy = f32[1000,1000]{1,0} copy(%a)
  %dot = f32[1000,500]{1,0} dot(%copy, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = f32[1000,500]{1,0} all-to-all-done(%start)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8,1000]{1,0}) tuple(%zero, %done)
  %known = (s32[], f32[8,1000]{1,0}) while(%init), condition=%c, body=%body, metadata={op_name="jit(f)/step/while"}, backend_config={"known_trip_count":{"n":"3"}}
  %open = (s32[], f32[8,1000]{1,0}) while(%init), condition=%c, body=%body
  %ours = (f32[1000,500]{1,0}, f32[1]{0}) custom-call(%dot), custom_call_target="k", frontend_attributes={bytes="7",flops="2000000000",latency_metadata="1"}
  ROOT %first = f32[1000,500]{1,0} get-tuple-element(%ours), index=0, frontend_attributes={flops="2000000000"}
}
"""  # noqa: E501


def test_bytes_of_shapes():
    assert shape_bytes("(bf16[8,4]{1,0}, s32[], pred[3]{0}, f8e4m3fn[2]{0})") == 64 + 4 + 3 + 2


def test_operands_are_names_and_not_attributes():
    program = parse(PROGRAM)
    body = {i.name: i for i in program.computations[program.entry]}
    assert body["dot"].operands == ("copy", "b")
    assert body["known"].called == "body"
    assert body["first"].root


def test_two_streams():
    line = timeline(PROGRAM, RATES)
    # 2 MB, of which half leaves the device, on a link of 1 GB/s
    assert line.transfers == pytest.approx(1e-3 + RING_BASE)
    # 2 · 1000 · 1000 · 500 FLOPs at 1 TFLOP/s, and the kernel's 2 GFLOP that its attributes state.
    # The attributes of its result do not count again.
    assert line.products == pytest.approx(1e-3 + 2e-3)
    # The copy of 4 MB, read and written. Three turns of a loop read and write a row of 4 kB and its
    # index, and not the array that it is cut from. A loop without a known number of turns is none.
    assert line.rest == pytest.approx(8e-6 + 3 * (8e-9 + 4e-12))
    # The copy and the product take 8 microseconds and 1 ms, and the transfer its latency and 1 ms.
    assert line.stalled == pytest.approx(RING_BASE - 8e-6)
    assert line.total == pytest.approx(line.products + line.rest + line.stalled)
    assert line.covered == pytest.approx(1 - line.stalled / line.transfers)


def test_one_turn_of_a_named_loop():
    line = timeline(PROGRAM, RATES, loop="step")
    assert line.rest == line.total == pytest.approx(8e-9 + 4e-12)
    with pytest.raises(KeyError, match="no loop in the scope other"):
        timeline(PROGRAM, RATES, loop="other")


def test_copies_cover_nothing():
    without = PROGRAM.replace("dot(%copy", "dot(%copy").replace(
        "%done = f32[1000,500]{1,0} all-to-all-done(%start)\n", ""
    )
    early = without.replace(
        "  %dot =", "  %done = f32[1000,500]{1,0} all-to-all-done(%start)\n  %dot ="
    )
    assert covered_by_products(early, RATES) == 0
    assert timeline(early, RATES).covered == pytest.approx(8e-6 / (1e-3 + RING_BASE))


def test_the_slower_way_counts():
    """Four devices in nodes of two: a quarter of the bytes goes to the neighbour, half goes out."""
    four = PROGRAM.replace("{{0,1}}", "[1,4]<=[4]")
    assert timeline(four, RATES).transfers == pytest.approx(2e6 / 2 / 1e8 + RING_BASE)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, more", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','b'}", [0, 2, 4, 6, 8, 10, 12, 14]),
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(2)2}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
    ],
)
def test_replica_groups(text, group):
    assert replica_group(text) == group


def predicted(name, out):
    """The measurements of an experiment that compiles for absent GPUs, with --quick."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--quick"]
    done = subprocess.run(
        [*command, "--out", str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((out / "result.json").read_text())["measurements"]
    return {row["name"]: row["value"] for row in rows}


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("name", card_names())
def test_xla_compiles_for_every_card(name):
    check_target(find_card(name))


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_description_that_ends_the_compiler_is_one_line():
    card = find_card("h100")
    broken = replace(card, xla={**card.xla, "block_dim_limit_x": 0})
    with pytest.raises(UserError, match="cannot compile for h100: it ended with signal 8"):
        check_target(broken)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_shares_and_times_of_the_layer_on_eight_h100(tmp_path):
    """The compiled program keeps its overlap: predicted shares and times."""
    found = predicted("expert_parallel", tmp_path)
    assert found["covered_plain"] <= 0.10
    assert found["covered_chunked_forward"] >= 0.90
    assert found["covered_chunked_backward"] >= 0.90
    assert found["chunked_scanned_backward.covered"] >= 0.90
    assert found["speedup_scanned_forward"] >= 1.15
    assert found["speedup_scanned_backward"] >= 1.10
    assert found["covered_chunked_step"] >= 0.88
    assert found["speedup_step"] >= 1.01
    # The scan slices no layer's experts out of the stack.
    assert found["plain_step.copied"] == found["chunked_step.copied"] == 0


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_the_exchange_lies_under_products_in_dualpipes_overlapped_step(tmp_path):
    """A forward of one micro-batch and a backward of another, on a pipeline over eight H100."""
    found = predicted("pipeline_overlap", tmp_path)
    assert found["8.covered_apart"] <= 0.25
    assert found["8.covered_overlapped"] >= 0.65
    assert found["8.overlapped.total"] <= 1.02 * found["8.apart.total"]
    assert found["8.overlapped.stalled"] <= 0.25 * found["8.apart.stalled"]
    # Nothing is sent in the gradient of the weights.
    assert found["8.backward_weight.transfers"] == 0
