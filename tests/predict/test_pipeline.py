"""A pipeline's program by hand: each kind of step has its own length."""

from collections import Counter

import pytest

from moe_jax.base.errors import UserError
from moe_jax.parallel.schedules import build
from moe_jax.parallel.schedules.split import split_backwards
from moe_jax.parallel.simulate import simulate
from moe_jax.parallel.ticks import tick_table
from moe_jax.predict.absent import missing
from moe_jax.predict.answer import answer, read_command
from moe_jax.predict.pipeline import with_ticks
from moe_jax.predict.schedule import Schedule, Ticks, read_schedule
from moe_jax.predict.scheduled_hlo import Rates, run

SECONDS = {"forward": 3, "backward_input": 4, "backward_weight": 2, "overlapped": 7}
APART = ("forward", "backward_input", "backward_weight")
ENDS = {"embed": 20, "pull": 30, "head": 40}
"""What the first and the last piece do besides."""
RATES = Rates(memory=8.0)
"""negate reads and writes 4 bytes of each of n numbers, so it takes n seconds."""


def computation(name: str, *lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (x: f32[1]) -> f32[1] {{\n  %x{name} = f32[1]{{0}} parameter(0)\n{body}\n}}\n"


def work(name: str, seconds: int) -> str:
    return (
        f"%{name} = f32[{seconds}]{{0}} negate(%o{name})\n  %o{name} = f32[{seconds}]{{0}} iota()"
    )


def loop(name: str, scope: str, body: str, turns: int = 0) -> str:
    known = f', backend_config={{"known_trip_count":{{"n":"{turns}"}}}}' if turns else ""
    place = f'metadata={{op_name="jit(step)/{scope}/while"}}'
    return f"%{name} = f32[1]{{0}} while(%x), condition=%c, body=%{body}, {place}{known}"


def text(kinds: list[str], ticks: int, ends: dict[str, int]) -> str:
    """The program: `kinds` in every tick, one second for its own work, and ten outside."""
    branches = "branch_computations={%embed, %slot}"
    choice = 'metadata={op_name="jit(step)/first/cond"}'
    first = f"%f = f32[1]{{0}} conditional(%x), {branches}, {choice}"
    rest = [loop("l", "last", "head"), loop("p", "first_gradient", "pull")]
    inner = {"forward": [first], "backward_input": rest, "overlapped": [first, *rest]}
    parts = [
        *(computation(name, work(f"w{name}", seconds)) for name, seconds in ends.items()),
        computation("slot"),
        *(
            computation(f"do_{kind}", work(f"w{kind}", SECONDS[kind]), *inner.get(kind, []))
            for kind in kinds
        ),
        computation("tick", work("t", 1), *(loop(f"k{k}", k, f"do_{k}") for k in kinds)),
    ]
    main = computation("main", work("m", 10), loop("ticks", "shard_map", "tick", ticks))
    return "HloModule small\n\n" + "\n".join(parts) + "\nENTRY " + main


def program(name: str, stages: int, microbatches: int, ends: dict[str, int] = ENDS):
    schedule = split_backwards(build(name, stages=stages, microbatches=microbatches))
    table = tick_table(schedule)
    kinds = [k for k in SECONDS if k != "overlapped" or name.startswith("dualpipe")]
    found = read_schedule(text(kinds, len(table.kinds), ends))
    return with_ticks(found, schedule), schedule, len(table.kinds)


@pytest.mark.parametrize(("name", "stages"), [("1f1b", 4), ("zb-h1", 3), ("zb-v", 3)])
def test_a_step_is_the_simulation_in_lockstep_and_what_lies_outside(name, stages):
    found, schedule, ticks = program(name, stages, 8)
    forward, to_input, weight = ([float(SECONDS[k])] * schedule.pieces for k in APART)
    forward[0] += ENDS["embed"]
    to_input[0] += ENDS["pull"]
    to_input[-1] += ENDS["head"]
    simulated = simulate(schedule, forward, to_input, weight, lockstep=True)
    line = run(found, RATES)
    assert line.total == pytest.approx(10 + ticks + simulated.makespan)
    # Nothing here has FLOPs, so that every device is a busiest one.
    assert min(abs(line.idle - (simulated.makespan - busy)) for busy in simulated.busy) < 1e-9


def test_an_overlapped_step_has_its_own_price():
    found, schedule, ticks = program("dualpipe", 4, 8, dict.fromkeys(ENDS, 0))
    apart = [[float(SECONDS[k])] * schedule.pieces for k in APART]
    pair = SECONDS["overlapped"] * schedule.pieces / schedule.stages
    simulated = simulate(schedule, *apart, overlapped=pair, lockstep=True)
    assert run(found, RATES).total == pytest.approx(10 + ticks + simulated.makespan)


def test_a_device_does_each_kind_of_step_for_each_micro_batch():
    found, _, _ = program("1f1b", 2, 6)
    (ticks,) = (step for step in found.steps["main"] if isinstance(step, Ticks))
    kinds = Counter(body.split("@")[0] for body, turns in ticks.own for _ in range(turns))
    assert kinds == {f"do_{kind}": 6 for kind in APART}


def test_a_program_without_ticks_is_refused():
    schedule = build("1f1b", stages=2, microbatches=4)
    plain = Schedule({"main": []}, "main")
    with pytest.raises(UserError, match="no ticks"):
        with_ticks(plain, schedule)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_the_busiest_of_two_devices_does_half_of_the_work_or_more():
    """The same run compiled for one H100, and for a pipeline of two."""
    argv = ["tiny", "--batch", "8", "--data.tokenizer", "bytes", "--optim.optimizer", "adamw"]
    argv += ["--model.layers", "3", "--hardware", "h100"]
    one = answer(*read_command([*argv, "--devices", "1", "--optim.accumulation", "4"]))
    pipe = ["--devices", "2", "--parallel.pipe", "2", "--parallel.microbatches", "4"]
    two = answer(*read_command([*argv, *pipe]))
    assert 0.5 * one.flops <= two.flops < one.flops
    assert ("collective-permute", "pipe") in two.collectives
    line = two.prediction.line
    parts = line.products + line.rest + line.stalled + line.idle
    assert line.total == pytest.approx(parts)
    assert line.idle > 0
    assert two.prediction.low < line.total < two.prediction.high
