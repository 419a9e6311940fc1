"""What the loops of a small program copy, and how much of each kind of transfer is covered."""

import pytest

from moe_jax.predict.collectives import Fabric
from moe_jax.predict.copies import copied_in_loops
from moe_jax.predict.hardware import Link
from moe_jax.predict.scheduled_hlo import Rates, timeline

PROGRAM = """HloModule small, is_scheduled=true

%cast (p0: f32[3,2,8,16], p1: s32[]) -> bf16[1,2,8,16] {
  %p0 = f32[3,2,8,16]{3,2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %slice = f32[1,2,8,16]{3,2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,2,8,16}
  ROOT %convert = bf16[1,2,8,16]{3,2,1,0} convert(%slice)
}

%place (p2: f32[3,2,8,16], p3: bf16[2,8,16], p4: s32[]) -> f32[3,2,8,16] {
  %p2 = f32[3,2,8,16]{3,2,1,0} parameter(0)
  %p3 = bf16[2,8,16]{2,1,0} parameter(1)
  %p4 = s32[] parameter(2)
  %wide = f32[2,8,16]{2,1,0} convert(%p3)
  %one = f32[1,2,8,16]{3,2,1,0} bitcast(%wide)
  ROOT %update = f32[3,2,8,16]{3,2,1,0} dynamic-update-slice(%p2, %one, %p4)
}

%body (state: (s32[], f32[3,2,8,16], f32[64,8])) -> (s32[], f32[3,2,8,16], f32[64,8]) {
  %state = (s32[], f32[3,2,8,16]{3,2,1,0}, f32[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = f32[3,2,8,16]{3,2,1,0} get-tuple-element(%state), index=1
  %x = f32[64,8]{1,0} get-tuple-element(%state), index=2
  %own = bf16[1,2,8,16]{3,2,1,0} fusion(%w, %i), kind=kLoop, calls=%cast
  %start = ((f32[64,8]{1,0}), f32[64,8]{1,0}) all-to-all-start(%x), replica_groups={{0,1}}
  %d = bf16[2,8,16]{2,1,0} custom-call(%x, %own), custom_call_target="k", frontend_attributes={bytes="0",flops="4096"}
  %done = f32[64,8]{1,0} all-to-all-done(%start)
  %sum = f32[64,8]{1,0} all-reduce(%done), replica_groups={{0,1}}
  %next = f32[3,2,8,16]{3,2,1,0} fusion(%w, %d, %i), kind=kLoop, calls=%place
  ROOT %out = (s32[], f32[3,2,8,16]{3,2,1,0}, f32[64,8]{1,0}) tuple(%i, %next, %sum)
}

ENTRY %main (w0: f32[3,2,8,16], x0: f32[64,8]) -> (s32[], f32[3,2,8,16], f32[64,8]) {
  %w0 = f32[3,2,8,16]{3,2,1,0} parameter(0)
  %x0 = f32[64,8]{1,0} parameter(1)
  %once = f32[3,2,8,16]{3,2,1,0} copy(%w0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[3,2,8,16]{3,2,1,0}, f32[64,8]{1,0}) tuple(%zero, %once, %x0)
  ROOT %loop = (s32[], f32[3,2,8,16]{3,2,1,0}, f32[64,8]{1,0}) while(%init), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_copies_of_matrices_in_loops():
    """The cast slice of each turn, and neither products, updates in place nor what runs once."""
    assert copied_in_loops(PROGRAM, {(8, 16)}) == 3 * 2 * 8 * 16 * 2
    assert copied_in_loops(PROGRAM, {(16, 8)}) == 0


def test_each_kind_of_transfer():
    """1 KiB on the wire in each turn takes 1024 s, of which the product covers 512."""
    link = Link("link", peak=1, rate=1, hop=0.0, tree_hop=0.0)
    rates = Rates(flops=8, memory=1e12, fabric=Fabric(node=2, inside=link, outside=link))
    line = timeline(PROGRAM, rates)
    assert line.of("all-to-all").seconds == pytest.approx(3 * 1024)
    assert line.of("all-to-all").covered == pytest.approx(0.5, abs=1e-6)
    assert line.of("all-reduce").seconds == pytest.approx(3 * 2048)
    assert line.of("all-reduce").covered == pytest.approx(0, abs=1e-9)
    assert line.stalled == pytest.approx(3 * (512 + 2048), abs=1e-3)
