"""Plots: whole ticks, readable names, and files that carry the run's name."""

import io
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax.base.files import write_atomically

LONGEST_NAME = 50
"""Letters of a run's name that fit above a plot."""


def write_figure(figure: Figure, path: Path, run: str) -> None:
    """Writes a PNG atomically, with the run's name above the plot."""
    above = figure.get_suptitle()
    name = run if len(run) <= LONGEST_NAME else f"{run[:LONGEST_NAME]}…"
    # Without parse_math a name that holds two dollar signs would be read as a formula.
    figure.suptitle(f"{name}: {above}" if above else name, parse_math=False)
    write_atomically(path, png(figure))


def png(figure: Figure) -> bytes:
    """The picture of a figure."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def whole_ticks(axes: Axes) -> None:
    """Only whole numbers along x, because there is no half a step."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def readable(name: str, width: int = 40) -> str:
    """A name of the code or a phrase as a label, in lines of at most `width` letters."""
    return textwrap.fill(name.replace("_", " "), width)
