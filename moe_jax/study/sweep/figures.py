"""The plots of a sweep."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_jax.base.figures import readable, whole_ticks, write_figure
from moe_jax.study.sweep.axes import Axis
from moe_jax.study.sweep.command import Sweep
from moe_jax.study.sweep.trials import completed, folder, front

MOST_LABELS = 12


def plot(study: Any, sweep: Sweep) -> None:
    """DIR/plots/NAME.png for each plot that the trials are enough for."""
    figures: dict[str, Callable[[Any, Sweep], Figure | None]] = {
        "sweep": draw_values,
        "history": draw_history,
        "parallel": draw_parallel,
        "importance": draw_importance,
        "pareto": draw_pareto,
    }
    for name, draw in figures.items():
        if (figure := draw(study, sweep)) is not None:
            write_figure(figure, sweep.out / "plots" / f"{name}.png", sweep.out.resolve().name)


def draw_values(study: Any, sweep: Sweep) -> Figure:
    """The first objective against each searched field, the best trial marked."""
    figure = Figure(figsize=(4 * len(sweep.axes), 3.5), layout="constrained")
    panels = figure.subplots(1, len(sweep.axes), sharey=True, squeeze=False)[0]
    trials = completed(study, sweep)
    for panel, axis in zip(panels, sweep.axes, strict=True):
        panel.set_xlabel(axis.field)
        if axis.log:
            panel.set_xscale("log")
            panel.tick_params(axis="x", which="both", labelrotation=45)
        values = [t.params[axis.field] for t in trials]
        if axis.choices:
            values = [axis.choices.index(v) for v in values]
            panel.set_xticks(range(len(axis.choices)), axis.choices, rotation=30, ha="right")
            panel.set_xlim(-0.5, len(axis.choices) - 0.5)
        panel.plot(values, [t.values[0] for t in trials], "o", alpha=0.6)
        # The trials are sorted: the first one is the best.
        panel.plot(values[:1], [trials[0].values[0]], "*", markersize=16, label=folder(trials[0]))
    panels[0].set_ylabel(readable(sweep.objectives[0].name, 24))
    panels[0].legend()
    return figure


def draw_history(study: Any, sweep: Sweep) -> Figure:
    """Each objective by the number of the trial, with the best one so far."""
    figure = Figure(figsize=(7, 3 * len(sweep.objectives)), layout="constrained")
    panels = figure.subplots(len(sweep.objectives), 1, sharex=True, squeeze=False)[:, 0]
    trials = sorted(completed(study, sweep), key=lambda trial: trial.datetime_complete)
    places = np.arange(1, len(trials) + 1)
    for place, (panel, objective) in enumerate(zip(panels, sweep.objectives, strict=True)):
        values = np.array([trial.values[place] for trial in trials])
        so_far = np.maximum if objective.maximise else np.minimum
        panel.plot(places, values, "o", alpha=0.6, label="trial")
        panel.plot(places, so_far.accumulate(values), drawstyle="steps-post", label="best so far")
        panel.set_ylabel(readable(objective.name, 24))
        whole_ticks(panel)
    panels[0].legend()
    panels[-1].set_xlabel("trials with a value, in the order of their ends")
    return figure


def draw_parallel(study: Any, sweep: Sweep) -> Figure | None:
    """Parallel coordinates: a line for each trial over all fields, coloured by the first objective.

    None: one field alone has no parallel.
    """
    if len(sweep.axes) < 2:
        return None
    trials = completed(study, sweep)[::-1]  # the best lines last, above the others
    values = np.array([trial.values[0] for trial in trials])
    figure = Figure(figsize=(2.6 * len(sweep.axes) + 1.5, 4), layout="constrained")
    panel = figure.subplots()
    heights = np.array(
        [[height(axis, t.params[axis.field]) for axis in sweep.axes] for t in trials]
    )
    colors = colormaps["viridis" if sweep.objectives[0].maximise else "viridis_r"]
    scale = Normalize(values.min(), values.max())
    for row, value in zip(heights, values, strict=True):
        panel.plot(range(len(row)), row, color=colors(scale(value)), alpha=0.8)
    for place, axis in enumerate(sweep.axes):
        _mark(panel, place, axis)
    panel.set_xticks(range(len(sweep.axes)), [axis.field.replace("+", "\n") for axis in sweep.axes])
    panel.set_xlim(-0.15, len(sweep.axes) - 0.65)
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    image = ScalarMappable(scale, colors)
    figure.colorbar(image, ax=panel, label=readable(sweep.objectives[0].name))
    return figure


def height(axis: Axis, value: Any) -> float:
    """Where a value lies on its axis, from 0 at the lowest to 1 at the highest."""
    if axis.choices:
        return axis.choices.index(value) / max(1, len(axis.choices) - 1)
    low, high, own = (np.log(x) if axis.log else x for x in (axis.low, axis.high, value))
    return float((own - low) / (high - low))


def _mark(panel: Axes, place: int, axis: Axis) -> None:
    """The vertical line of an axis with its values, or with its ends."""
    panel.axvline(place, color="0.6", linewidth=1)
    if axis.choices and len(axis.choices) <= MOST_LABELS:
        marks: tuple[Any, ...] = axis.choices
    elif axis.choices:
        marks = (axis.choices[0], axis.choices[-1])
    else:
        marks = (axis.low, axis.high)
    for mark in marks:
        text = mark if isinstance(mark, str) else f"{mark:g}"
        panel.annotate(text, (place, height(axis, mark)), (4, 2), textcoords="offset points")


def draw_importance(study: Any, sweep: Sweep) -> Figure | None:
    """How much of the first objective's variation each field explains, by PED-ANOVA
    (arXiv:2304.10255).

    None: fewer than two fields or three trials say nothing of that.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    trials = completed(study, sweep)
    if len(sweep.axes) < 2 or len(trials) < 3:
        return None
    sign = sweep.objectives[0].sign
    with warnings.catch_warnings():
        # It says that low values count as good where there is a target. The sign is for that.
        warnings.simplefilter("ignore")
        shares = get_param_importances(
            study,
            evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25),
            params=[axis.field for axis in sweep.axes],
            target=lambda trial: sign * trial.values[0],
        )
    figure = Figure(figsize=(7, 1.2 + 0.45 * len(shares)), layout="constrained")
    panel = figure.subplots()
    names = list(shares)[::-1]
    panel.barh(names, [shares[name] for name in names])
    panel.set_xlim(0, 1)
    panel.set_xlabel(f"share of what decides {readable(sweep.objectives[0].name)}")
    return figure


