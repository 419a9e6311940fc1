"""The picture of a prediction: memory against the card, time, and what lies under what."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moe_jax.predict.memory import Memory
from moe_jax.predict.scheduled_hlo import Timeline
from moe_jax.predict.step_time import Prediction

GIB = 2**30
MEMORY_COLORS: Mapping[str, str] = {
    "parameters": "#3b74c4",
    "optimizer": "#a8c8f0",
    "gradients": "#1d8a7a",
    "update": "#9adbd0",
    "casts": "#6f9bd8",
    "activations": "#c8701a",
    "communication": "#f5c38a",
    "temporaries": "#7a8f1c",
    "gaps": "#dddddd",
    "other": "#999999",
    "context": "#555555",
    "nccl": "#777777",
}
TIME_COLORS: Mapping[str, str] = {
    "product": "#3b74c4",
    "kernel": "#1d8a7a",
    "attention": "#7a8f1c",
    "attention gradient": "#a3b552",
    "rest": "#c9c9c9",
    "transfer": "#c8701a",
    "loop": "#eeeeee",
}


def draw(memory: Memory, prediction: Prediction, title: str) -> Figure:
    """Three panels."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    above, between, below = figure.subplots(3, 1, height_ratios=(1, 1, 1.5))
    draw_memory(above, memory)
    draw_step(between, prediction)
    draw_turn(below, prediction.line)
    figure.suptitle(f"PREDICTED: {title}")
    return figure


def draw_memory(axes: Axes, memory: Memory) -> None:
    """A stacked bar of bytes by kind, and the card's size."""
    parts = {**memory.kinds, "context": memory.context, "nccl": memory.nccl}
    left = 0.0
    for name, size in parts.items():
        if size > 0:
            label = f"{name} {size / GIB:.1f}"
            axes.barh(0, size / GIB, left=left, color=MEMORY_COLORS[name], label=label)
            left += size / GIB
    axes.axvline(memory.card / GIB, color="black")
    axes.annotate("the card", (memory.card / GIB, 0.3), rotation=90, fontsize=8)
    axes.set(yticks=[], xlabel="GiB a device")
    axes.set_title("memory", loc="left", fontsize=9)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.45))


def draw_step(axes: Axes, prediction: Prediction) -> None:
    """A step as products, everything else and waiting, with the interval."""
    line = prediction.line
    left = 0.0
    parts = {
        "products": (line.products, "#3b74c4"),
        "everything else": (line.rest, "#c9c9c9"),
        "waiting for transfers": (line.stalled, "#c8701a"),
    }
    if line.idle:
        parts["waiting for other stages"] = (line.idle, "#eeeeee")
    for name, (seconds, color) in parts.items():
        axes.barh(0, seconds, left=left, color=color, label=f"{name} {seconds:.3g} s")
        left += seconds
    axes.errorbar(
        prediction.seconds,
        0,
        xerr=[[prediction.seconds - prediction.low], [prediction.high - prediction.seconds]],
        color="black",
        capsize=4,
    )
    axes.set(yticks=[], xlabel="seconds of a step")
    axes.set_title("time", loc="left", fontsize=9)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.45))


def draw_turn(axes: Axes, line: Timeline) -> None:
    """One turn of the loop that takes the most time: kernels above, transfers below."""
    turns, turn = longest_loop(line)
    used = []
    for event in turn.events:
        row = 0 if event.kind == "transfer" else 1
        axes.broken_barh(
            [(1e3 * event.begin, 1e3 * event.seconds)],
            (row + 0.1, 0.8),
            facecolors=TIME_COLORS[event.kind],
            edgecolor="white",
            linewidth=0.3,
        )
        used.append(event.kind)
    axes.set(yticks=[0.5, 1.5], yticklabels=["transfers", "kernels"], xlabel="milliseconds")
    what = f"one of {turns} turns of the longest loop" if turns else "the program"
    covered = f"{turn.covered:.0%} of its transfers are covered"
    axes.set_title(f"what lies under what: {what}, {covered}", loc="left", fontsize=9)
    handles = [Patch(color=TIME_COLORS[kind], label=kind) for kind in TIME_COLORS if kind in used]
    axes.legend(
        handles=handles, fontsize=7, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.3)
    )


def longest_loop(line: Timeline) -> tuple[int, Timeline]:
    """(turns, one turn) of the innermost loop that takes the most time, (0, line) without loops."""
    real = [(turns, turn) for turns, turn in line.loops if turns > 1]
    inner = [longest_loop(turn) for _, turn in line.loops]
    found = real + [(turns, turn) for turns, turn in inner if turns]
    if not found:
        return 0, line
    # A loop around loops is all gaps: of two loops the inner one says more.
    leaves = [(turns, turn) for turns, turn in found if not any(n > 1 for n, _ in turn.loops)]
    return max(leaves or found, key=lambda pair: pair[0] * pair[1].total)
