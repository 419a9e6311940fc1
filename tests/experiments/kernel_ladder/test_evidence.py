"""What the predictions rest on: published kernels, and XLA's programs for an absent H100."""

import json
from pathlib import Path

import pytest

from experiments.kernel_ladder import calibration, cases, compiled, run, xla_path
from experiments.kernel_ladder.prediction import calibrated
from experiments.kernel_ladder.program_text import Counted, count_text
from moe_jax.moe import xla

RESULTS = Path(run.__file__).parent / "results"


def recorded_points():
    return calibration.points_from_json(json.loads((RESULTS / "calibration.json").read_text()))


def test_the_recorded_band_covers_the_published_points():
    points = recorded_points()
    band = calibration.band_of(points)
    content = json.loads((RESULTS / "calibration.json").read_text())
    for point in points:
        assert point.ratio == pytest.approx(point.published_tflops / point.model_tflops)
        low, high = content["band"][point.kind]
        assert low <= point.ratio <= high
        # Times calibrated from the bound hold the time of the published kernel.
        times = calibrated(1 / point.model_tflops, getattr(band, point.kind))
        assert times.low <= 1.0000001 / point.published_tflops
        assert times.high >= 0.9999999 / point.published_tflops
    assert content["model"] == calibration.VERSION


def test_the_recorded_table_has_every_published_rate():
    found = {(p.kernel, p.kind, p.shape): p.published_tflops for p in recorded_points()}
    assert len(found) == 2 * 2 * 9
    assert found["SonicMoE", "forward", "sonic 7B n=256"] == 367
    assert found["SonicMoE", "backward", "sonic 120B n=2048"] == 587
    assert found["ScatterMoE", "forward", "sonic 30B n=1024"] == 368
    assert found["ScatterMoE", "backward", "sonic 7B n=512"] == 248


def test_no_published_kernel_passes_the_bound():
    for point in recorded_points():
        assert point.ratio < 1, point


def test_ragged_dot_has_the_flops_of_every_expert_for_every_row():
    for name, layers in compiled.read_recorded().items():
        shape = {**cases.QUICK, **cases.FIRST_RUN}[name]
        for kind, passes in (("forward", 1), ("train", 3)):
            assert layers["ragged_dot"][kind].flops == passes * shape.experts * shape.flops
            padding = xla_path.batch_rows(shape) / (shape.tokens * shape.per_token)
            assert layers["xla"][kind].flops == pytest.approx(passes * padding * shape.flops)


def test_xla_has_two_loops_and_their_turns_have_an_experts_flops():
    for name, layers in compiled.read_recorded().items():
        shape = {**cases.QUICK, **cases.FIRST_RUN}[name]
        share = xla_path.batch_rows(shape) // shape.experts
        sizes = xla.turn_sizes(share, shape.tokens)
        forward = [6.0 * size * shape.width * shape.hidden for size in sizes]
        assert list(layers["xla"]["forward"].turn_flops) == forward
        assert len(layers["xla"]["train"].turn_flops) == 2 * len(sizes)


PROGRAM = """HloModule m, is_scheduled=true
%inner (p.0: bf16[8,4], p.1: bf16[4,6]) -> bf16[8,6] {
  %p.0 = bf16[8,4]{1,0} parameter(0)
  %p.1 = bf16[4,6]{1,0} parameter(1)
  ROOT %d.1 = bf16[8,6]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t.0: (s32[], bf16[2,3,5])) -> (s32[], bf16[2,3,5]) {
  %t.0 = (s32[], bf16[2,3,5]{2,1,0}) parameter(0)
  %g.0 = bf16[2,3,5]{2,1,0} get-tuple-element(%t.0), index=1
  %b.0 = bf16[2,5,7]{2,1,0} custom-call(), custom_call_target="x"
  %d.2 = f32[2,3,7]{2,1,0} dot(%g.0, %b.0), lhs_batch_dims={0}, lhs_contracting_dims={2}
  ROOT %u.0 = (s32[], bf16[2,3,5]{2,1,0}) tuple(%t.0)
}

ENTRY %main (x: bf16[8,4], y: bf16[4,6]) -> bf16[8,6] {
  %x = bf16[8,4]{1,0} parameter(0)
  %y = bf16[4,6]{1,0} parameter(1)
  %f.0 = bf16[8,6]{1,0} fusion(%x, %y), kind=kCustom, calls=%inner
  %w.0 = (s32[], bf16[2,3,5]{2,1,0}) while(%f.0), condition=%c, body=%body
  ROOT %k.0 = bf16[8,6]{1,0} copy(%f.0)
}
"""


def test_flops_and_launches_are_counted_in_a_programs_text():
    counted = count_text(PROGRAM, 7)
    assert counted == Counted(2.0 * 8 * 6 * 4, 2, (2.0 * 2 * 3 * 7 * 5,), (2,), 7)
    library = PROGRAM.replace('target="x"', 'target="__cublas$gemm"')
    with pytest.raises(ValueError, match="library"):
        count_text(library, 7)


@pytest.mark.slow
def test_the_recorded_counts_are_those_of_the_compiler():
    if not compiled.can_compile():
        pytest.skip(f"{compiled.COMPILER} is not installed")
    shape = cases.QUICK["small"]
    recorded = compiled.read_recorded()["small"]
    for layer in compiled.LAYERS:
        counted = compiled.count(shape, layer, "forward")
        assert counted.flops == recorded[layer]["forward"].flops
        assert counted.turn_flops == recorded[layer]["forward"].turn_flops
