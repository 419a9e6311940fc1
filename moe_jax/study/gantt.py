"""The picture of a pipeline schedule: devices as rows, time to the right, a colour an operation."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch, Rectangle

from moe_jax.parallel.schedules.operations import Kind, Operation
from moe_jax.parallel.schedules.timing import Span, Timeline

COLORS = {
    Kind.FORWARD: ("#a8c8f0", "#3b74c4"),
    Kind.BACKWARD: ("#f5c38a", "#c8701a"),
    Kind.BACKWARD_INPUT: ("#9adbd0", "#1d8a7a"),
    Kind.BACKWARD_WEIGHT: ("#cfdf8f", "#7a8f1c"),
}
"""The colours of a device's even and odd chunks. Numbers on them are black and white."""
WORDS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "whole backward",
    Kind.BACKWARD_INPUT: "backward to the input",
    Kind.BACKWARD_WEIGHT: "backward to the weights",
}
FONT_SIZE = 6.5
DIGIT_INCHES = 0.062
"""Width of a digit of this size."""
PANEL = 0.93
"""About what is left of a figure's width beside the names of the devices."""


def draw_schedules(timelines: Mapping[str, Timeline], title: str) -> Figure:
    """A panel for each timeline under its own title, all on one axis of time."""
    devices = [len(timeline) for timeline in timelines.values()]
    height = 1.2 + sum(0.55 + 0.27 * count for count in devices)
    until = max(span.end for t in timelines.values() for spans in t for span in spans)
    figure = Figure(figsize=(_width(timelines, until), height), layout="constrained")
    ratios = [2 + count for count in devices]
    panels = figure.subplots(len(devices), 1, squeeze=False, height_ratios=ratios)
    for axes, (name, timeline) in zip(panels[:, 0], timelines.items(), strict=True):
        draw_timeline(axes, timeline, until)
        axes.set_title(name, fontsize=9, loc="left")
    panels[-1, 0].set_xlabel("time, in the unit of the costs")
    figure.suptitle(title)
    draw_legend(figure, list(timelines.values()))
    return figure


def _width(timelines: Mapping[str, Timeline], until: float) -> float:
    """Inches: as many as the numbers in the shortest boxes need, from 12 to 30."""
    spans = [span for timeline in timelines.values() for one in timeline for span in one]
    shortest = min(span.end - span.start for span in spans)
    digits = max(len(str(operation.microbatch)) for span in spans for operation in span.step)
    needed = _number_inches(digits) * until / max(shortest, until / 1000)
    return min(max(12.0, needed / PANEL), 30.0)


def _number_inches(digits: int) -> float:
    """Width of a number with a little room beside it."""
    return DIGIT_INCHES * (digits + 0.4)


def draw_timeline(axes: Axes, timeline: Timeline, until: float) -> None:
    """One panel: each step a box with the number of its micro-batch, where there is room for it.

    Time goes from 0 to `until`. An overlapped pair is one box in two colours, the forward above.
    """
    axes.set_xlim(0, until)
    axes.set_ylim(len(timeline) - 0.5, -0.5)
    axes.set_yticks(range(len(timeline)), [f"device {device}" for device in range(len(timeline))])
    axes.tick_params(labelsize=8, length=2)
    axes.set_facecolor("0.93")
    figure = axes.get_figure(root=True)
    assert figure is not None
    width = PANEL * figure.get_figwidth()
    for device, spans in enumerate(timeline):
        for span in spans:
            _draw_step(axes, device, span, width / until)


def _draw_step(axes: Axes, device: int, span: Span, inches: float) -> None:
    """A box. `inches` is the width of a unit of time."""
    start = span.start
    width = span.end - start
    height = 0.84 / len(span.step)
    for row, operation in enumerate(span.step):
        top = device - 0.42 + row * height
        color = COLORS[operation.kind][operation.chunk % 2]
        box = Rectangle((start, top), width, height, facecolor=color, edgecolor="white", lw=0.6)
        axes.add_patch(box)
        text = str(operation.microbatch)
        # Widths are divided and multiplied again, so equal ones may differ in the last digit.
        if width * inches * 1.001 > _number_inches(len(text)):
            axes.text(
                start + width / 2,
                top + height / 2,
                text,
                ha="center",
                va="center_baseline",
                fontsize=FONT_SIZE,
                color=_text_color(operation),
            )


def _text_color(operation: Operation) -> str:
    return "white" if operation.chunk % 2 else "black"


def draw_legend(figure: Figure, timelines: list[Timeline]) -> Legend:
    """The colours that occur, in words, below all panels."""
    operations = {
        op for timeline in timelines for spans in timeline for s in spans for op in s.step
    }
    chunks = {operation.chunk % 2 for operation in operations}
    patches = [
        Patch(color=COLORS[kind][0], label=WORDS[kind])
        for kind in Kind
        if any(operation.kind == kind for operation in operations)
    ]
    if 1 in chunks:
        patches.append(Patch(color=COLORS[Kind.FORWARD][1], label="darker: odd chunks of a device"))
    patches.append(Patch(facecolor="0.93", edgecolor="0.7", label="idle"))
    return figure.legend(
        handles=patches,
        ncols=len(patches),
        loc="outside lower center",
        fontsize=8,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.2,
    )
