"""Plots: speed over the link's rate, who wins at which memory, and what a tick may cost."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moe_jax.parallel.schedules import SCHEDULES
from moe_jax.predict.layouts.fastest import FSDP, ONCE, Job, Layout
from moe_jax.study.pipeline_choice.published import OVER_FSDP
from moe_jax.study.pipeline_choice.sweep import NO_OVERLAP, Case, Layouts, gain

OURS = "ours, in lockstep"
"""The fastest schedule in our executor."""
GIGA = 1e9
LETTERS = "abcdefghij"
COLORS = {name: f"C{number}" for number, name in enumerate(SCHEDULES)}
LINES = {
    FSDP: ("k", "-", 2.4),
    NO_OVERLAP: ("k", ":", 1.4),
    ONCE: ("0.5", "--", 1.6),
    OURS: ("C3", "--", 2.4),
}

Sweep = Sequence[tuple[float, Layouts]]
"""(rate of the link in bytes a second, the fastest layouts)"""


def draw_choice(sweeps: Mapping[Case, tuple[Job, Sweep]]) -> Figure:
    """A panel for each case, and one for all pipelines against FSDP with what others measured."""
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, (case, (job, sweep)) in zip(panels, sweeps.items(), strict=False):
        _draw_case(axes, case, job, sweep)
    _draw_gains(figure.axes[3], sweeps)
    lines = {str(line.get_label()): line for axes in figure.axes[:3] for line in axes.get_lines()}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=6)
    figure.suptitle("SIMULATED speed of layouts, by the rate of the link")
    return figure


def _draw_case(axes: Axes, case: Case, job: Job, sweep: Sweep) -> None:
    for name in sweep[0][1]:
        points = [(rate, layouts[name]) for rate, layouts in sweep]
        found = [(rate / GIGA, job.ideal / x.update.seconds) for rate, x in points if x is not None]
        color, line, width = LINES.get(name, (COLORS.get(name, "C9"), "-", 1.2))
        if found:
            axes.plot(*zip(*found, strict=True), line, color=color, lw=width, label=name)
    link = "link inside of the node" if case.inside else "network"
    axes.set(xscale="log", ylim=(0, 1), xlabel=f"{link}, GB/s of a device")
    axes.set_ylabel("share of the products' rate")
    axes.set_title(case.text, fontsize=10)
    axes.grid(alpha=0.3)


def _draw_gains(axes: Axes, sweeps: Mapping[Case, tuple[Job, Sweep]]) -> None:
    for number, (case, (_, sweep)) in enumerate(sweeps.items()):
        found = [(rate / GIGA, gain(layouts)) for rate, layouts in sweep]
        points = [(rate, value) for rate, value in found if value is not None]
        rates = [rate for rate, _ in points]
        values = [value for _, value in points]
        axes.plot(rates, values, color=f"C{number}", label=f"simulated: {case.text}")
    known = [(row, row.link) for row in OVER_FSDP if row.link is not None]
    for letter, (row, link) in zip(LETTERS, known, strict=False):
        label = f"measured: {row.name}"
        # Every second letter stands a little to the right, so that none covers another.
        x = link * (1.25 if LETTERS.index(letter) % 2 else 1.0)
        axes.plot(x, row.ratio, marker=f"${letter}$", color="k", ls="", label=label)
    axes.axhline(1, color="0.6", lw=0.8)
    axes.axhspan(2, 4, color="C2", alpha=0.12, label="the article's 2-4x")
    axes.set(xscale="log", yscale="log", xlabel="link, GB/s of a device")
    axes.set_ylabel("speed of the best pipeline / of FSDP")
    axes.set_title("pipelines against FSDP", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6.5, loc="upper right")


Winners = Sequence[tuple[float, float, Layout | None]]
"""(rate, memory of a card in bytes, the fastest layout)"""


def draw_winners(
    winners: Mapping[str, Winners], ticks: Mapping[str, Sequence[tuple[float, float]]]
) -> Figure:
    """Maps of the fastest layout, and the gain over FSDP by the overhead of a tick in seconds."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    panels = figure.subplots(1, len(winners) + 1)
    for axes, (title, rows) in zip(panels, winners.items(), strict=False):
        _draw_map(axes, title, rows)
    axes = panels[-1]
    for number, (label, points) in enumerate(ticks.items()):
        line = "--" if OURS in label else "-"
        color = f"C{number // 2}"
        axes.plot(*zip(*points, strict=True), line, marker=".", color=color, label=label)
    axes.axhline(1, color="0.6", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="overhead of a tick or an operation, ms")
    axes.set_ylabel("speed of the best pipeline / of FSDP")
    axes.set_title("what overhead costs", fontsize=10)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.suptitle("SIMULATED: the fastest layout, and the price of a tick")
    return figure


def _draw_map(axes: Axes, title: str, rows: Winners) -> None:
    rates = sorted({rate for rate, _, _ in rows})
    limits = sorted({memory for _, memory, _ in rows})
    colors = {FSDP: "0.35", ONCE: "0.65", **COLORS}
    for rate, memory, layout in rows:
        x = rates.index(rate)
        y = limits.index(memory)
        color = colors[layout.name] if layout else "white"
        box = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", alpha=0.75)
        axes.add_patch(box)
        depth = "" if layout is None or layout.name not in SCHEDULES else f"\n{layout.depth} deep"
        text = "none\nfits" if layout is None else layout.name.replace(" ", "\n") + depth
        dark = layout is not None and layout.name == FSDP
        axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color="w" if dark else "k")
    axes.set_xlim(-0.5, len(rates) - 0.5)
    axes.set_ylim(-0.5, len(limits) - 0.5)
    axes.set_xticks(range(len(rates)), [f"{rate / GIGA:g}" for rate in rates])
    axes.set_yticks(range(len(limits)), [f"{memory / GIGA:.0f}" for memory in limits])
    axes.set(xlabel="link, GB/s of a device", ylabel="memory of a card, GB")
    axes.set_title(title, fontsize=9)
