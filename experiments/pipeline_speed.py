"""How fast is each pipeline schedule in two processes, and does the simulation say so?

    python experiments/pipeline_speed.py [--out DIR] [--microbatches M] [--quick]

Two processes with a core each train a model of two equal halves. Each schedule's gradient is timed
beside the gradient of one process, and beside the parts that the simulation is made of: F, Bi, W,
head, embedding, messages. All of it is timed once in each round, and ratios are taken within a
round. Linux only, because the cores are.
"""

from dataclasses import dataclass

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()  # as train.py does. The processes inherit it

import numpy as np
from matplotlib.figure import Figure

from moe_jax.base.errors import UserError, require
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config import DataConfig, ModelConfig, MoEConfig, TrainConfig
from moe_jax.config.attention import AttentionConfig
from moe_jax.parallel.schedules import SCHEDULES, PipelineSchedule
from moe_jax.parallel.schedules.published import PUBLISHED, Costs
from moe_jax.parallel.ticks import tick_table
from moe_jax.study.on_cores import on_cores, two_cores
from moe_jax.study.pipeline_speed import (
    DEVICES,
    Parts,
    Seconds,
    schedule_of,
    time_rounds,
    with_schedule,
)
from moe_jax.study.results import publish

QUESTION = "How fast is each pipeline schedule in two processes, and does the simulation say so?"


