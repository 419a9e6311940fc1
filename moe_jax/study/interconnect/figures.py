"""Plots of the interconnect: time over links, what software replaces, and the anchors."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.study.interconnect.anchors import Anchor
from moe_jax.study.interconnect.ladder import WAYS, BlockOn, link_rates

GIGA = 1e9
RATES = [GIGA * 2 ** (power / 2) for power in range(4, 20)]
"""From 4 to about 720 GB/s."""


def draw_interconnect(
    one: BlockOn,
    several: BlockOn,
    replaced: Mapping[int, tuple[float | None, float | None]],
    found: Sequence[Anchor],
) -> Figure:
    """One node, several nodes, what software replaces by the number of nodes, and the anchors."""
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = figure.subplots(2, 2)
    _draw_times(panels[0, 0], one, inside=True)
    for name, rate in link_rates():
        panels[0, 0].axvline(rate / GIGA, color="0.85", lw=0.8, zorder=0)
        panels[0, 0].text(rate / GIGA, 2, name, rotation=90, fontsize=7, ha="right", va="bottom")
    _draw_times(panels[0, 1], several, inside=False)
    _draw_replaced(panels[1, 0], replaced)
    _draw_anchors(panels[1, 1], found)
    figure.suptitle("PREDICTED: a block of DeepSeek-V3 with 4,096 tokens a device, F + Bi + W")
    return figure


def _draw_times(axes: Axes, block: BlockOn, *, inside: bool) -> None:
    blocks = [block.at(rate, inside=inside) for rate in RATES]
    x = [rate / GIGA for rate in RATES]
    for number, way in enumerate(WAYS):
        axes.plot(x, [1e3 * one.seconds(way) for one in blocks], color=f"C{number}", label=way.name)
    best = [1e3 * one.seconds(one.best()) for one in blocks]
    axes.plot(x, best, "k--", lw=1, label="best of all combinations")
    axes.axhline(1e3 * block.compute(WAYS[0]), color="0.5", ls=":", label="products alone")
    nodes = block.cluster.devices // block.cluster.card.node
    link = "link inside of the node" if inside else "network"
    axes.set(xscale="log", ylim=(0, 150), xlabel=f"{link}, GB/s of a device", ylabel="ms")
    axes.set_title(f"{nodes} node{'s' if nodes > 1 else ''} of 8 H100", fontsize=10)
    axes.legend(fontsize=7, loc="upper right")
    axes.grid(alpha=0.3)


def _draw_replaced(axes: Axes, replaced: Mapping[int, tuple[float | None, float | None]]) -> None:
    """Rates that software needs: to equal the plain way on the own link, and to hide all."""
    labels = ("to equal the plain way on the card's own link", "to be within 10% of products alone")
    for number, label in enumerate(labels):
        points = [(nodes, pair[number]) for nodes, pair in replaced.items()]
        known = [(nodes, rate / GIGA) for nodes, rate in points if rate is not None]
        axes.plot(*zip(*known, strict=True), "o-", color=f"C{number}", label=f"software {label}")
    axes.set(yscale="log", xlabel="nodes", ylabel="GB/s of a device")
    axes.axhline(362, color="0.5", ls=":", label="NVLink 4, the link at 1 node")
    axes.axhline(48.5, color="0.5", ls="--", label="InfiniBand, the link at more nodes")
    axes.set_title("the rate that software needs", fontsize=10)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _draw_anchors(axes: Axes, found: Sequence[Anchor]) -> None:
    ratios = [anchor.predicted / anchor.measured for anchor in found]
    axes.barh(range(len(found)), ratios, color="C0", alpha=0.35)
    for place, anchor in enumerate(found):
        text = f"{anchor.name}: {anchor.measured:.4g} measured, {anchor.predicted:.4g} predicted"
        axes.text(0.02, place, f"{text} {anchor.unit.split(',')[0]}", va="center", fontsize=7)
    axes.axvline(1, color="k", lw=1)
    axes.set_yticks([])
    axes.set(xlabel="predicted / measured")
    axes.invert_yaxis()
    axes.set_title("what others measured", fontsize=10)
