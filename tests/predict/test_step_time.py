"""Prices of a card, intervals, and totals by kind and axis."""

import math
from dataclasses import replace

import pytest

from moe_jax.base.errors import UserError
from moe_jax.config.presets import PRESETS
from moe_jax.model.count import train_flops_per_token
from moe_jax.predict.answer import answer, read_command
from moe_jax.predict.hardware import find_card
from moe_jax.predict.hlo_text import parse
from moe_jax.predict.published import ROWS
from moe_jax.predict.published_pipelines import PIPELINES
from moe_jax.predict.schedule import Start, read_schedule
from moe_jax.predict.step_time import TERMS, CardRates, predict, tiled_seconds
from moe_jax.predict.traffic import axes_of, collective_bytes, total_flops
from moe_jax.predict.work import Work, work_of

VALUES = {name: term.value for name, term in TERMS.items()}
PROGRAM = """HloModule small, is_scheduled=true

%less (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%more (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %m = f32[8]{0} negate(%q)
  ROOT %k = f32[8]{0} negate(%m)
}

%body (s: (s32[], bf16[4096,4096])) -> (s32[], bf16[4096,4096]) {
  %s = (s32[], bf16[4096,4096]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[4096,4096]{1,0} get-tuple-element(%s), index=1
  %g = bf16[32768,4096]{1,0} all-gather(%x), replica_groups=[2,8]<=[16], dimensions={0}
  %d = bf16[4096,4096]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], bf16[4096,4096]{1,0}) tuple(%i, %d)
}

ENTRY %main (a: (s32[], bf16[4096,4096]), c: pred[], v: f32[8]) -> f32[8] {
  %a = (s32[], bf16[4096,4096]{1,0}) parameter(0)
  %c = pred[] parameter(1)
  %v = f32[8]{0} parameter(2)
  %w = (s32[], bf16[4096,4096]{1,0}) while(%a), condition=%e, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = f32[8]{0} conditional(%c, %v, %v), true_computation=%less, false_computation=%more
}
"""  # noqa: E501
ATTENTION = """HloModule small

ENTRY %main (q: bf16[2,1024,16,128], k: bf16[2,1024,4,128]) -> bf16[2,16,1024,128] {
  %q = bf16[2,1024,16,128]{3,2,1,0} parameter(0)
  %k = bf16[2,1024,4,128]{3,2,1,0} parameter(1)
  ROOT %o = bf16[2,16,1024,128]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"mask_type":"CAUSAL"}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "gigaflops"), [("qwen3_30b_a3b", 23.0), ("qwen3_235b", 147.8), ("deepseek_v3", 249.5)]
)
def test_flops_of_a_token_are_those_of_published_tables(name, gigaflops):
    """6 (active parameters without the look-up) and half of attention."""
    known = {row.name: row for row in ROWS}
    if name == "qwen3_235b":
        model = read_command(known["qwen3_235b_256_h100"].argv)[1].model
    else:
        model = PRESETS[name].resolved().model
    without = train_flops_per_token(replace(model, mtp_depth=0), 4096)
    # Published rates have three digits, and their tables leave out the router (0.2 to 0.3%).
    assert without / 1e9 == pytest.approx(gigaflops, rel=0.005)


def test_at_most_a_third_of_the_rows_calibrates():
    rows = (*ROWS, *PIPELINES)
    assert 3 * sum(row.calibrates for row in rows) <= len(rows)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_published_row_is_a_command(row):
    settings, config = read_command(row.argv)
    assert find_card(settings.hardware)
    tokens = config.batch // config.optim.accumulation
    assert tokens % (settings.devices // config.parallel.tensor) == 0
    assert row.source
    assert row.seconds is not None or row.memory is not None


def test_attention_counts_the_half_that_is_not_masked():
    program = parse(ATTENTION)
    body = {i.name: i for i in program.computations[program.entry]}
    work = work_of(program, body["o"], body)
    assert work.kind == "attention"
    assert work.flops == 4 * 2 * 16 * 1024 * 1024 * 128 // 2
    backward = parse(ATTENTION.replace("Softmax", "SoftmaxBackward"))
    body = {i.name: i for i in backward.computations[backward.entry]}
    assert work_of(backward, body["o"], body).flops == 2.5 * work.flops


def test_a_large_product_runs_at_the_measured_rate_and_a_small_one_does_not():
    card = find_card("h100")
    large = (1, 8192, 8192, 8192)
    rate = 2 * math.prod(large) / tiled_seconds(large, card)
    assert 0.85 * card.product_rate < rate <= card.product_rate
    # One tile on one of 132 multiprocessors.
    small = (1, 64, 64, 4096)
    assert 2 * math.prod(small) / tiled_seconds(small, card) < 0.02 * card.product_rate


def test_prices_of_a_kernel_by_hand():
    card = find_card("h100")
    rates = CardRates.of(card, VALUES)
    moved = rates.seconds(Work("rest", 0, 10**9))
    assert moved == pytest.approx(1e9 / (0.9 * 3.35232e12) + 3e-6)
    kernel = rates.seconds(Work("kernel", 10**12, 10**6))
    assert kernel == pytest.approx(1e12 / (TERMS["kernel"].value * 794.5e12) + 3e-6)


def test_the_longer_branch_of_a_condition_runs():
    """Two kernels of few bytes take two launches."""
    line = predict(read_schedule(PROGRAM), find_card("h100")).line
    assert line.rest == pytest.approx(2 * TERMS["launch"].value, rel=0.01)


def test_the_interval_holds_the_value_and_every_term_counts():
    found = predict(read_schedule(PROGRAM), find_card("h100"))
    assert found.low < found.seconds < found.high
    assert set(found.effects) == set(TERMS)
    assert all(fast <= 0 <= slow for fast, slow in found.effects.values())
    squares = sum(slow**2 for _, slow in found.effects.values())
    assert found.high - found.seconds == pytest.approx(math.sqrt(squares))


def test_totals_by_kind_and_axis():
    schedule = read_schedule(PROGRAM)
    assert total_flops(schedule) == 3 * 2 * 4096**3
    sent = collective_bytes(schedule, {"fsdp": 2, "expert": 8})
    assert sent == {("all-gather", "expert"): 3 * 7 * 2 * 4096**2}


@pytest.mark.parametrize(
    ("devices", "axes"),
    [
        ((0, 1), "tensor"),
        ((0, 2, 4, 6), "data"),
        (tuple(range(8)), "data+tensor"),
        ((0, 9), "unknown"),
    ],
)
def test_axes_of_a_group(devices, axes):
    start = Start("s", "all-gather", 1, devices, waits=True)
    assert axes_of(start, {"data": 4, "tensor": 2}) == axes


def test_without_the_compiler_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("moe_jax.predict.absent.PLUGINS", ("no_such",))
    with pytest.raises(UserError, match=r"run pip install --no-deps jax-cuda13-pjrt==[\d.]+"):
        answer(*read_command(["tiny"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "0"], "devices is 0"),
        (["--hardwares", "h100"], "did you mean --hardware?"),
        (["--parallel.fake-devices", "4"], "is for runs on this CPU"),
        (["--price", "-1"], "price is -1"),
    ],
)
def test_bad_commands(options, message):
    with pytest.raises(UserError) as error:
        read_command(["tiny", *options])
    assert message in str(error.value)
