"""The plot: a bar from low to high for each rung and model, and the published figures beside."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.kernel_ladder.calibration import published_rates
from experiments.kernel_ladder.gains import TRAIN, Gain, Gains
from experiments.kernel_ladder.ragged_path import PUBLISHED
from experiments.kernel_ladder.ranges import covering_all
from experiments.kernel_ladder.rungs import RUNGS

BAR = 0.24
WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
"""Behind numbers, because lines cross them."""
MARKERS = {"SonicMoE": ("D", "black"), "ScatterMoE": ("o", "0.45")}


class Panel(NamedTuple):
    """One column of the plot."""

    field: str
    """Of Gain."""
    title: str
    log: bool


PANELS = (
    Panel("of_gemm", "part of a plain GEMM's rate", False),
    Panel("over_xla", "speed over XLA's own path", True),
    Panel("over_ragged_dot", "speed over jax.lax.ragged_dot", True),
)


def draw(found: Mapping[str, Gains], title: str, published_gemm: float | None) -> Figure:
    """Three columns with a row for each rung.

    `published_gemm` is the plain GEMM's FLOP/s of the device on which SonicMoE and ScatterMoE were
    published, or None where the ladder is for another device.
    """
    ideas = {rung.name: rung.idea for rung in RUNGS} | {TRAIN: "all ideas, forward and backward"}
    names = [name for name in ideas if any(name in gains for gains in found.values())]
    labels = [textwrap.fill(ideas[name], 34) for name in names]
    kernels = list(MARKERS) if published_gemm else []
    labels += [f"{kernel}, published, forward" for kernel in kernels]
    figure = Figure(figsize=(13, 1.8 + 0.6 * len(labels)), layout="constrained")
    columns = figure.subplots(1, len(PANELS), sharey=True)
    for axes, panel in zip(columns, PANELS, strict=True):
        for index, (shape, gains) in enumerate(found.items()):
            _draw_shape(axes, panel, names, gains, (index, len(found), shape))
        _dress(axes, panel, [gain for gains in found.values() for gain in gains.values()])
    if published_gemm:
        for row, kernel in enumerate(kernels, len(names)):
            rates = np.array(list(published_rates(kernel, "forward").values()))
            marker, color = MARKERS[kernel]
            columns[0].plot(
                rates * 1e12 / published_gemm, [row] * len(rates), marker, color=color,
                markersize=4, label=f"{kernel}, published for other layers",
            )  # fmt: skip
    columns[0].set_yticks(range(len(labels)), labels, fontsize=8)
    columns[0].set_ylim(len(labels) - 0.4, -0.6)
    _legend(figure, list(columns), list(found))
    figure.suptitle(title)
    return figure


def _draw_shape(
    axes: Axes, panel: Panel, names: list[str], gains: Gains, place: tuple[int, int, str]
) -> None:
    """One model's bars, each with its range beside it, and ticks for its bounds."""
    index, count, shape = place
    shift = (BAR + 0.02) * (index - (count - 1) / 2)
    rows = [
        (row + shift, gains[name], getattr(gains[name], panel.field))
        for row, name in enumerate(names)
        if name in gains and getattr(gains[name], panel.field) is not None
    ]
    axes.barh(
        [at for at, _, _ in rows],
        [found.high - found.low for _, _, found in rows],
        BAR,
        left=[found.low for _, _, found in rows],
        color=f"C{index}",
        label=shape,
    )
    for at, gain, found in rows:
        right = found.high
        if panel.field == "of_gemm" and gain.of_gemm_bound is not None:
            axes.plot([gain.of_gemm_bound] * 2, [at - BAR / 2, at + BAR / 2], color="black", lw=1.2)
            right = max(right, gain.of_gemm_bound)
        if found.high > found.low:
            axes.annotate(
                found.text(), (right, at), (3, 0), textcoords="offset points", va="center",
                fontsize=6.5, bbox=WHITE,
            )  # fmt: skip
        else:  # a rung over itself
            axes.plot([found.low], [at], "|", color=f"C{index}", markersize=8)


def _dress(axes: Axes, panel: Panel, gains: Iterable[Gain]) -> None:
    """Axis, claims and published gains of one column."""
    axes.set_xlabel(panel.title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0)
    if not panel.log:
        axes.set_xlim(0, 1.15)
        return
    ranges = [found for gain in gains if (found := getattr(gain, panel.field))]
    axes.set_xscale("log")
    if ranges:
        shown = covering_all(ranges)
        axes.set_xlim(0.7 * shown.low, 4 * max(shown.high, 5))  # room for the numbers
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axvline(1, color="0.5", linewidth=1)
    axes.axvspan(2, 5, color="tab:orange", alpha=0.10, lw=0, label="the article's 2-5x")
    axes.axvspan(4, 10, color="tab:red", alpha=0.06, lw=0, label="the article's 4-10x with PTX")
    if panel.field == "over_ragged_dot":
        text = ", ".join(f"{p.ratio}x" for p in PUBLISHED)
        for gain in PUBLISHED:
            axes.axvline(
                gain.ratio, color="black", linewidth=1, linestyle=":",
                label=f"published gains over ragged_dot: {text}",
            )  # fmt: skip


def _legend(figure: Figure, columns: list[Axes], shapes: list[str]) -> None:
    """Every label once, the models first."""
    entries = {}
    for axes in columns:  # the first column has bars of every model
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    tick = columns[0].plot([], [], "|", color="black", markersize=9)[0]
    entries["the model's bound"] = tick
    labels = sorted(entries, key=lambda label: label not in shapes)
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
