"""From the runs of training_capacity.py to measurements, a verdict and a timeline."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.hot_cold.training_worker import Job, expert_bytes, make_config
from moe_jax.base.result import Measurement
from moe_jax.study.rounds import speedup

Runs = dict[str, list[dict[str, Any]]]
"""What training_worker.train returned, by kind, a run a round."""


def median(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """The median over rounds of a value of a run."""
    return float(np.median([value(run) for run in runs]))


def used_bytes(run: dict[str, Any]) -> float:
    """Peak of the process, less what it had before the state was made."""
    return run["peak"] - run["before"]


def update_seconds(runs: list[dict[str, Any]]) -> list[float]:
    """The median update of every round."""
    return [float(np.median(run["seconds"])) for run in runs]


def summarise(job: Job, runs: Runs) -> list[Measurement]:
    """The measurements of all rounds. `job` is the one of the kind `tiers`."""
    config = make_config(job)
    seconds = {kind: update_seconds(runs[kind]) for kind in runs}
    peak = {kind: median(runs[kind], used_bytes) for kind in runs}
    gain = peak["resident"] / peak["tiers"]
    speed = speedup(seconds["tiers"], seconds["resident"])
    overlap = speedup(seconds["tiers"], seconds["blocking"])
    # Over kinds, at each update: they should train the same model.
    losses = [runs[kind][0]["losses"] for kind in runs]
    difference = float(np.max(np.ptp(losses, axis=0)))
    last = runs["tiers"][-1]["traffic"]
    rows = [
        Measurement("train_capacity_gain_at_25", gain, "x", "all resident", gain, [job.seed]),
        Measurement("train_speed_of_all_resident_at_25", speed, "x", "all resident", speed),
        Measurement("train_async_over_blocking_at_25", overlap, "x", "blocking", overlap),
        Measurement("expert_state_bytes", expert_bytes(config), "bytes"),
        Measurement("device_budget_bytes", config.placement.device_bytes, "bytes"),
        Measurement("largest_difference_of_losses", difference, "nats/token"),
        Measurement("update_bytes_read", last["disk_read_bytes"], "bytes"),
        Measurement("update_bytes_written", last["disk_written_bytes"], "bytes"),
        Measurement("update_seconds_waited", last["expert_wait_seconds"], "s"),
    ]
    tokens = job.size.batch * config.data.length
    for kind in runs:
        before = median(runs[kind], lambda run: run["before"])
        rate = float(np.median(tokens / np.asarray(seconds[kind])))
        rows += [
            Measurement(f"{kind}_peak_bytes", peak[kind], "bytes"),
            Measurement(f"{kind}_process_bytes_before", before, "bytes"),
            Measurement(f"{kind}_tokens_per_second", rate, "tokens/s"),
        ]
    return rows


def training_verdict(measurements: list[Measurement], direct: bool) -> str:
    """The answer, in sentences."""
    values = {m.name: float(m.value or 0) for m in measurements}
    path = "around the page cache" if direct else "through the page cache (no O_DIRECT here)"
    return (
        "The device budget is a quarter of the experts' state "
        f"({values['expert_state_bytes'] / 1e6:,.0f} MB). With it, training takes "
        f"{values['tiers_peak_bytes'] / 1e6:,.0f} MB where all resident takes "
        f"{values['resident_peak_bytes'] / 1e6:,.0f} MB: a model "
        f"{values['train_capacity_gain_at_25']:.1f} times as large in the same memory. It trains "
        f"at {values['train_speed_of_all_resident_at_25']:.2f} of the speed, which is "
        f"{values['train_async_over_blocking_at_25']:.2f} times that with every copy waited for. "
        f"Experts are read and written {path}, and every expert is used in every update."
    )


def draw_timeline(runs: Runs) -> Figure:
    """Reads, writes and computation in the last update, asynchronous and blocking."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, kind in zip(panels, ("tiers", "blocking"), strict=True):
        draw_spans(axes, runs[kind][-1]["traffic"]["spans"])
        title = {"tiers": "asynchronous copies", "blocking": "every copy waited for"}[kind]
        axes.set_title(title, fontsize=9)
    panels[-1].set_xlabel("seconds")
    return figure


def draw_spans(axes: Axes, spans: list[tuple[str, float, float]]) -> None:
    """A row for each kind of span: (what, begin, end).

    The recorded spans of computation are those of experts that are about to be written. The
    update's own computation is the time between its waits.
    """
    first = min(begin for _, begin, _ in spans)
    rows = {
        what: [(begin - first, end - begin) for w, begin, end in spans if w == what]
        for what in ("read", "write", "compute", "wait")
    }
    waits = sorted(rows.pop("wait"))
    for (begin, length), (next_begin, _) in pairwise(waits):
        rows["compute"].append((begin + length, next_begin - begin - length))
    for row, (what, color) in enumerate(zip(rows, ("red", "orange", "green"), strict=True)):
        axes.broken_barh(rows[what], (row, 0.8), color=f"tab:{color}", lw=0)
    axes.set_yticks([0.4, 1.4, 2.4], list(rows))
