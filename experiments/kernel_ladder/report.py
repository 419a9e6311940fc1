"""From the rungs' times to gains, measurements, the plot and the verdict."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib.figure import Figure
from moe_kernels.timing import ratio

from experiments.kernel_ladder.cases import Step
from experiments.kernel_ladder.measurement import Rounds
from experiments.kernel_ladder.rungs import RUNGS, before, rung_of
from moe_jax.base.figures import readable
from moe_jax.base.result import Measurement

Gains = dict[str, tuple[float, float]]
"""By rung: (speed over the rung that it is added to, speed over XLA's path)."""


def gains(steps: dict[str, Step], seconds: Rounds) -> Gains:
    """The speeds of all rungs. Measured ones are medians over rounds, predicted ones have none."""
    times = seconds or {name: [step.milliseconds] for name, step in steps.items()}
    found = {}
    for rung in (rung for rung in RUNGS if rung.name in times):
        previous = before(rung)
        over = 1.0 if previous is None else ratio(times[rung.name], times[previous])
        found[rung.name] = over, ratio(times[rung.name], times["xla"])
    return found


def draw(found: dict[str, Gains], title: str) -> Figure:
    """Speed over XLA's path, a group of bars for each rung's idea, and the article's claim."""
    names = list(next(iter(found.values())))
    ideas = {rung.name: rung.idea for rung in RUNGS}
    figure = Figure(figsize=(9, 1.6 + 0.62 * len(names)), layout="constrained")
    axes = figure.subplots()
    for index, (shape, rungs) in enumerate(found.items()):
        at = np.arange(len(names)) + 0.27 * (index - (len(found) - 1) / 2)
        bars = axes.barh(at, [rungs[name][1] for name in names], 0.25, label=shape)
        # White behind the numbers, because the line at 1 would cross them.
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2, bbox=white)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.axvspan(2, 5, color="tab:orange", alpha=0.08, label="the article's 2-5x")
    axes.set_yticks(range(len(names)), [readable(ideas[name]) for name in names], fontsize=8)
    axes.invert_yaxis()
    highest = max(over_xla for rungs in found.values() for _, over_xla in rungs.values())
    axes.set_xlim(0, max(2.3, 1.15 * highest))
    axes.set_xlabel("speed over XLA's own path")
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=len(found) + 1, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def recorded_gains(rows: Mapping[str, Measurement], shapes: Iterable[str]) -> dict[str, Gains]:
    """`gains` of every shape, out of the measurements of a result.json."""
    found = {}
    for shape in shapes:
        speeds = {
            rung.name: rows[name].value or 0.0
            for rung in RUNGS
            if (name := key(f"{shape} {rung.name}")) in rows
        }
        found[shape] = {
            name: (speed / speeds.get(before(rung_of(name)) or name, speed), speed)
            for name, speed in speeds.items()
        }
    return found


def verdict(found: dict[str, Gains], label: str) -> str:
    """The article's claims against the gains, geometric means over the shapes."""

    def mean(name: str, which: int) -> float:
        values = [rungs[name][which] for rungs in found.values()]
        return float(np.exp(np.mean(np.log(values))))

    steps = ", ".join(
        f"{rung.name} {mean(rung.name, 0):.2f}x"
        for rung in RUNGS
        if before(rung) is not None and rung.name in next(iter(found.values()))
    )
    whole = mean("raster", 1)
    over_first = whole / mean("grouped", 1)
    claim = "inside" if 2 <= whole <= 5 else "below" if whole < 2 else "above"
    return (
        f"{label}. All ideas together are {whole:.2f}x XLA's own path, {claim} the article's 2-5x. "
        f"They are {over_first:.2f}x the naive Triton kernels of the first rung. "
        f"Each idea over the rung that it is added to: {steps}. "
        f"Inline PTX is {mean('ptx', 0):.2f}x, where the article says 4-10x."
    )


def key(text: str) -> str:
    """A name for result.json."""
    return re.sub(r"\W+", "_", text).lower()


def rung_measurements(
    shape: str, rung: str, *, over_xla: float, of_gemm: float, kind: str
) -> list[Measurement]:
    """The two ratios of one rung. `kind` says whether they were measured or predicted."""
    name = key(f"{shape} {rung}")
    gemm_unit = f"of the plain GEMM's FLOP/s, {kind}"
    return [
        Measurement(name, over_xla, f"x XLA's path, {kind}", "xla", over_xla),
        Measurement(f"{name}_of_gemm", of_gemm, gemm_unit, "gemm", of_gemm),
    ]
