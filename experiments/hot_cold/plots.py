"""The plots of decoding: speed over the budget, and a stretch of copies beside computation."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.hot_cold.speeds import Comparison, ratio
from experiments.hot_cold.variants import BUDGETS, POLICY
from moe_jax.placement.traffic import Traffic

OTHERS = {
    "no_look_ahead": ("^", "no look-ahead"),
    "host_copy": ("s", "the others in host memory, copied"),
    "host_compute": ("D", "the others in host memory, computed there"),
}
"""Marker and label of the variants that are run at 25% and 50% alone."""


def draw_speed(c: Comparison) -> Figure:
    """Speed over the budget, as a part of all_resident's, with the ceiling."""
    shown = [c.by_name[f"{POLICY}_at_{100 * b:.0f}"] for b in BUDGETS]
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    share = [100 * b for b in BUDGETS]
    axes.plot(share, [ratio(v, c.full) for v in shown], "o-", label=f"{POLICY} policy, look-ahead")
    axes.plot(share, [c.ceiling(v) for v in shown], "k:", label="its ceiling")
    for name, (marker, label) in OTHERS.items():
        points = [ratio(c.by_name[f"{name}_at_{b}"], c.full) for b in (25, 50)]
        axes.plot([25, 50], points, marker, label=label)
    low_bit = ratio(c.by_name["low_bit_at_25"], c.full)
    axes.plot([25], [low_bit], "x", label="8-bit copies (not exact)")
    axes.axhline(ratio(c.naive, c.full), ls="--", color="0.5", label="naive loading")
    axes.set(xlabel="experts in memory, %", ylabel="speed, of all resident", ylim=(0, 1.1))
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_timelines(c: Comparison) -> Figure:
    """The same stretch with asynchronous copies and with blocking ones."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    titles = {
        f"{POLICY}_at_25": "asynchronous copies, a quarter of the experts in memory",
        "blocking_at_25": "every copy waited for, a quarter of the experts in memory",
    }
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        draw_timeline(axes, c.by_name[name].traffic)
        axes.set_title(title, fontsize=9)
    panels[-1].set_xlabel("milliseconds")
    return figure


def draw_timeline(axes: Axes, traffic: Traffic, seconds: float = 0.03) -> None:
    """The first copies after the warm-up, on a miss and ahead, above the time between fetches."""
    first = traffic.fetches[0][0] if traffic.fetches else 0.0
    on_miss = [(c.begin, c.end) for c in traffic.copies if not c.ahead]
    ahead = [(c.begin, c.end) for c in traffic.copies if c.ahead]
    # The decoder computes from the end of a fetch to the begin of the next.
    ends = [end for _, end in traffic.fetches]
    begins = [begin for begin, _ in traffic.fetches[1:]]
    computed = list(zip(ends, begins, strict=False))
    rows = (on_miss, ahead, computed)
    for row, (spans, color) in enumerate(zip(rows, ("red", "blue", "green"), strict=True)):
        shown = [(1e3 * (b - first), 1e3 * (e - b)) for b, e in spans if 0 <= b - first < seconds]
        axes.broken_barh(shown, (row, 0.8), color=f"tab:{color}")
    axes.set_yticks([0.4, 1.4, 2.4], ["copy on a miss", "copy ahead", "compute"])
