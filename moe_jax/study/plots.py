"""The plots of experiments with seeds: a mean with the seeds around it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from moe_jax.base.figures import readable, write_figure

SEED_COLOR = "0.7"


def plot_band(
    axes: Axes, x: ArrayLike, values: ArrayLike, *, label: str, color: str, line: str = "o-"
) -> None:
    """The mean of float[seeds, points] over x, and a band from its lowest to its highest seed."""
    array = np.asarray(values, float)
    axes.plot(x, array.mean(0), line, markersize=3, color=color, label=label)
    axes.fill_between(x, array.min(0), array.max(0), color=color, alpha=0.15)


def highest_mean_first(values: Mapping[str, ArrayLike]) -> list[str]:
    """The arms in the order of plot_dots: it draws upwards, so the best loss is the top line."""
    return sorted(values, key=lambda arm: -float(np.asarray(values[arm], float).mean()))


def plot_dots(
    axes: Axes,
    values: Mapping[str, ArrayLike],
    order: Sequence[str],
    colors: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> None:
    """A line for each arm of `order`: a grey dot for each seed, a large one for their mean.

    An arm without values keeps its empty line, so that two panels can share their order. An arm
    without a label has its own name, in words.
    """
    for place, arm in enumerate(order):
        if arm in values:
            array = np.asarray(values[arm], float)
            axes.plot(array, [place] * len(array), ".", color=SEED_COLOR)
            axes.plot(array.mean(), place, "o", color=(colors or {}).get(arm, "C0"))
    axes.set_yticks(range(len(order)), [readable((labels or {}).get(arm, arm)) for arm in order])


def save_figures(figures: Mapping[str, Figure], folder: Path, run: str) -> None:
    """Writes folder/NAME.png for each figure, with the run's name above it."""
    for name, figure in figures.items():
        write_figure(figure, folder / f"{name}.png", run)
