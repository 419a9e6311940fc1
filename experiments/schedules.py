"""What does each pipeline schedule cost, and does it cost what its paper says?

    python experiments/schedules.py [--out DIR] [--stages P] [--microbatches M] [--chunks v]

Builds the eight schedules, runs them in the simulator with the given costs, draws them, and prints
bubble, activations, weights and messages beside the closed forms. Everything is simulated: nothing
is timed here. docs/pipeline.md explains the schedules and the columns.
"""

from dataclasses import dataclass

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moe_jax.base.errors import UserError, require
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, program
from moe_jax.parallel.schedules import SCHEDULES, PipelineSchedule, build
from moe_jax.parallel.schedules.published import PUBLISHED, Costs, Published
from moe_jax.parallel.schedules.split import split_backwards
from moe_jax.parallel.simulate import Simulation, simulate
from moe_jax.study.gantt import draw_schedules
from moe_jax.study.plots import save_figures

QUESTION = "What does each pipeline schedule cost, and does it cost what its paper says?"
CLOSED_FORM = "closed form"
UNEXPLAINED = "UNEXPLAINED"


@dataclass(frozen=True)
class Settings:
    """Simulates and draws the eight pipeline schedules."""

    out: str = "runs/schedules"
    """Folder for result.json and plots."""
    seed: int = 0
    """Unused, since a simulation draws nothing."""
    quick: bool = False
    """No difference: it takes seconds."""
    stages: int = 4
    """P: parts of the model. 1/P of it is the unit of everything printed."""
    microbatches: int = 8
    """M: micro-batches of an update."""
    chunks: int = 2
    """v: pieces of a stage under `interleaved`."""
    forward: float = 1.0
    """F: time of a stage's forward."""
    backward_input: float = 1.0
    """Bi: time of a stage's gradient of the input."""
    backward_weight: float = 1.0
    """W: time of a stage's gradient of the weights."""
    overlapped: float | None = None
    """F&B: time of an overlapped forward and backward. None: F + Bi + W."""
    communication: float = 0.0
    """Time that a message takes. The closed forms have none."""

    @property
    def costs(self) -> Costs:
        """The costs, as the closed forms take them."""
        pair = self.overlapped
        if pair is None:
            pair = self.forward + self.backward_input + self.backward_weight
        return Costs(self.forward, self.backward_input, self.backward_weight, pair)


@dataclass(frozen=True)
class Row:
    """A schedule, simulated in two ways, and what is published of it."""

    schedule: PipelineSchedule
    free: Simulation
    """Every device goes on as soon as it can."""
    lockstep: Simulation
    """All devices go from tick to tick together. Backwards are whole or split, as it is faster."""
    published: Published
    bubble: float
    """The closed form's."""
    peak: float
    """The closed form's."""
    reason: str
    """Why the closed form of the bubble is not meant for these costs, or nothing."""

    messages: int
    """The closed form's."""

    @property
    def same_bubble(self) -> bool:
        """Whether the simulation has the closed form's bubble."""
        return abs(self.free.bubble - self.bubble) < 1e-6 * max(1.0, self.bubble)

    @property
    def same_counts(self) -> bool:
        """Whether activations, weights and messages are the closed form's."""
        return (
            abs(max(self.free.peak_activations) - self.peak) < 1e-9
            and self.schedule.weights == self.published.weights
            and self.schedule.messages == self.messages
        )

    def agrees(self) -> bool:
        """Whether everything is as published."""
        return self.same_bubble and self.same_counts


def chunks_of(name: str, settings: Settings) -> int:
    """Pieces of a stage. Only `interleaved` has a choice."""
    return settings.chunks if name == "interleaved" else 1


def built(settings: Settings) -> list[PipelineSchedule]:
    """Those of the eight that exist for these numbers. Prints why the others do not."""
    schedules = []
    for name in SCHEDULES:
        chunks = chunks_of(name, settings)
        P = settings.stages
        try:
            schedules.append(
                build(name, stages=P, microbatches=settings.microbatches, chunks=chunks)
            )
        except UserError as error:
            print(f"left out: {error}")
    require(bool(schedules), "no schedule can be built with these settings")
    return schedules


def simulate_row(schedule: PipelineSchedule, settings: Settings) -> Row:
    """UserError: costs that are negative, infinite or all 0."""
    P = settings.stages
    M = settings.microbatches
    chunks = chunks_of(schedule.name, settings)

    def run(one: PipelineSchedule, lockstep: bool) -> Simulation:
        return simulate(
            one,
            forward=settings.forward,
            backward_input=settings.backward_input,
            backward_weight=settings.backward_weight,
            overlapped=settings.overlapped,
            communication=settings.communication,
            lockstep=lockstep,
        )

    published = PUBLISHED[schedule.name]
    return Row(
        schedule=schedule,
        free=run(schedule, False),
        lockstep=min(
            (run(one, True) for one in (schedule, split_backwards(schedule))),
            key=lambda simulation: simulation.makespan,
        ),
        published=published,
        bubble=published.bubble(P, chunks, settings.costs),
        peak=published.peak(P, M, chunks),
        reason=_reason(published, settings),
        messages=published.messages(P, M, chunks),
    )


