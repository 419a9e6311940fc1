"""One HTML page that compares runs. It holds its plots and needs no other file."""

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.base.figures import png, whole_ticks
from moe_jax.runs.comparison import (
    Looked,
    column,
    differences,
    short_names,
    table,
    throughput,
)
from moe_jax.runs.figures import draw_smoothed
from moe_jax.train.checkpoint import VALIDATION

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #8886; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; min-width: 36rem; background: white; }
"""

Series = Callable[[Looked], tuple[list[int], list[float]]]
PLOTS: dict[str, tuple[str, Series]] = {
    "Training loss": ("nats/token", partial(column, name="cross_entropy")),
    "Held-out text": ("bits/byte", partial(column, name=VALIDATION)),
    "Throughput": ("tokens/s", throughput),
    "Highest expert load": (
        "max / mean of the worst layer",
        partial(column, name="load_imbalance"),
    ),
    "Dropped assignments": ("in an update", partial(column, name="dropped")),
}
"""heading -> its axis, and the curve of a run."""


def write_page(runs: Sequence[Looked]) -> str:
    """The page as text."""
    names = short_names(runs)
    parts = ["<h1>Runs side by side</h1>", "<h2>Where they are</h2>", rows(names, table(runs))]
    changed = differences(runs)
    parts.append("<h2>Settings that differ</h2>")
    parts.append(rows(names, changed) if changed else "<p>None.</p>")
    for heading, (axis, series) in PLOTS.items():
        if (figure := draw(runs, names, axis, series)) is not None:
            parts += [f"<h2>{heading}</h2>", picture(figure, f"{heading}: {', '.join(names)}")]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Runs: {html.escape(', '.join(names))}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def rows(names: Sequence[str], content: Mapping[str, Sequence[str]]) -> str:
    """A table with a column for each run."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *names))
    lines = [f"<tr>{head}</tr>"]
    for name, values in content.items():
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return "<div><table>\n" + "\n".join(lines) + "\n</table></div>"


def draw(runs: Sequence[Looked], names: Sequence[str], axis: str, series: Series) -> Figure | None:
    """One quantity of all runs by step. None: no run has it."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    return figure if fill(figure.subplots(), runs, names, axis, series) else None


def fill(
    panel: Axes, runs: Sequence[Looked], names: Sequence[str], axis: str, series: Series
) -> bool:
    """Draws one quantity of all runs by step. Whether any run has it."""
    drawn = False
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        steps, values = series(run)
        color = f"C{place % 10}"
        if len(values) > 40:
            draw_smoothed(panel, steps, values, color, name)
        elif values:
            panel.plot(steps, values, "o-", markersize=3, color=color, label=name)
        drawn = drawn or bool(values)
    panel.set(xlabel="step", ylabel=axis)
    whole_ticks(panel)
    panel.legend()
    return drawn


def picture(figure: Figure, description: str) -> str:
    """A figure inside the page."""
    data = base64.b64encode(png(figure)).decode()
    # In a narrow window a plot scrolls in its box: its letters stay readable.
    image = f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
    return f"<div>{image}</div>"