def draw_pareto(study: Any, sweep: Sweep) -> Figure | None:
    """Each further objective against the first one, with the Pareto front. None: there is one."""
    if len(sweep.objectives) < 2:
        return None
    first, *others = sweep.objectives
    figure = Figure(figsize=(5 * len(others), 4), layout="constrained")
    panels = figure.subplots(1, len(others), squeeze=False)[0]
    trials = completed(study, sweep)
    best = front(study, sweep)
    for place, (panel, other) in enumerate(zip(panels, others, strict=True), start=1):
        panel.plot([t.values[place] for t in trials], [t.values[0] for t in trials], "o", alpha=0.4)
        x = [trial.values[place] for trial in best]
        y = [trial.values[0] for trial in best]
        panel.plot(x, y, "o-" if len(others) == 1 else "o", color="tab:red", label="Pareto front")
        for trial, *at in zip(best[:MOST_LABELS], x, y, strict=False):
            panel.annotate(folder(trial), at, (4, 4), textcoords="offset points", fontsize=7)
        panel.set_xlabel(_wanted(other))
    panels[0].set_ylabel(_wanted(first))
    panels[0].legend()
    return figure


def _wanted(objective: Any) -> str:
    return f"{readable(objective.name)} ({'higher' if objective.maximise else 'lower'} is better)"
