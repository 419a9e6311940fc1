"""How much more even is the load of devices when hot experts have replicas, on our own traces?

    python experiments/expert_balance.py [--out DIR] [--quick] [--run DIR] [--trace FILE]

Trains a small model with DeepSeek-V3's balance on code, prose and tables, and records the routing
of held-out text whose domain changes now and then. The trace is cut into windows. Experts are
placed on devices by the loads of one window (moe_jax/placement/eplb.py), and the next window is
counted. A second replay has the trace's sequences in a random order, as a training batch mixes
documents. The numbers are loads, not times: nothing runs on several devices. `--run` takes the
model of another training run, and `--trace` a recorded trace.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from matplotlib.figure import Figure

from moe_jax.base.paths import user_path
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import override, parse_settings, program
from moe_jax.config import TrainConfig, require
from moe_jax.config.presets import TINY
from moe_jax.placement.public_traces import open_trace
from moe_jax.placement.trace import Trace, read_trace
from moe_jax.runs.inspect import record_routing
from moe_jax.runs.load import Trained, load_run
from moe_jax.runs.run import run_training
from moe_jax.study.domains import DOMAINS, held_out_texts, write_corpus
from moe_jax.study.expert_balance import (
    BalanceReplay,
    Devices,
    mixed,
    replay_balance,
    window_loads,
)
from moe_jax.study.results import publish

QUESTION = "How much more even is the load of devices when hot experts have replicas?"
UNIT = "highest / mean load of the devices"
BEFORE = "eplb_load_before"
SEQUENCE = 128
"""Tokens that stay together where the trace is mixed."""
LINES = {
    "before": "in order, no replicas",
    "packed": "placed by the window before, no replicas",
    "once": "placed by the first window, replicas",
    "bounded": "few copies a window, replicas",
    "after": "placed by the window before, replicas",
    "hindsight": "placed by the window itself, replicas",
}
"""Fields of a BalanceReplay, in words."""


@dataclass(frozen=True)
class Settings:
    """Places the experts of a trace on devices by their loads."""

    out: str = "runs/expert_balance"
    """Folder for result.json, the trace, the plot and the trained model."""
    seed: int = 0
    """Seed of the model."""
    quick: bool = False
    """Fewer steps and a shorter trace."""
    trace: str = ""
    """A recorded trace, ours or in a format of placement/public_traces.py. Unset, one is recorded
    here."""
    run: str = ""
    """The --out of a training run, finished or stopped, whose routing is recorded. Unset, a small
    model is trained here."""
    devices: int = 8
    """Devices over which experts are placed. They must divide the experts."""
    nodes: int = 1
    """Nodes over which the devices are spread."""
    groups: int = 1
    """Groups of experts. A group stays on one node if the nodes divide the groups."""
    spare: int = 1
    """Slots of a device for replicas, besides its share of the experts."""
    window: int = 1024
    """Tokens between two placements. A quarter of it with --quick."""
    most_copies: int = 2
    """Copies of a layer in a window, for the bounded plan."""

    def __post_init__(self) -> None:
        least = {"devices": 1, "nodes": 1, "groups": 1, "window": 4, "spare": 0, "most_copies": 0}
        for name, low in least.items():
            value = getattr(self, name)
            require(value >= low, f"{name} is {value}: it must be at least {low}")
        require(not (self.trace and self.run), "give --trace or --run, not both")


def model_config(out: Path, settings: Settings) -> TrainConfig:
    """`tiny` with 32 experts, 4 a token."""
    steps = "20" if settings.quick else "300"
    config = override(
        TINY,
        {
            "model.moe.experts": "32",
            "model.moe.experts_per_token": "4",
            "data.tokenizer": "bpe:2048",
            "data.validation_tokens": "5000",
            "steps": steps,
            "evaluate_every": steps,
            "checkpoint.every": "50",
            "samples": "0",
        },
    )
    data = replace(config.data, source=f"files:{out}/corpus/*/*.txt", cache=str(out / "cache"))
    folder = out / f"model-{settings.seed}{'-quick' * settings.quick}"
    return replace(config, data=data, seed=settings.seed, out=str(folder))


def trained_model(out: Path, settings: Settings) -> Trained:
    """The model, trained now or before. A killed training continues from its checkpoint."""
    config = model_config(out, settings)
    if not (Path(config.out) / "result.json").exists():  # written when a run is complete
        write_corpus(out)
        run_training(config)
    return load_run(config.out)


def recorded_trace(settings: Settings, out: Path) -> Trace:
    """The trace that the settings name, or one of held-out text through a model."""
    if settings.trace:
        return open_trace(user_path(settings.trace))
    run = load_run(settings.run) if settings.run else trained_model(out, settings)
    write_corpus(out)  # nothing where it is there
    stretch = 2_000 if settings.quick else 8_000
    texts = held_out_texts(out, stretch, 6 * stretch if settings.quick else 15 * stretch)
    path = out / "routing.trace"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        recorded = Path(folder) / path.name
        record_routing(run, texts, recorded, domains=DOMAINS)
        recorded.replace(path)  # an earlier trace goes only when there is a new one
    return read_trace(path)


def load_rows(replay: BalanceReplay, prefix: str, seed: int) -> list[Measurement]:
    """Means over windows and layers."""
    baseline = f"{prefix}before"
    before = float(replay.before.mean())
    rows = []
    for field in LINES:
        value = float(getattr(replay, field).mean())
        name = f"{prefix}{field}"
        rows.append(Measurement(name, value, UNIT, baseline, value / before, [seed]))
    return rows


def measurements(
    replay: BalanceReplay, mixture: BalanceReplay, slots: float, seed: int
) -> list[Measurement]:
    """The trace in its own order and mixed, the worst window, and the price."""
    worst = [float(values.max()) for values in (replay.before, replay.after)]
    return [
        *load_rows(replay, "eplb_load_", seed),
        *load_rows(mixture, "eplb_mixed_", seed),
        Measurement("eplb_worst_before", worst[0], UNIT, seeds=[seed]),
        Measurement(
            "eplb_worst_after", worst[1], UNIT, "eplb_worst_before", worst[1] / worst[0], [seed]
        ),
        Measurement(
            "eplb_copies", mean_copies(mixture.copies), "copies a layer and window (mixed)"
        ),
        Measurement(
            "eplb_bounded_copies",
            mean_copies(mixture.bounded_copies),
            "copies a layer and window (mixed)",
        ),
        Measurement("eplb_slots", slots, "slots an expert"),
        Measurement("windows", len(replay.before), "windows"),
    ]


def mean_copies(copies: np.ndarray) -> float:
    """The mean, or 0 where a trace is so short that there is only one placement."""
    return float(copies.mean()) if copies.size else 0.0


def verdict(values: Mapping[str, float | int | None]) -> str:
    """The answer, in sentences."""
    slots = values["eplb_slots"]
    return (
        f"In the order of the text, the device with the most load has {values[BEFORE]:.2f} times "
        f"the mean. Placed by the window before, in {slots:.2f} slots an expert, it has "
        f"{values['eplb_load_after']:.2f}, and knowing the loads beforehand would give "
        f"{values['eplb_load_hindsight']:.2f}. With documents mixed as in a batch it is "
        f"{values['eplb_mixed_before']:.2f} before and {values['eplb_mixed_after']:.2f} after, or "
        f"{values['eplb_mixed_bounded']:.2f} by {values['eplb_bounded_copies']:.1f} copies a layer "
        f"instead of {values['eplb_copies']:.1f}."
    )


def draw(replay: BalanceReplay, window: int) -> Figure:
    """The mean over layers, window by window."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for index, (field, label) in enumerate(LINES.items()):
        values = getattr(replay, field).mean(-1)
        style = ":" if field == "hindsight" else "-"
        axes.plot(
            range(1, len(values) + 1), values, style, marker=".", color=f"C{index}", label=label
        )
    axes.set_xlabel(f"window of {window} tokens")
    axes.set_ylabel("highest / mean load of the devices")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Load of devices, mean over layers")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def main(argv: list[str]) -> None:
    """Records, places, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    trace = recorded_trace(settings, out)
    window = settings.window // 4 if settings.quick else settings.window
    on = Devices(settings.devices, settings.nodes, settings.groups, settings.spare)
    most = settings.most_copies
    replay = replay_balance(window_loads(trace, window), on, most)
    whole = mixed(trace, SEQUENCE, settings.seed)
    mixture = replay_balance(window_loads(whole, window), on, most)
    slots = 1 + on.spare * on.devices / trace.experts
    rows = measurements(replay, mixture, slots, settings.seed)
    publish(
        out,
        experiment="expert_balance",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict({m.name: m.value for m in rows}),
        figures={"balance": draw(replay, window)},
    )


if __name__ == "__main__":
    program(main)