@dataclass(frozen=True)
class Settings:
    """Times pipelined gradients in two processes with a core each."""

    out: str = "runs/pipeline-speed"
    """Folder for result.json and plots."""
    seed: int = 0
    """Seed of parameters and tokens."""
    microbatches: int = 8
    """M: micro-batches of an update."""
    rows: int = 2
    """Sequences of a micro-batch."""
    length: int = 256
    """Tokens of a sequence."""
    width: int = 256
    """Model width (D)."""
    layers: int = 4
    """Layers of the model, half of them in each process."""
    rounds: int = 7
    """Times that everything is timed."""
    quick: bool = False
    """A small model and three schedules, timed twice."""

    def config(self) -> TrainConfig:
        """The run. Every expert gets the same load, so that all micro-batches cost the same."""
        width = 32 if self.quick else self.width
        moe = MoEConfig(
            experts=8, experts_per_token=2, expert_hidden=width, rule="balanced", bias_rate=0.0
        )
        attention = AttentionConfig(kind="gqa", heads=width // 32, kv_heads=width // 32)
        model = ModelConfig(
            width=width, layers=self.layers, dense_layers=0, attention=attention, moe=moe
        )
        return TrainConfig(
            batch=self.microbatches * (1 if self.quick else self.rows),
            seed=self.seed,
            model=model,
            data=DataConfig(tokenizer="bytes", length=32 if self.quick else self.length),
        ).resolved()


@dataclass(frozen=True)
class Row:
    """What is known of a schedule. Times are seconds of a gradient, medians over rounds."""

    schedule: PipelineSchedule
    measured: float
    simulated: float
    """With the parts of the same round."""
    agreement: float
    """measured / simulated, the median of the rounds' ratios."""
    ticks: int
    tick: float
    """Of the ticks without their work: slots, loops and messages."""
    efficiency: float
    """Time of one process / (devices · measured)."""
    expected: float
    """The simulation's efficiency."""
    closed_form: float
    """The efficiency by the published bubble, where a device waits for messages alone."""

    @property
    def rest(self) -> float:
        """Seconds of a tick that neither the simulation nor `tick` has."""
        return (self.measured - self.simulated) / self.ticks


def rows_of(rounds: list[Seconds], settings: Settings, names: list[str]) -> list[Row]:
    """The rounds as a table."""
    config = settings.config()
    found = []
    for name in names:
        schedule = schedule_of(with_schedule(config, name, settings.microbatches).parallel)
        ticks = len(tick_table(schedule).kinds)
        measured = np.array([seconds[name] for seconds in rounds])
        parts = [Parts.of(seconds) for seconds in rounds]
        simulations = [one.simulated(schedule) for one in parts]
        simulated = np.array([one.makespan for one in simulations])
        once = np.array([seconds["once"] for seconds in rounds])
        empty = np.array([seconds[f"{name}.ticks"] for seconds in rounds])
        found.append(
            Row(
                schedule=schedule,
                measured=float(np.median(measured)),
                simulated=float(np.median(simulated)),
                agreement=float(np.median(measured / simulated)),
                ticks=ticks,
                tick=float(np.median(empty)) / ticks,
                efficiency=float(np.median(once / (DEVICES * measured))),
                expected=float(np.median([one.efficiency for one in simulations])),
                closed_form=closed_form(schedule, parts),
            )
        )
    return found


def closed_form(schedule: PipelineSchedule, parts: list[Parts]) -> float:
    """Work of a device over work and published bubble."""
    mean = Parts(*np.median(np.array(parts), axis=0))
    share = DEVICES / schedule.stages
    costs = Costs(
        mean.forward * share,
        mean.backward_input * share,
        mean.backward_weight * share,
        (mean.forward + mean.backward_input + mean.backward_weight) * share,
    )
    chunks = schedule.pieces // schedule.stages
    bubble = PUBLISHED[schedule.name].bubble(schedule.stages, chunks, costs)
    work = schedule.microbatches * costs.overlapped / share
    return work / (work + bubble)


def measurements(rows: list[Row], rounds: list[Seconds]) -> list[Measurement]:
    """All columns, and the parts that they are made of."""

    def median(name: str) -> float:
        return float(np.median([seconds[name] for seconds in rounds]))

    found = []
    for row in rows:
        name = row.schedule.name
        found += [
            Measurement(f"{name}.measured", 1e3 * row.measured, "ms"),
            Measurement(
                f"{name}.simulated", 1e3 * row.simulated, "ms, simulated with measured parts"
            ),
            Measurement(
                f"{name}.measured_over_simulated",
                row.agreement,
                "ratio",
                "simulated",
                row.agreement,
            ),
            Measurement(f"{name}.efficiency", row.efficiency, "share of both cores' time"),
            Measurement(f"{name}.efficiency_simulated", row.expected, "share, simulated"),
            Measurement(f"{name}.efficiency_closed_form", row.closed_form, "share, closed form"),
            Measurement(f"{name}.ticks", row.ticks, "ticks of a gradient"),
            Measurement(f"{name}.empty_tick", 1e3 * row.tick, "ms, a tick without its work"),
            Measurement(
                f"{name}.unexplained_tick", 1e3 * row.rest, "ms a tick beyond the simulation"
            ),
        ]
    for name in (*Parts._fields, "once", "twice"):
        found.append(Measurement(name, 1e3 * median(name), "ms"))
    parts = Parts.of({name: median(name) for name in Parts._fields})
    stage = parts.forward + parts.backward_input + parts.backward_weight
    work = rows[0].schedule.microbatches * (DEVICES * stage + parts.last + parts.first)
    work += rows[0].schedule.microbatches * parts.pull_first
    slowdown = median("twice") / median("once")
    return [
        *found,
        Measurement("parts_over_once", work / median("once"), "ratio", "one process, once"),
        Measurement("twice_over_once", slowdown, "ratio", "one process, the other core idle"),
    ]


def table_of(rows: list[Row]) -> str:
    """The schedules in Markdown, as docs/results/pipeline_speed.md has them."""
    lines = [
        "| schedule | ticks | measured, ms | simulated, ms | measured / simulated "
        "| cores used, measured | simulated | closed form |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row.schedule.name}` | {row.ticks} | {1e3 * row.measured:.0f} "
            f"| {1e3 * row.simulated:.0f} | {row.agreement:.3f} | {row.efficiency:.1%} "
            f"| {row.expected:.1%} | {row.closed_form:.1%} |"
        )
    return "\n".join(lines)


def verdict(rows: list[Row]) -> str:
    """Which agree with the simulation, and which is the fastest."""
    within = [row for row in rows if abs(row.agreement - 1) <= 0.1]
    worst = max(rows, key=lambda row: abs(row.agreement - 1))
    best = min(rows, key=lambda row: row.measured)
    return (
        f"{len(within)} of {len(rows)} schedules take the simulated time within 10%. The farthest "
        f"is {worst.schedule.name}, {worst.agreement:.3f} of it. The fastest is "
        f"{best.schedule.name}: it uses {best.efficiency:.1%} of both cores' time, where the "
        f"simulation says {best.expected:.1%} and the closed form {best.closed_form:.1%}. A tick "
        f"without work takes {1e3 * best.tick:.2f} ms, messages included."
    )


def draw(rows: list[Row]) -> Figure:
    """Three bars a schedule."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    bars = {
        "measured": [row.efficiency for row in rows],
        "simulated with measured parts": [row.expected for row in rows],
        "closed form": [row.closed_form for row in rows],
    }
    for number, (label, values) in enumerate(bars.items()):
        places = np.arange(len(rows)) + 0.27 * (number - 1)
        drawn = axes.bar(places, values, 0.25, label=label, color=f"C{number}")
        axes.bar_label(drawn, fmt="{:.2f}", fontsize=7)
    axes.set_xticks(range(len(rows)), [row.schedule.name for row in rows])
    axes.set(ylabel="share of both cores' time", ylim=(0, 1.2))
    axes.set_title("two processes with a core each")
    axes.legend(loc="upper left", ncols=3)
    return figure


def names_of(settings: Settings) -> list[str]:
    """The schedules that exist for two devices and these micro-batches."""
    found = []
    for name in ("gpipe", "1f1b", "zb-v") if settings.quick else SCHEDULES:
        try:
            schedule_of(with_schedule(settings.config(), name, settings.microbatches).parallel)
            found.append(name)
        except UserError as error:
            print(f"left out: {error}")
    require(bool(found), "no schedule can be built with these settings")
    return found


def main(argv: list[str]) -> None:
    """Measures, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    cores = two_cores()
    out = output_folder(settings.out)
    names = names_of(settings)
    count = 2 if settings.quick else settings.rounds
    work = (settings.config(), names, settings.microbatches, count)
    first, second = on_cores(time_rounds, cores, *work)
    rounds = [together(*pair) for pair in zip(first, second, strict=True)]
    rows = rows_of(rounds, settings, names)
    print(f"{table_of(rows)}\n")
    publish(
        out,
        experiment="pipeline_speed",
        question=QUESTION,
        settings=settings,
        measurements=measurements(rows, rounds),
        verdict=verdict(rows),
        figures={"efficiency": draw(rows)},
    )


def together(first: Seconds, second: Seconds) -> Seconds:
    """A round's seconds: the slower process counts. Of work that one does alone, that one's."""
    return {name: max(seconds, second[name]) for name, seconds in first.items()}


if __name__ == "__main__":
    program(main)
