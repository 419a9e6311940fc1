"""At what link speed, depth and memory does each pipeline schedule win, and when does FSDP?

    python experiments/lever_pipeline.py [--out DIR] [--quick]

Everything is SIMULATED: no GPU was there. moe_jax/predict/layouts has the model and its terms.
docs/results/pipeline.md has the answer. What others measured stands beside it
(moe_jax/study/pipeline_choice/published.py). So does our own measurement in two processes on a CPU,
if its recorded result `pipeline_speed` is there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from moe_jax.base.errors import require
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.parallel.schedules import SCHEDULES
from moe_jax.predict.layouts.block_work import USABLE
from moe_jax.predict.layouts.fastest import FSDP, Job, Layout, schedule_of, work_of
from moe_jax.predict.layouts.pipelined import Tick, in_ticks, tick_parts
from moe_jax.study.pipeline_choice.figures import OURS, Sweep, Winners, draw_choice, draw_winners
from moe_jax.study.pipeline_choice.published import OVER_1F1B, OVER_FSDP, explained
from moe_jax.study.pipeline_choice.sweep import (
    CASES,
    Case,
    Layouts,
    best_pipeline,
    best_sharded,
    gain,
    layouts_of,
    lockstep_of,
    seconds,
    usable,
    winner,
)
from moe_jax.study.results import publish, read_measurements

QUESTION = "Where does each pipeline schedule win, and where does FSDP beat them all?"
CPU_RESULT = Path(__file__).parent / "results" / "pipeline_speed.json"
GIGA = 1e9
QUICK_RATES = (12, 48.5)


@dataclass(frozen=True)
class Settings:
    """Simulates updates over link speeds, memory limits and the cost of a tick."""

    out: str = "runs/lever_pipeline"
    """Folder for result.json and plots."""
    seed: int = 0
    """Unused, since a simulation draws nothing."""
    quick: bool = False
    """Two link speeds, one memory limit and one overhead, for the two smaller cases."""
    rows: int = 8
    """Rows of 4,096 tokens that a device has in an update. DeepSeek-V3 had 7.5."""
    rates: tuple[float, ...] = (1, 2, 5, 12, 24, 48.5, 100, 200, 362, 680)
    """GB/s of a device on the swept link: 12 is Ethernet of 100 Gb/s, 24 and 48.5 are InfiniBand,
    27.5 and 55 are PCIe 4 and 5, 362 and 680 are NVLink 4 and 5, all as measured."""
    limits: tuple[float, ...] = (40, 80, 96, 141, 192)
    """GB of a card, for the maps."""
    overhead: float = 0.1
    """Milliseconds of an operation that runs free, and of a tick in lockstep, beyond their work. It
    is an assumption: a few reads by the host, and launches."""
    overheads: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Milliseconds, for the sweep."""

    def __post_init__(self) -> None:
        require(self.rows > 0, f"rows={self.rows}: it must be at least 1")
        for name in ("rates", "limits", "overheads"):
            for value in getattr(self, name):
                require(value > 0, f"{name} has {value}: it must be positive")

    @property
    def cases(self) -> tuple[Case, ...]:
        """Those that are simulated."""
        return CASES[1:] if self.quick else CASES

    def few(self, values: Sequence[float], several: Sequence[float]) -> Sequence[float]:
        """`several` of the values, or one of them if quick."""
        return [v for v in values if v in several][: 1 if self.quick else None]


Sweeps = dict[Case, tuple[Job, Sweep]]


def sweep(case: Case, settings: Settings) -> tuple[Job, Sweep]:
    """All layouts at all rates, with the fastest of our executor's."""
    job = case.job(settings.rows)
    found = []
    for rate in QUICK_RATES if settings.quick else settings.rates:
        here = case.at(job, GIGA * rate)
        layouts = layouts_of(here, usable(job), 1e-3 * settings.overhead)
        ours = lockstep_of(here, usable(job), 1e-3 * settings.overhead)
        layouts[OURS] = winner(ours, lambda name: True)
        found.append((GIGA * rate, layouts))
        print(f"{case.name}, {rate:g} GB/s: {line_of(layouts)}", flush=True)
    return job, found


def line_of(layouts: Layouts) -> str:
    """The fastest layouts in words."""
    pipeline = best_pipeline(layouts)
    ratio = gain(layouts)
    words = "no pipeline fits" if pipeline is None else f"{pipeline.name} on {pipeline.depth}"
    return words if ratio is None else f"{words} devices, {ratio:.2f}x FSDP"


