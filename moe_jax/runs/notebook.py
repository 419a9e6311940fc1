"""Runs in a notebook: a figure that follows a run, and figures that compare runs.

IPython is imported where it is used, because only notebooks have it.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moe_jax.base.errors import require
from moe_jax.base.figures import png
from moe_jax.runs.comparison import look, table
from moe_jax.runs.figures import draw_so_far
from moe_jax.runs.page import PLOTS, fill, rows
from moe_jax.train.metrics import read_lines

SECONDS = 3.0
"""Time between two pictures of a run that goes on."""


def show(figure: Figure) -> None:
    """Displays a figure below the cell. It need not be one of pyplot's."""
    from IPython.display import Image, display

    display(Image(png(figure)))


@contextmanager
def following(out: str | Path, seconds: float = SECONDS) -> Iterator[None]:
    """Shows loss and expert loads of the run in `out` below the cell while the block trains it."""
    from IPython.display import Image, display

    metrics = Path(out) / "metrics.jsonl"
    shown: Any = None
    ended = threading.Event()

    def draw() -> None:
        nonlocal shown
        lines = list(read_lines(metrics))
        if not lines:
            return  # nothing is trained yet
        picture = Image(png(draw_so_far(lines)))
        if shown is None:
            shown = display(picture, display_id=True)
        else:
            shown.update(picture)

    def follow() -> None:
        while not ended.wait(seconds):
            draw()

    thread = threading.Thread(target=follow, name=f"following {out}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        draw()


def compared(runs: Mapping[str, str | Path], *headings: str) -> Figure:
    """Quantities of several runs by step, side by side. UserError: a quantity is unknown.

    `runs`: name -> folder. `headings`: those of runs.page.PLOTS.
    """
    for heading in headings:
        require(heading in PLOTS, f"there is no plot '{heading}': use one of {', '.join(PLOTS)}")
    found = [look(str(out)) for out in runs.values()]
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, len(headings), squeeze=False)[0]
    for panel, heading in zip(panels, headings, strict=True):
        fill(panel, found, list(runs), *PLOTS[heading])
        panel.set_title(heading)
    return figure


def show_table(runs: Mapping[str, str | Path]) -> None:
    """Displays what runs have reached, a column for each. `runs`: name -> folder."""
    from IPython.display import HTML, display

    found = [look(str(out)) for out in runs.values()]
    display(HTML(rows(list(runs), table(found))))
