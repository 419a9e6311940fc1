"""The plots of experiments with seeds: a mean with the seeds around it."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from moe_jax.base.files import write_atomically

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
) -> None:
    """A line for each arm of `order`: a grey dot for each seed, a large one for their mean.

    An arm without values keeps its empty line, so that two panels can share their order.
    """
    for place, arm in enumerate(order):
        if arm in values:
            array = np.asarray(values[arm], float)
            axes.plot(array, [place] * len(array), ".", color=SEED_COLOR)
            axes.plot(array.mean(), place, "o", color=(colors or {}).get(arm, "C0"))
    axes.set_yticks(range(len(order)), order)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG atomically: whoever watches the folder never sees half a picture."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())


def save_figures(figures: Mapping[str, Figure], folder: Path) -> None:
    """Writes folder/NAME.png for each figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
