"""Lever 2, training: how many times larger a model trains in the same memory with tiers?

    python experiments/training_capacity.py [--out DIR] [--quick] [--seed N]

Trains one model thrice, each time in a process of its own so that its peak is its own: all resident
(train.step.make_step); with a device budget of a quarter of the experts' state, parameters and
AdamW moments, the working set included, the others on disk, read and written around the page cache
(O_DIRECT); and the same with every read and write waited for before anything else happens, the
control of the asynchronous ones. All recompute activations (model.remat=full), and in all malloc
gives freed arrays back at once (mallopt by environment). Memory is the largest resident size of the
process (VmHWM) less what it held before the state was made. Capacity is bytes of expert state
trained per byte of that memory, and the gain is the ratio of the two capacities. Speeds are medians
over updates, their ratio the median over rounds in which all are run, one after the other. Tokens
are random, so nearly every expert is used in every update: the most traffic that there can be.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

from moe_jax.base.errors import UserError
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, program
from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    PlacementConfig,
    TrainConfig,
)
from moe_jax.train.engines.tiered.engine import check_tiers, open_experts
from moe_jax.train.engines.tiered.rows import row_shapes
from moe_jax.train.engines.tiered.step import TieredStep
from moe_jax.train.engines.tiered.trunk import init_trunk
from moe_jax.train.step import init_state, make_step

QUESTION = "How many times larger a model trains in the same memory with experts in tiers?"
SHARE = 0.25
"""The device budget as a part of the experts' parameters and moments."""


@dataclass(frozen=True)
class Settings:
    """Trains a model all resident and with a quarter of its experts' state resident."""

    out: str = "runs/training-capacity"
    """Folder for result.json and the experts on disk."""
    seed: int = 0
    """Seed of the parameters and tokens."""
    quick: bool = False
    """A smaller model, fewer rounds."""


@dataclass(frozen=True)
class Size:
    """The model and the batch."""

    width: int
    hidden: int
    """Of one expert."""
    layers: int
    experts: int
    batch: int
    """Sequences of 128 tokens."""
    rounds: int
    updates: int
    """Timed ones in a round, after two that warm up."""


FULL = Size(width=256, hidden=256, layers=8, experts=32, batch=8, rounds=3, updates=3)
QUICK = Size(width=128, hidden=96, layers=8, experts=32, batch=4, rounds=1, updates=3)


def config_of(size: Size, seed: int, folder: Path, tiers: bool, direct: bool) -> TrainConfig:
    """The run; its experts dominate: narrow attention, a small vocabulary, no shared expert."""
    moe = MoEConfig(
        experts=size.experts, experts_per_token=4, expert_hidden=size.hidden, shared_experts=0
    )
    model = ModelConfig(
        width=size.width,
        layers=size.layers,
        dense_layers=0,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=32),
        moe=moe,
        remat="full",
    )
    config = TrainConfig(
        out=str(folder),
        seed=seed,
        steps=1000,
        batch=size.batch,
        model=model,
        data=DataConfig(tokenizer="bytes", length=128),
        optim=OptimConfig(learning_rate=1e-3),
    )
    budget = f"{round(SHARE * expert_bytes(config))}"
    placement = PlacementConfig(device_budget=budget, direct=direct, folder=str(folder / "shelf"))
    return replace(config, placement=placement) if tiers else config


def expert_bytes(config: TrainConfig) -> int:
    """Parameters and moments of all routed experts."""
    kinds = row_shapes(config).kinds()
    one = sum(kinds["parameters"]) + sum(kinds["moments"])
    return one * config.model.moe_layers * config.model.moe.experts


