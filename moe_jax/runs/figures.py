"""The plots of a training run: loss, load of the experts, and the router."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from moe_jax.base.figures import whole_ticks, write_figure
from moe_jax.runs.baselines import BASELINE_NAMES
from moe_jax.train.checkpoint import VALIDATION

HIGHEST = 2.0
"""Load / mean load at the end of the colour scale. Loads above it have a colour of their own."""


def draw_plots(
    lines: list[dict[str, Any]], baselines: dict[str, float], out: Path, experts: int
) -> None:
    """plots/loss.png, and for a mixture of experts load.png and router.png."""
    figures = {"loss": draw_loss(lines, baselines)}
    if any("load" in line for line in lines):
        figures["load"] = draw_load(lines)
        figures["router"] = draw_router(lines, experts)
    for name, figure in figures.items():
        write_figure(figure, out / "plots" / f"{name}.png", out.resolve().name)


def draw_smoothed(axes: Any, steps: list[int], values: Any, color: str, label: str) -> None:
    """Every value as a faint line, and their running mean over a fortieth of the run."""
    values = np.asarray(values, float)  # a skipped step has None: a gap in the curve
    axes.plot(steps, values, alpha=0.25, color=color, linewidth=0.8)
    width = max(1, len(values) // 40)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color=color, label=label)


def draw_loss(lines: list[dict[str, Any]], baselines: dict[str, float]) -> Figure:
    """Training loss by step, and validation bits per byte among the compressors."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _fill_training(left, lines)
    measured = [(x["step"], x[VALIDATION]) for x in lines if VALIDATION in x]
    right.plot(*zip(*measured, strict=True), marker="o", color="tab:blue", label="model")
    for (name, value), style in zip(baselines.items(), ("--", "-.", ":"), strict=True):
        right.axhline(value, linestyle=style, color="gray", label=BASELINE_NAMES[name])
    right.set(xlabel="step", ylabel="bits per byte", title="held-out text")
    right.set_xlim(left=0)
    right.legend()
    for axes in (left, right):
        whole_ticks(axes)
    return figure


def _fill_training(axes: Axes, lines: list[dict[str, Any]]) -> None:
    trained = [x for x in lines if "cross_entropy" in x]
    if trained:  # else metrics.jsonl was lost
        losses = [x["cross_entropy"] for x in trained]
        draw_smoothed(axes, [x["step"] for x in trained], losses, "tab:blue", "running mean")
        axes.legend()
    axes.set(xlabel="step", ylabel="cross-entropy (nats/token)", title="training")


def draw_so_far(lines: list[dict[str, Any]]) -> Figure:
    """Training loss and expert load of a run that goes on."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.4))[0]
    axes = left.subplots()
    _fill_training(axes, lines)
    whole_ticks(axes)
    if any("load" in line for line in lines):
        _fill_load(right, lines)
    return figure


def draw_load(lines: list[dict[str, Any]]) -> Figure:
    """Expert load relative to the mean, over layers (panels), experts (rows) and time.

    Each snapshot fills the steps until the next one.
    """
    layers = len(next(x["load"] for x in lines if "load" in x))
    figure = Figure(figsize=(11, 1.4 + 1.3 * layers), layout="constrained")
    _fill_load(figure, lines)
    return figure


def _fill_load(figure: FigureBase, lines: list[dict[str, Any]]) -> None:
    snapshots = [x for x in lines if "load" in x]
    steps = [x["step"] for x in snapshots]
    load = np.array([x["load"] for x in snapshots], float)
    relative = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)
    layers = relative.shape[1]
    edges = [*steps, lines[-1]["step"] + 1]
    panels = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    image: Any = None
    for layer, panel in enumerate(panels):
        image = _draw_layer(panel, edges, relative[:, layer].T)
        panel.set_ylabel(f"MoE layer {layer}\nexpert")
    panels[-1].set_xlabel("step")
    over = bool((relative > HIGHEST).any())
    bar = figure.colorbar(image, ax=panels.tolist(), extend="max" if over else "neither")
    bar.set_label("load / mean load")
    figure.suptitle(f"expert load (white: balanced{_above(relative, steps) if over else ''})")


def _draw_layer(panel: Axes, edges: list[int], relative: np.ndarray) -> Any:
    colors = matplotlib.colormaps["RdBu_r"].with_extremes(over="purple")
    rows = np.arange(len(relative) + 1) - 0.5  # an expert's number is in the middle of its row
    image = panel.pcolormesh(edges, rows, relative, cmap=colors, vmin=0, vmax=HIGHEST)
    panel.invert_yaxis()
    panel.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    whole_ticks(panel)
    return image


def _above(relative: np.ndarray, steps: list[int]) -> str:
    """What the colours above the scale stand for."""
    snapshot = np.unravel_index(relative.argmax(), relative.shape)[0]
    highest = f"the highest is {relative.max():.1f} at step {steps[snapshot]}"
    return f", purple: above {HIGHEST:g}, {highest}"


def draw_router(lines: list[dict[str, Any]], experts: int) -> Figure:
    """Router entropy and load imbalance of every layer by step."""
    routed = [x for x in lines if "router_entropy" in x]
    steps = [x["step"] for x in routed]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    # Guarded for one expert, whose log E is 0.
    entropy = np.array([x["router_entropy"] for x in routed]) / max(np.log(experts), 1e-9)
    imbalance = np.array([x["load_imbalance"] for x in routed])
    for layer in range(entropy.shape[1]):
        color = f"C{layer % 10}"
        label = f"MoE layer {layer}"
        draw_smoothed(left, steps, entropy[:, layer], color, label)
        draw_smoothed(right, steps, imbalance[:, layer], color, label)
    left.set(xlabel="step", ylabel="entropy / log E", title="router entropy", ylim=(0, 1.02))
    right.set(xlabel="step", ylabel="max / mean", title="expert load imbalance")
    left.legend(fontsize="small")
    right.axhline(1, linestyle=":", color="gray")
    for axes in (left, right):
        whole_ticks(axes)
    return figure
