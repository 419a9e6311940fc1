"""What a reader sees of a plot: its texts, and whether one covers another."""

import itertools
from typing import Any
from unittest.mock import patch

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def shown_texts(figure: Figure) -> list[Text]:
    """Every text that is drawn: titles, ticks, labels and legends."""
    drawn: dict[int, Text] = {}
    draw = Text.draw

    def record(text: Text, renderer: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn[id(text)] = text
        draw(text, renderer)

    # Ticks outside an axis are in the figure, too: only drawing shows which ones are seen.
    with patch.object(Text, "draw", record):
        FigureCanvasAgg(figure).draw()
    return list(drawn.values())


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown_texts(figure)]
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if a.width and b.width and a.padded(-0.5).overlaps(b.padded(-0.5))
    ]


def cut_off(figure: Figure) -> list[str]:
    """Texts that reach over the figure's edge."""
    edges = figure.bbox.padded(1)
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown_texts(figure)]
    return [
        text
        for text, box in boxes
        if box.x0 < edges.x0 or box.y0 < edges.y0 or box.x1 > edges.x1 or box.y1 > edges.y1
    ]