def memory(name: str) -> int:
    """Bytes of VmHWM or VmRSS of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise UserError("the peak of a process's memory is read from /proc: this needs Linux")


def make_batch(config: TrainConfig, index: int) -> dict[str, jax.Array]:
    """Random tokens, one document a sequence."""
    rng = np.random.default_rng([config.seed, index])
    shape = (config.batch, config.data.length + 1)
    tokens = jnp.asarray(rng.integers(0, 256, shape), jnp.int32)
    return {"tokens": tokens, "segments": jnp.ones_like(tokens)}


def prepared(
    config: TrainConfig, blocking: bool
) -> tuple[Any, Callable[..., Any], Callable[[], dict[str, Any]]]:
    """(first state, update function, what the last update moved, and when)"""
    if not config.placement.tiered:
        step = jax.jit(make_step(config), donate_argnums=0)
        return jax.jit(init_state, static_argnums=0)(config), step, dict
    check_tiers(config)
    experts = open_experts(config, Path(config.out), None, 0)
    experts.threads.blocking = blocking
    tiered = TieredStep(config, experts)
    state = jax.jit(init_trunk, static_argnums=0)(config)
    return state, tiered, lambda: {**next(iter(tiered.lines.values())), "spans": experts.spans}


def worker(spec: dict[str, Any]) -> dict[str, Any]:
    """One run: its memory, seconds an update, losses, and the last update's traffic."""
    size = Size(**spec["size"])
    tiers, blocking = spec["kind"] != "resident", spec["kind"] == "blocking"
    config = config_of(size, spec["seed"], Path(spec["folder"]), tiers, spec["direct"])
    jax.block_until_ready(jax.jit(jnp.matmul)(jnp.ones((512, 512)), jnp.ones((512, 512))))
    before = memory("VmRSS")
    state, step, moved = prepared(config, blocking)
    losses, seconds = [], []
    for index in range(2 + size.updates):
        batch, begin = make_batch(config, index), time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
    return {
        "before": before,
        "peak": memory("VmHWM"),
        "seconds": seconds[2:],
        "losses": losses,
        "traffic": moved(),
    }


def run_worker(spec: dict[str, Any], cache: Path) -> dict[str, Any]:
    """`worker` in a process of its own; programs are compiled once for all of them."""
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment = {
        **kept,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Freed arrays go back to the system: the peak is what is in use, not what malloc keeps.
        "MALLOC_MMAP_THRESHOLD_": "262144",
        "MALLOC_TRIM_THRESHOLD_": "262144",
        "MALLOC_ARENA_MAX": "2",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(spec)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"a run of training_capacity.py failed: {last.removeprefix('error: ')}")
    return json.loads(lines[-1])


def measure(size: Size, seed: int, out: Path) -> tuple[list[Measurement], str]:
    """Everything: measurements and the verdict. For other experiments as well."""
    spec = {"size": asdict(size), "seed": seed, "folder": str(out), "direct": direct_works(out)}
    kinds = {kind: {**spec, "kind": kind} for kind in ("resident", "tiers", "blocking")}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for own in kinds.values():  # compiles, so that no compiler is in the measured memory
        run_worker({**own, "size": {**own["size"], "updates": 1}}, out / "compiled")
    for _ in track(range(size.rounds), "rounds", disable=not sys.stdout.isatty()):
        for name, own in kinds.items():
            found[name].append(run_worker(own, out / "compiled"))
    (out / "plots").mkdir(exist_ok=True)
    draw(found).savefig(out / "plots" / "training_timeline.png", dpi=120)
    return summarise(size, config_of(size, seed, out, True, spec["direct"]), spec["direct"], found)


