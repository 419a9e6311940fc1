"""What a sweep writes: trials.csv and result.json."""

import csv
import io
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from moe_jax.base.files import write_atomically
from moe_jax.base.provenance import provenance
from moe_jax.study.sweep.command import Sweep
from moe_jax.study.sweep.trials import completed, finished, folder, front


def value_text(value: Any) -> str:
    """A searched value, short enough for a line."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def values_text(values: Iterable[float]) -> str:
    """The objectives of a trial."""
    return ", ".join(f"{value:.5g}" for value in values)


def write_table(study: Any, sweep: Sweep) -> None:
    """DIR/trials.csv: a row for each finished trial."""
    fields = [field for axis in sweep.axes for field in axis.field.split("+")]
    names = [objective.name for objective in sweep.objectives]
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["folder", "state", *names, *fields, "trial_seconds", "error"])
    for t in finished(study):
        seconds = round(t.duration.total_seconds(), 1)
        params = [v for a in sweep.axes for v in a.assignments(t.params[a.field]).values()]
        values = t.values if t.state.name == "COMPLETE" else [None] * len(names)
        error = t.user_attrs.get("error")
        rows.writerow([folder(t), t.state.name.lower(), *values, *params, seconds, error])
    write_atomically(sweep.out / "trials.csv", table.getvalue())


def summarise(study: Any, sweep: Sweep) -> dict[str, Any]:
    """The sweep's result.json, in the form of moe_jax.base.result.

    The environment is the best trial's. The sweep itself measures nothing, and never starts JAX,
    which would take a GPU's memory away from the trials.
    """
    trials = completed(study, sweep)
    best = front(study, sweep)
    failed = len(finished(study)) - len(trials)
    units = best[0].user_attrs.get("units", [""] * len(sweep.objectives))
    wanted = " and ".join(
        f"the {'highest' if o.maximise else 'lowest'} {o.name}" for o in sweep.objectives
    )
    return {
        "experiment": f"sweep {sweep.name}",
        "question": f"Which {', '.join(a.field for a in sweep.axes)} gives {wanted}?",
        **provenance(),
        "config": asdict(sweep.config)
        | {
            "identity": sweep.identity,
            "best": best[0].params,
            "front": [{"params": t.params, "values": t.values} for t in best],
        },
        "environment": best[0].user_attrs.get("environment"),
        "measurements": [
            *(
                measurement
                for place, unit in enumerate(units)
                for measurement in _measure(trials, sweep, place, unit)
            ),
            {"name": "trials_with_a_value", "value": len(trials), "unit": "trials"},
            {"name": "trials_without_a_value", "value": failed, "unit": "trials"},
        ],
        "verdict": _verdict(trials, best, sweep, units)
        + f", and {failed} more trials gave no value. One seed: repeat before trusting it.",
    }


def _measure(trials: list[Any], sweep: Sweep, place: int, unit: str) -> list[dict[str, Any]]:
    """The best value and the median of one objective."""
    objective = sweep.objectives[place]
    values = [trial.values[place] for trial in trials]
    best = max(values) if objective.maximise else min(values)
    median = statistics.median(values)
    return [
        {
            "name": f"best_{objective.name}",
            "value": best,
            "unit": unit,
            "baseline": "median of the trials",
            "ratio": best / median if median else None,
            "seeds": [sweep.config.seed],
        },
        {"name": f"median_{objective.name}", "value": median, "unit": unit},
    ]


def _verdict(trials: list[Any], best: list[Any], sweep: Sweep, units: list[str]) -> str:
    if len(units) > 1:
        return f"{len(best)} of {len(trials)} trials are on the Pareto front"
    params = ", ".join(f"{name}={value_text(value)}" for name, value in best[0].params.items())
    median = statistics.median([trial.value for trial in trials])
    order = "highest" if sweep.objectives[0].maximise else "lowest"
    return (
        f"{params} gave {best[0].value:.5g} {units[0]}, the {order} of {len(trials)} trials. "
        f"The median is {median:.5g}"
    )


def best_commands(study: Any, sweep: Sweep) -> list[str]:
    """The command line of the best trial, or of every trial on the Pareto front."""
    return [sweep.command_line(trial.params) for trial in front(study, sweep)]