def map_winners(case: Case, settings: Settings) -> Winners:
    """The fastest layout by rate and memory."""
    job = case.job(settings.rows)
    rows = []
    for rate in settings.few(settings.rates, (2, 5, 12, 48.5, 200)):
        here = case.at(job, GIGA * rate)
        for limit in settings.limits[: 1 if settings.quick else None]:
            layouts = layouts_of(here, USABLE * GIGA * limit, 1e-3 * settings.overhead)
            both = {one.name: one for one in (best_pipeline(layouts), best_sharded(layouts)) if one}
            rows.append((GIGA * rate, GIGA * limit, winner(both, lambda name: True)))
    return rows


def over_overheads(case: Case, settings: Settings) -> dict[str, list[tuple[float, float]]]:
    """Gains over FSDP by the overhead in ms, running free and in lockstep, on the card's links."""
    job = case.job(settings.rows)
    found: dict[str, list[tuple[float, float]]] = {}
    sharded = layouts_of(job, usable(job), 0.0, names=())
    for overhead in settings.overheads[: 1 if settings.quick else None]:
        ways = {
            case.name: layouts_of(job, usable(job), 1e-3 * overhead),
            f"{case.name}, {OURS}": lockstep_of(job, usable(job), 1e-3 * overhead),
        }
        for label, layouts in ways.items():
            ratio = gain({**sharded, **{k: v for k, v in layouts.items() if k in SCHEDULES}})
            if ratio is not None:
                found.setdefault(label, []).append((overhead, ratio))
    return found


def our_tick(job: Job, layout: Layout, settings: Settings) -> tuple[int, Tick]:
    """(ticks of an update, the mean tick) of a layout in our executor."""
    work = work_of(job, layout)
    overhead = 1e-3 * settings.overhead
    way = in_ticks(work, job.blocks, schedule_of(job, layout), overhead)
    return way.ticks.number, tick_parts(work, job.blocks, way, overhead)


def of_case(case: Case, job: Job, found: Sweep, settings: Settings) -> list[Measurement]:
    """Times of every layout, ratios to FSDP, and our tick on the card's own link."""
    rows = [Measurement(f"{case.name}.ideal", job.ideal, "s of an update, products alone")]
    for rate, layouts in found:
        place = f"{case.name}.{rate / GIGA:g}"
        sharded = seconds(layouts[FSDP])
        for name, layout in layouts.items():
            value = seconds(layout)
            ratio = None if value is None or sharded is None else sharded / value
            key = name.replace(" ", "_").replace(",", "")
            unit = f"s of an update, SIMULATED ({words_of(layout)})"
            rows.append(Measurement(f"{place}.{key}", value, unit, f"{place}.{FSDP}", ratio))
        rows.append(
            Measurement(f"{place}.gain", gain(layouts), "x, speed of the best pipeline / FSDP's")
        )
    for level in (1, 2, 4):
        unit = f"GB/s below which the best pipeline is {level}x FSDP's speed or more, SIMULATED"
        rows.append(Measurement(f"{case.name}.below_{level}x", crossing(found, level), unit))
    return rows + of_own_link(case, case.at(job, own_rate(case, job)), found, settings)


def at_own_link(case: Case, job: Job, found: Sweep) -> Layouts:
    """The layouts at the swept rate next to the card's own."""
    return min(found, key=lambda row: abs(row[0] - own_rate(case, job)))[1]


def of_own_link(case: Case, job: Job, found: Sweep, settings: Settings) -> list[Measurement]:
    """The best schedule against other ways than FSDP, and what our mean tick consists of."""
    layouts = at_own_link(case, job, found)
    rows = []
    best = best_pipeline(layouts)
    if best is not None:
        plain = seconds(layouts["1f1b"])
        ratio = None if plain is None else plain / best.update.seconds
        work = work_of(job, best)
        parts = (work.forward, work.backward_input, work.backward_weight)
        turn = job.blocks * sum(part.seconds(work.parts) for part in parts)
        serial = job.rows * best.depth * turn / best.update.seconds
        speed = f"x, speed of {best.name}, SIMULATED"
        rows += [
            Measurement(f"{case.name}.over_1f1b", ratio, speed, "1f1b", ratio),
            Measurement(
                f"{case.name}.over_one_at_a_time", serial, speed, "one stage at a time", serial
            ),
        ]
    ours = layouts[OURS]
    if ours is not None:
        number, tick = our_tick(job, ours, settings)
        rows.append(Measurement(f"{case.name}.ticks", number, f"ticks of an update ({ours.name})"))
        for part, value in tick._asdict().items():
            rows.append(Measurement(f"{case.name}.tick_{part}", 1e3 * value, "ms, SIMULATED"))
    return rows