def draw(found: dict[str, list[dict[str, Any]]]) -> Figure:
    """The last update: reads, writes, and computation: the update's own between its waits, and
    that of what is about to be written."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, name in zip(panels, ("tiers", "blocking"), strict=True):
        spans = found[name][-1]["traffic"]["spans"]
        first = min(begin for _, begin, _ in spans)
        at = {
            what: [(begin - first, end - begin) for w, begin, end in spans if w == what]
            for what in ("read", "write", "compute", "wait")
        }
        waits = sorted(at.pop("wait"))
        at["compute"] += [(b + n, c - b - n) for (b, n), (c, _) in pairwise(waits)]
        for row, (what, color) in enumerate(zip(at, ("red", "orange", "green"), strict=True)):
            axes.broken_barh(at[what], (row, 0.8), color=f"tab:{color}", lw=0)
        axes.set_yticks([0.4, 1.4, 2.4], [*at])
        axes.set_title({"tiers": "asynchronous"}.get(name, name), fontsize=9)
    panels[-1].set_xlabel("seconds")
    return figure


def direct_works(folder: Path) -> bool:
    """Whether the file system offers O_DIRECT."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return False
    path = folder / ".direct"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | flag))
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def summarise(
    size: Size, config: TrainConfig, direct: bool, found: dict[str, list[dict[str, Any]]]
) -> tuple[list[Measurement], str]:
    """The figures of all rounds."""

    def median(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return float(np.median([value(run) for run in found[name]]))

    state, tokens = expert_bytes(config), size.batch * config.data.length
    peak = {name: median(name, lambda run: run["peak"] - run["before"]) for name in found}
    rate = {name: median(name, lambda run: tokens / np.median(run["seconds"])) for name in found}

    def over(one: str, other: str) -> float:
        """Speed of one over the other's, the median over rounds."""
        pairs = zip(found[one], found[other], strict=True)
        ratios = [np.median(o["seconds"]) / np.median(own["seconds"]) for own, o in pairs]
        return float(np.median(ratios))

    speed, overlap = over("tiers", "resident"), over("tiers", "blocking")
    gain = peak["resident"] / peak["tiers"]
    losses = [found[name][0]["losses"] for name in found]
    apart = np.max(np.ptp(losses, axis=0))
    last = found["tiers"][-1]["traffic"]
    seeds = [config.seed]
    rows = [
        Measurement("train_capacity_gain_at_25", gain, "x", "all resident", gain, seeds=seeds),
        Measurement("train_speed_of_all_resident_at_25", speed, "x", "all resident", speed),
        Measurement("train_async_over_blocking_at_25", overlap, "x", "blocking", overlap),
        Measurement("expert_state_bytes", state, "bytes"),
        Measurement("device_budget_bytes", config.placement.device_bytes, "bytes"),
        Measurement("largest_difference_of_losses", float(apart), "nats/token"),
        Measurement("update_bytes_read", last["disk_read_bytes"], "bytes"),
        Measurement("update_bytes_written", last["disk_written_bytes"], "bytes"),
        Measurement("update_seconds_waited", last["expert_wait_seconds"], "s"),
    ]
    for name in found:
        rows += [
            Measurement(f"{name}_peak_bytes", peak[name], "bytes"),
            Measurement(
                f"{name}_process_bytes_before", median(name, lambda run: run["before"]), "bytes"
            ),
            Measurement(f"{name}_tokens_per_second", rate[name], "tokens/s"),
        ]
    below = "around the page cache" if direct else "through the page cache (no O_DIRECT here)"
    verdict = (
        f"With a device budget of a quarter of the experts' state ({state / 1e6:,.0f} MB) training "
        f"takes {peak['tiers'] / 1e6:,.0f} MB where all resident takes "
        f"{peak['resident'] / 1e6:,.0f} MB: a model {gain:.1f} times as large in the same memory, "
        f"at {speed:.2f} of the speed ({below}, every expert used in every update), which is "
        f"{overlap:.2f} times that with every copy waited for"
    )
    return rows, verdict


def main(argv: list[str]) -> None:
    """Parses, measures, reports."""
    if argv[:1] == ["--worker"]:
        print(json.dumps(worker(json.loads(argv[1]))))
        return
    settings = parse_settings(Settings(), argv, (__doc__ or "").splitlines()[0])
    out = output_folder(settings.out)
    size = QUICK if settings.quick else FULL
    rows, verdict = measure(size, settings.seed, out)
    config = {**asdict(settings), **asdict(size)}
    write_result(
        out,
        experiment="training_capacity",
        question=QUESTION,
        config=config,
        measurements=rows,
        verdict=verdict,
    )
    for row in rows:
        print(f"{row.name:36} {row.value:>14,.4g} {row.unit}")
    print(verdict)


if __name__ == "__main__":
    program(main)
