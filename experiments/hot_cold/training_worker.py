"""One training run of training_capacity.py, in a process of its own so that its peak is its own."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.base.errors import UserError
from moe_jax.cli import program
from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    PlacementConfig,
    TrainConfig,
)
from moe_jax.train.engines.tiered.engine import TieredEngine, open_experts
from moe_jax.train.engines.tiered.rows import row_shapes
from moe_jax.train.engines.tiered.step import TieredStep
from moe_jax.train.engines.tiered.trunk import init_trunk
from moe_jax.train.state import init_state
from moe_jax.train.step import make_step

SHARE = 0.25
"""The device budget as a part of the experts' parameters and moments."""
WARM_UP = 2
"""Updates before the timed ones."""

Kind = Literal["resident", "tiers", "blocking"]
"""All experts resident, tiers, and tiers in which every read and write is waited for."""


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
    """Timed ones in a round."""


@dataclass(frozen=True)
class Job:
    """One run, as the parent process asks for it."""

    size: Size
    seed: int
    folder: str
    """Where the experts on disk are."""
    direct: bool
    """Whether they are read and written around the page cache."""
    kind: Kind

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The inverse of json.dumps(asdict(job))."""
        fields = json.loads(text)
        return cls(**{**fields, "size": Size(**fields["size"])})


def make_config(job: Job) -> TrainConfig:
    """The run. Experts dominate: attention is narrow, the vocabulary small, none is shared."""
    size = job.size
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
        out=job.folder,
        seed=job.seed,
        steps=1000,
        batch=size.batch,
        model=model,
        data=DataConfig(tokenizer="bytes", length=128),
        optim=OptimConfig(learning_rate=1e-3),
    )
    config = config.resolved()
    if job.kind == "resident":
        return config
    placement = PlacementConfig(
        device_budget=f"{round(SHARE * expert_bytes(config))}",
        direct=job.direct,
        folder=str(Path(job.folder) / "training-experts"),
    )
    return replace(config, placement=placement)


def expert_bytes(config: TrainConfig) -> int:
    """Parameters and moments of all routed experts."""
    shapes = row_shapes(config)
    one = shapes.record_bytes - shapes.parameter_bytes  # without the gradient
    return one * config.model.moe_layers * config.model.moe.experts


def process_memory(name: Literal["VmHWM", "VmRSS"]) -> int:
    """Largest (VmHWM) or present (VmRSS) resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024  # the kernel counts in KiB
    raise UserError("the peak of a process's memory is read from /proc: this needs Linux")


def make_batch(config: TrainConfig, index: int) -> dict[str, jax.Array]:
    """Random tokens, one document a sequence: int32[B, L + 1] each."""
    rng = np.random.default_rng([config.seed, index])
    shape = (config.batch, config.data.length + 1)
    tokens = jnp.asarray(rng.integers(0, 256, shape), jnp.int32)
    return {"tokens": tokens, "segments": jnp.ones_like(tokens)}


class Prepared(NamedTuple):
    """A run before its first update."""

    state: Any
    step: Callable[..., Any]
    """(state, batch) -> (state, metrics)"""
    traffic: Callable[[], dict[str, Any]]
    """What the last update moved, and when. Empty where nothing moves."""


def prepare(config: TrainConfig, blocking: bool) -> Prepared:
    """State and update function, all resident or with tiers."""
    if not config.placement.tiered:
        step = jax.jit(make_step(config), donate_argnums=0)
        return Prepared(jax.jit(init_state, static_argnums=0)(config), step, dict)
    TieredEngine(config).check()
    experts = open_experts(config, Path(config.out), None, 0)
    experts.threads.blocking = blocking
    tiered = TieredStep(config, experts)
    state = jax.jit(init_trunk, static_argnums=0)(config)
    return Prepared(
        state, tiered, lambda: {**next(iter(tiered.lines.values())), "spans": experts.spans}
    )


def train(job: Job) -> dict[str, Any]:
    """The run: its memory, seconds an update, losses, and the last update's traffic."""
    config = make_config(job)
    # Starts JAX and its threads, which the memory before the state must include.
    jax.block_until_ready(jax.jit(jnp.matmul)(jnp.ones((512, 512)), jnp.ones((512, 512))))
    before = process_memory("VmRSS")
    state, step, traffic = prepare(config, job.kind == "blocking")
    losses = []
    seconds = []
    for index in range(WARM_UP + job.size.updates):
        batch = make_batch(config, index)
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
    return {
        "before": before,
        "peak": process_memory("VmHWM"),
        "seconds": seconds[WARM_UP:],
        "losses": losses,
        "traffic": traffic(),
    }


def run_worker(job: Job, compiled: Path) -> dict[str, Any]:
    """`train` in a new process. `compiled`: the compilation cache that all of them share."""
    # Huge pages would round the resident size of every buffer up.
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment = {
        **kept,
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Freed arrays go back to the system: the peak is what is in use, not what malloc keeps.
        "MALLOC_MMAP_THRESHOLD_": "262144",
        "MALLOC_TRIM_THRESHOLD_": "262144",
        "MALLOC_ARENA_MAX": "2",
    }
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(asdict(job))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"a run of training_capacity.py failed: {last.removeprefix('error: ')}")
    # The result is the last line: libraries may print before it.
    return json.loads(lines[-1])


def direct_works(folder: Path) -> bool:
    """Whether the file system offers O_DIRECT."""
    flag = getattr(os, "O_DIRECT", None)  # macOS has none
    if flag is None:
        return False
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_RDWR | flag))
        except OSError:
            return False
    return True


def main(argv: list[str]) -> None:
    """Trains the job that the one argument describes, and prints the result as a line of JSON."""
    print(json.dumps(train(Job.from_json(argv[0]))))


if __name__ == "__main__":
    program(main)
