"""The plots of the moe_layer experiment."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, StrMethodFormatter

from experiments.moe_layer.decoding import Decode
from experiments.moe_layer.scaling import Point, slope
from moe_jax.base.figures import readable

DARK = "tab:blue"
LIGHT = "lightsteelblue"
GREY = "0.5"
LABELS = {
    "xla": "XLA, batched products",
    "reference": "XLA, reference",
    "ragged_dot": "jax.lax.ragged_dot",
    "transformers eager": "Transformers, eager",
    "transformers grouped_mm": "Transformers, grouped products",
    "transformers batched_mm": "Transformers, batched products",
    "xla skewed": "XLA, half of all rows to one expert",
    "xla bfloat16": "XLA, bfloat16",
}
"""What the calls of comparison.py and models.py are named in the plots."""


def draw_rates(rates: Mapping[str, tuple[float | None, ...]], title: str) -> Figure:
    """Bars of (forward, forward and backward) useful FLOP/s as fractions of the batched GEMM's."""
    figure = Figure(figsize=(9, 1.4 + 0.62 * len(rates)), layout="constrained")
    axes = figure.subplots()
    for row, pair in enumerate(rates.values()):
        for offset, value, color in zip((-0.19, 0.19), pair, (DARK, LIGHT), strict=True):
            axes.barh(row + offset, value or 0, height=0.36, color=color)
            text = "not measured" if value is None else f"{value:.3g}"
            axes.text((value or 0) + 0.01, row + offset, text, va="center", fontsize=8)
    axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rates)), [readable(LABELS.get(name, name)) for name in rates])
    axes.invert_yaxis()
    axes.set(xlabel="useful FLOP/s, fraction of the batched GEMM (dashed)", title=title)
    axes.set_xlim(0, 1.08 * max(1.0, *(value or 0 for pair in rates.values() for value in pair)))
    handles = [Patch(color=DARK), Patch(color=LIGHT)]
    figure.legend(
        handles,
        ["forward", "forward and backward"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    _quiet(axes)
    return figure


def draw_scaling(curves: Mapping[str, Sequence[Point]], title: str) -> Figure:
    """Time over memory for each varied size, log-log, with the slopes in the legends."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False, sharey="row")
    names = {"T": "tokens T", "E": "experts E", "K": "experts a token K"}
    for column, (letter, points) in enumerate(curves.items()):
        times = panels[0][column]
        memory = panels[1][column]
        sizes = [p.value for p in points]
        backward = "forward and backward"
        _line(times, sizes, [1e3 * p.train for p in points], backward, color=DARK)
        _line(times, sizes, [1e3 * p.forward for p in points], "forward", color="tab:orange")
        times.plot(
            sizes, [1e3 * p.gemm for p in points], ":", color=GREY, label=f"GEMM, {backward}"
        )
        _line(memory, sizes, [p.train_bytes / 1e6 for p in points], backward, color=DARK)
        _line(memory, sizes, [p.forward_bytes / 1e6 for p in points], "forward", color="tab:orange")
        for axes in (times, memory):
            axes.set(xlabel=names[letter])
            _log_log(axes, sizes)
            axes.legend(fontsize=8, frameon=False)
    panels[0][0].set_ylabel("milliseconds")
    panels[1][0].set_ylabel("temporary MB")
    figure.suptitle(title)
    return figure


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], label: str, color: str) -> None:
    axes.plot(x, y, "o-", color=color, markersize=4, label=f"{label}, slope {slope(x, y):.2f}")


def draw_decode(found: Sequence[Decode]) -> Figure:
    """Time of decoding steps between two limits: reading the used experts, and reading all."""
    figure = Figure(figsize=(5.5 * len(found), 4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, decode in zip(panels, found, strict=True):
        axes.plot(decode.tokens, [1e3 * s for s in decode.seconds], "o-", color=DARK, label="layer")
        used = [1e3 * s for s in decode.used]
        axes.plot(decode.tokens, used, ":", color=GREY, label="reading the used experts once")
        axes.axhline(
            1e3 * decode.every, color=GREY, linestyle="--", label="reading all experts once"
        )
        axes.set(xlabel="tokens T", ylabel="milliseconds")
        axes.set_title(f"decoding, E={decode.base.experts} K={decode.base.per_token}")
        _log_log(axes, decode.tokens)
        axes.legend(fontsize=8, frameon=False)
    return figure


def draw_models(rates: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """Forward and backward by model and implementation, as fractions of the batched GEMM."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    names = list(next(iter(rates.values())))
    colors = [DARK, LIGHT, "tab:orange", "navajowhite"]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        heights = [rate[name] or 0 for rate in rates.values()]
        at = [row + (index - (len(names) - 1) / 2) * width for row in range(len(rates))]
        axes.bar(at, heights, width=0.92 * width, color=colors[index], label=LABELS.get(name, name))
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(rates)), list(rates), rotation=15, ha="right")
    axes.set(
        ylabel="of the batched GEMM's FLOP/s",
        title="forward and backward, widths and tokens scaled down",
    )
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    _quiet(axes)
    return figure


def _log_log(axes: Axes, sizes: Sequence[int]) -> None:
    """Logarithmic axes with plain numbers: the sizes, and at most three a decade."""
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45 if len(sizes) > 5 else 0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    _quiet(axes)


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