def words_of(layout: Layout | None) -> str:
    """How a layout lies."""
    if layout is None:
        return "does not fit"
    parts = [f"depth {layout.depth}"] if layout.name != FSDP else [f"{layout.shards} shards"]
    parts += [f"experts over {layout.expert_axis}", f"recompute {layout.recompute}"]
    parts += [f"{layout.pieces} pieces a stage"] if layout.pieces > 1 else []
    return ", ".join([*parts, f"{layout.update.memory / GIGA:.0f} GB"])


def own_rate(case: Case, job: Job) -> float:
    """The rate of the card's own link."""
    card = job.cluster.card
    return (card.link if case.inside else card.network).rate


def crossing(found: Sweep, level: float = 1.0) -> float | None:
    """GB/s below which the best pipeline is `level` times as fast as FSDP (log-log between rates).

    None: it is so nowhere, or everywhere.
    """
    points = [(rate / GIGA, gain(layouts)) for rate, layouts in found]
    known = [(rate, value / level) for rate, value in points if value is not None]
    for (low, one), (high, other) in pairwise(known):
        if one >= 1 > other:
            share = math.log(one) / math.log(one / other)
            return low * (high / low) ** share
    return None


def of_others() -> list[Measurement]:
    """What others measured, with sources, and what the schedule alone says of marin's times."""
    rows = []
    for kind, published in (("over_fsdp", OVER_FSDP), ("over_1f1b", OVER_1F1B)):
        for row in published:
            note = f"; {row.note}" if row.note else ""
            unit = f"x, MEASURED by others ({row.source}{note})"
            rows.append(Measurement(f"published.{kind}.{row.name}", row.ratio, unit))
    for row in explained():
        rows += [
            Measurement(f"marin.{row.name}.measured", row.measured, "x FSDP's time"),
            Measurement(f"marin.{row.name}.by_schedule", row.schedule, "x FSDP's time, SIMULATED"),
            Measurement(f"marin.{row.name}.one_at_a_time", row.serial, "x FSDP's time, SIMULATED"),
        ]
    return rows


def of_cpu() -> list[Measurement]:
    """What was measured in two processes on a CPU, nothing if no result is recorded."""
    if not CPU_RESULT.is_file():
        return []
    there = read_measurements(CPU_RESULT)
    keys = ("measured_over_simulated", "empty_tick", "efficiency")
    return [
        replace(row, name=f"cpu.{name}", unit=f"{row.unit}, MEASURED in two processes")
        for name, row in there.items()
        if name.rpartition(".")[2] in keys
    ]


def verdict(sweeps: Sweeps, rows: Sequence[Measurement]) -> str:
    """The answer, case by case, and the article's 2-4x."""
    values = {row.name: row.value for row in rows}
    sentences = ["SIMULATED, no GPU was there."]
    for case, (job, found) in sweeps.items():
        below = [values[f"{case.name}.below_{level}x"] for level in (1, 2, 4)]
        rates = ", ".join("-" if rate is None else f"{rate:.0f}" for rate in below)
        layouts = at_own_link(case, job, found)
        sentences.append(
            f"{case.text}: on the card's own link the best pipeline is {line_of(layouts)}. It is "
            f"1x, 2x and 4x FSDP below {rates} GB/s."
        )
    gains = [values.get(f"{case.name}.over_1f1b") for case in sweeps]
    known = [value for value in gains if value is not None]
    if known:
        sentences.append(
            f"Over 1F1B the best schedule is {min(known):.2f}-{max(known):.2f}x. So the article's "
            "2-4x is true of slow links and of stages that would work one at a time. It is not "
            "true of one schedule against another."
        )
    return " ".join(sentences)


def main(argv: list[str]) -> None:
    """Simulates, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    sweeps = {case: sweep(case, settings) for case in settings.cases}
    rows = [
        row for case, (job, found) in sweeps.items() for row in of_case(case, job, found, settings)
    ]
    overheads = {}
    for case in settings.cases[-2:]:
        overheads |= over_overheads(case, settings)
    for label, points in overheads.items():
        key = label.replace(", ours, in lockstep", ".ours")
        rows += [
            Measurement(f"{key}.overhead_{ms:g}ms.gain", gained, "x FSDP's speed, SIMULATED")
            for ms, gained in points
        ]
    winners = {case.text: map_winners(case, settings) for case in settings.cases[:2]}
    rows += [*of_others(), *of_cpu()]
    publish(
        out,
        experiment="lever_pipeline",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict(sweeps, rows),
        figures={"choice": draw_choice(sweeps), "winners": draw_winners(winners, overheads)},
    )


if __name__ == "__main__":
    program(main)
