"""The picture of a search: seconds of a step over bytes of a device, and what nothing beats."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.study.layout_search.tries import Try

GIB = 2**30


def pareto(tries: Sequence[Try]) -> list[Try]:
    """Those that fit and of which none has both fewer bytes and fewer seconds, by bytes."""
    found: list[Try] = []
    for one in sorted((one for one in tries if one.fits), key=_point):
        if not found or one.value("step_seconds") < found[-1].value("step_seconds"):
            found.append(one)
    return found


def _point(one: Try) -> tuple[float, float]:
    return one.value("bytes_per_device"), one.value("step_seconds")


def draw(tries: Sequence[Try], card_bytes: int, title: str) -> Figure:
    """Every compiled candidate with its interval, and the Pareto front."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    compiled = [one for one in tries if one.rows is not None]
    groups = (
        ("fits", "#3b74c4", [one for one in compiled if one.fits]),
        ("does not fit", "#bbbbbb", [one for one in compiled if not one.fits]),
    )
    for label, color, group in groups:
        if group:
            _points(axes, group, label, color)
    front = pareto(compiled)
    points = [_point(one) for one in front]
    if points:
        axes.plot(
            [size / GIB for size, _ in points],
            [seconds for _, seconds in points],
            color="#c8701a",
            drawstyle="steps-post",
            label="nothing is better in both",
        )
    for number, one in enumerate(front, 1):
        size, seconds = _point(one)
        axes.annotate(f"{number}", (size / GIB, seconds), textcoords="offset points", xytext=(5, 5))
    names = "\n".join(f"{number}  {one.candidate.name}" for number, one in enumerate(front, 1))
    axes.text(1.02, 0.0, names, transform=axes.transAxes, fontsize=7, va="bottom")
    axes.axvline(card_bytes / GIB, color="black", linewidth=1)
    axes.annotate("the card", (card_bytes / GIB, axes.get_ylim()[1]), fontsize=8, ha="right")
    axes.set(xlabel="GiB a device", ylabel="seconds of a step, PREDICTED", ylim=(0, None))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)
    figure.suptitle(f"PREDICTED: {title}")
    return figure


def _points(axes: Axes, group: Sequence[Try], label: str, color: str) -> None:
    sizes, seconds = zip(*map(_point, group), strict=True)
    axes.errorbar(
        [size / GIB for size in sizes],
        seconds,
        yerr=[
            [one.value("step_seconds") - one.interval[0] for one in group],
            [one.interval[1] - one.value("step_seconds") for one in group],
        ],
        fmt="o",
        color=color,
        elinewidth=0.5,
        label=label,
    )