def _reason(published: Published, settings: Settings) -> str:
    if settings.communication:
        return "the closed form has no communication"
    if not published.exact(settings.stages, settings.microbatches, settings.costs):
        return f"the closed form needs {published.needs}"
    return ""


def beside(value: float, closed: float, text: str, same: bool) -> str:
    """The simulated value and the formula, with the formula's value where it is another."""
    return f"{value:g} = {text}" if same else f"{value:g} ≠ {closed:g} = {text}"


def cells(row: Row) -> list[str]:
    """A line of the table."""
    paper = row.published
    free = row.free
    peak = max(free.peak_activations)
    weights = row.schedule.weights
    sent = row.schedule.messages
    return [
        row.schedule.name,
        str(row.schedule.devices),
        beside(free.bubble, row.bubble, paper.bubble_text, row.same_bubble),
        beside(peak, row.peak, paper.peak_text, abs(peak - row.peak) < 1e-9),
        f"{weights:g}" if weights == paper.weights else f"{weights:g} ≠ {paper.weights}",
        beside(sent, row.messages, paper.messages_text, sent == row.messages),
        f"{free.makespan:g}",
        f"{free.efficiency:.1%}",
        f"{row.lockstep.efficiency:.1%}",
    ]


def print_table(rows: list[Row], settings: Settings) -> None:
    """Simulated numbers, each with its closed form."""
    table = Table(
        title=f"{settings.stages} stages, {settings.microbatches} micro-batches, simulated",
        caption="Activations and weights in stages, times in the unit of the costs. "
        "After = is the closed form. Lockstep: all devices wait at each tick.",
    )
    headers = ("schedule", "devices", "bubble", "activations", "weights", "messages", "makespan")
    for header in (*headers, "busy", "busy, lockstep"):
        table.add_column(header, no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=150).print(table)


def measurements(rows: list[Row]) -> list[Measurement]:
    """Every column, by the name of its schedule."""
    found = []
    for row in rows:
        name = row.schedule.name
        free = row.free
        peak = max(free.peak_activations)
        ratio = free.bubble / row.bubble if row.bubble else None
        found += [
            Measurement(f"{name}.bubble", free.bubble, "time units", CLOSED_FORM, ratio),
            Measurement(f"{name}.bubble_closed_form", row.bubble, "time units"),
            Measurement(
                f"{name}.peak_activations",
                peak,
                "stage-micro-batches",
                CLOSED_FORM,
                peak / row.peak,
            ),
            Measurement(f"{name}.peak_closed_form", row.peak, "stage-micro-batches"),
            Measurement(f"{name}.weights", row.schedule.weights, "stages a device"),
            Measurement(
                f"{name}.messages",
                row.schedule.messages,
                "messages an update",
                CLOSED_FORM,
                row.schedule.messages / row.messages if row.messages else None,
            ),
            Measurement(f"{name}.makespan", free.makespan, "time units"),
            Measurement(f"{name}.efficiency", free.efficiency, "share of the devices' time"),
            Measurement(
                f"{name}.lockstep_efficiency",
                row.lockstep.efficiency,
                "share of the devices' time",
            ),
        ]
    return found


def verdict(rows: list[Row]) -> str:
    """Which simulations agree with their papers, and why the others do not."""
    agreeing = [row.schedule.name for row in rows if row.agrees()]
    others = [row for row in rows if not row.agrees()]
    sentences = [f"{len(agreeing)} of {len(rows)} schedules cost what is published."]
    for row in others:
        numbers = f"{row.free.bubble:g}, not {row.bubble:g}"
        # A closed form of the bubble has conditions. Those of the other counts have none.
        reason = row.reason if row.same_counts else ""
        sentences.append(f"{row.schedule.name} has a bubble of {numbers}: {reason or UNEXPLAINED}.")
    return " ".join(sentences)


def title(row: Row) -> str:
    """A panel's name with the three numbers that tell schedules apart."""
    peak = max(row.free.peak_activations)
    return (
        f"{row.schedule.name} on {row.schedule.devices} devices: bubble {row.free.bubble:g}, "
        f"activations {peak:g}, weights {row.schedule.weights:g}"
    )


def draw(rows: list[Row]) -> Figure:
    """All of them below each other, on one axis of time."""
    name = rows[0].schedule.name if len(rows) == 1 else "pipeline schedules"
    panels = {title(row): row.free.timeline for row in rows}
    return draw_schedules(panels, f"{name}, simulated")


def main(argv: list[str]) -> None:
    """Simulates, prints, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    rows = [simulate_row(schedule, settings) for schedule in built(settings)]
    print_table(rows, settings)
    figures = {row.schedule.name.replace("-", "_"): draw([row]) for row in rows}
    save_figures({"all": draw(rows), **figures}, out / "plots", out.resolve().name)
    text = verdict(rows)
    write_result(
        out,
        experiment="schedules",
        question=QUESTION,
        config=settings,
        measurements=measurements(rows),
        verdict=text,
    )
    print(f"{text}\n{out}/result.json, plots/")


if __name__ == "__main__":
    program(main)
