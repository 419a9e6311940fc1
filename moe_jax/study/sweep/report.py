"""What a sweep writes: trials.csv, plots/sweep.png, result.json, and the best command line."""

import csv
import io
import json
import statistics
from dataclasses import asdict
from typing import Any

from moe_jax import cli
from moe_jax.base.files import write_atomically
from moe_jax.base.provenance import call_of, provenance
from moe_jax.study.sweep.command import Sweep
from moe_jax.study.sweep.trials import completed, finished, folder


def value_text(value: Any) -> str:
    """A searched value, short enough for a line."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_table(study: Any, sweep: Sweep) -> None:
    """DIR/trials.csv: a row for each finished trial."""
    fields = [field for axis in sweep.axes for field in axis.field.split("+")]
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["folder", "state", sweep.config.objective, *fields, "seconds", "error"])
    for t in finished(study):
        seconds = round(t.duration.total_seconds(), 1)
        params = [v for a in sweep.axes for v in a.assignments(t.params[a.field]).values()]
        rows.writerow(
            [folder(t), t.state.name.lower(), t.value, *params, seconds, t.user_attrs.get("error")]
        )
    write_atomically(sweep.out / "trials.csv", table.getvalue())


def plot(study: Any, sweep: Sweep) -> None:
    """DIR/plots/sweep.png: the objective against each searched field, the best trial marked."""
    from matplotlib.figure import Figure

    from moe_jax.base.figures import write_figure

    figure = Figure(figsize=(4 * len(sweep.axes), 3.5), layout="constrained")
    panels = figure.subplots(1, len(sweep.axes), sharey=True, squeeze=False)[0]
    trials = completed(study)
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
        panel.plot(values, [t.value for t in trials], "o", alpha=0.6)
        # The trials are sorted: the first one is the best.
        panel.plot(values[:1], [trials[0].value], "*", markersize=16, label=folder(trials[0]))
    panels[0].set_ylabel(sweep.config.objective)
    panels[0].legend()
    write_figure(figure, sweep.out / "plots" / "sweep.png", sweep.out.resolve().name)


def summarise(study: Any, sweep: Sweep) -> dict[str, Any]:
    """The sweep's result.json, in the form of moe_jax.base.result.

    The environment is the best trial's. The sweep itself measures nothing, and never starts JAX,
    which would take a GPU's memory away from the trials.
    """
    best, *others = completed(study)
    objective = sweep.config.objective
    count = len(others) + 1
    failed = len(finished(study)) - count
    median = statistics.median([best.value, *(t.value for t in others)])
    result = json.loads((sweep.out / folder(best) / "result.json").read_text())
    unit = next(m.get("unit") for m in result["measurements"] if m["name"] == objective)
    params = ", ".join(f"{name}={value_text(value)}" for name, value in best.params.items())
    return {
        "experiment": f"sweep {sweep.name}",
        "question": f"Which {', '.join(a.field for a in sweep.axes)} gives the lowest {objective}?",
        **provenance(),
        "config": asdict(sweep.config) | {"identity": sweep.identity, "best": best.params},
        "environment": result.get("environment"),
        "measurements": [
            {
                "name": f"best_{objective}",
                "value": best.value,
                "unit": unit,
                "baseline": "median of the trials",
                "ratio": best.value / median if median else None,
                "seeds": [sweep.config.seed],
            },
            {"name": f"median_{objective}", "value": median, "unit": unit},
            {"name": "trials_with_a_value", "value": count, "unit": "trials"},
            {"name": "trials_without_a_value", "value": failed, "unit": "trials"},
        ],
        "verdict": f"{params} gave {best.value:.5g} {unit}, the lowest of {count} trials. "
        f"The median is {median:.5g}, and {failed} more trials gave no value. "
        "One seed: repeat before trusting it.",
    }


def best_command(study: Any, sweep: Sweep) -> str:
    """The command line of the best trial, without its folder."""
    presets = sweep.experiment.presets
    config = cli.parse(sweep.trial_arguments(completed(study)[0].params), presets)
    return cli.command_line(config, presets[config.preset], call_of(sweep.name))
