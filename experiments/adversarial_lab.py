"""What the parts of lever_adversarial share: text, models, training, and runs that are kept.

Everything is bytes: a token is a byte, a window is LENGTH of them, a document is WINDOWS windows. A
training run takes seconds and is the unit of resuming: its numbers are a file in DIR/runs.
"""

import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from placement_model import DOMAINS, LIMIT, write_corpus
from scipy import stats

from moe_jax.base.files import write_atomically
from moe_jax.base.result import Measurement
from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)
from moe_jax.distill.teacher import split_model
from moe_jax.model.count import train_flops_per_token
from moe_jax.objectives.adversarial import State, sequence_nats, states
from moe_jax.objectives.next_token import Batch, losses
from moe_jax.train.step import Objective, TrainState, init_state, make_step

LENGTH, WINDOWS, BATCH = 64, 8, 16
DOCUMENT = LENGTH * WINDOWS + 1
SHARES = {"code": 0.5, "prose": 0.3, "tables": 0.2}
"""The mixture of real domains."""
VOCABULARY = 258
"""Bytes and the two specials of the bytes tokenizer."""


@dataclass(frozen=True)
class Scale:
    """How much work a run does; see FULL and QUICK."""

    seeds: tuple[int, ...]
    teacher_width: int
    teacher_steps: int
    held_out: int
    """Held-out documents of each domain."""
    pool: int
    """Documents of a pool (data)."""
    data_steps: int
    perturb_steps: int
    teacher_text: int
    """Continuations that the teacher writes (generative)."""
    warm_steps: int
    """Steps of sequence-level distillation that all generative arms share."""
    rounds: int
    """Updates of the generative adversary; the other arms get the same FLOPs."""
    samples: int
    """Continuations sampled to judge a student at a temperature."""
    beyond_documents: int
    beyond_steps: int
    """Updates of one plain run (N), in units of which beyond-the-teacher is counted."""


FULL = Scale(
    seeds=(0, 1, 2, 3, 4),
    teacher_width=128,
    teacher_steps=1500,
    held_out=20,
    pool=800,
    data_steps=250,
    perturb_steps=200,
    teacher_text=4096,
    warm_steps=400,
    rounds=60,
    samples=128,
    beyond_documents=160,
    beyond_steps=240,
)
QUICK = replace(
    FULL,
    seeds=(0,),
    teacher_width=64,
    teacher_steps=20,
    held_out=2,
    pool=80,
    data_steps=3,
    perturb_steps=3,
    teacher_text=64,
    warm_steps=4,
    rounds=2,
    samples=8,
    beyond_documents=8,
    beyond_steps=6,
)


def student_config(**changes: Any) -> ModelConfig:
    """0.14M parameters: a dense block, then one of 4 experts, 2 of them a token."""
    model = ModelConfig(
        vocabulary=VOCABULARY,
        width=64,
        layers=2,
        dense_layers=1,
        dense_hidden=192,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=16),
        moe=MoEConfig(experts=4, experts_per_token=2, expert_hidden=64, bias_rate=0.01),
        init_std=0.06,
        unroll=2,
    )
    return replace(model, **changes)


def teacher_config(width: int) -> ModelConfig:
    """A dense model, 0.43M parameters at width 128: pre-trained and not advanced."""
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=width // 4)
    return student_config(
        width=width, dense_layers=2, dense_hidden=3 * width, attention=attention, init_std=0.05
    )


def run_config(model: ModelConfig, steps: int, seed: int = 0, **optim: Any) -> TrainConfig:
    """AdamW, warm-up and cosine over exactly `steps`."""
    usual = OptimConfig(learning_rate=6e-3, weight_decay=0.1, final=0.05)
    chosen = replace(usual, **optim)
    data = DataConfig(tokenizer="bytes", length=LENGTH)
    return TrainConfig(steps=steps, batch=BATCH, seed=seed, model=model, data=data, optim=chosen)


def batch_of(windows: np.ndarray) -> Batch:
    """Windows int[B, LENGTH + 1] as a batch; each is one document."""
    tokens = jnp.asarray(windows, jnp.int32)
    return {"tokens": tokens, "segments": jnp.ones_like(tokens)}


def windows_of(documents: Sequence[bytes]) -> np.ndarray:
    """uint8[documents · WINDOWS, LENGTH + 1], neighbours sharing a byte."""
    data = np.frombuffer(b"".join(documents), np.uint8).reshape(len(documents), DOCUMENT)
    starts = range(0, LENGTH * WINDOWS, LENGTH)
    parts = [data[:, s : s + LENGTH + 1] for s in starts]
    return np.stack(parts, axis=1).reshape(-1, LENGTH + 1)


def shuffled_batches(windows: np.ndarray, seed: int, rows: int = BATCH) -> Iterator[np.ndarray]:
    """Endless rows of windows, every window once an epoch."""
    rng, queue = np.random.default_rng(seed), np.zeros(0, int)
    while True:
        while len(queue) < rows:
            queue = np.concatenate([queue, rng.permutation(len(windows))])
        yield windows[queue[:rows]]
        queue = queue[rows:]


class Text:
    """Documents of the real domains, for the teacher, for seeds and for pools; and held-out ones
    from other files (placement_model.write_corpus)."""

    def __init__(self, folder: Path) -> None:
        write_corpus(folder)
        self._parts = {d: _documents(folder / "corpus" / d) for d in DOMAINS}
        self._held = {d: _cut((folder / "held-out" / f"{d}.txt").read_bytes()) for d in DOMAINS}

    def draw(self, role: str, count: int, seed: int) -> tuple[list[bytes], np.ndarray]:
        """(documents in the mixture SHARES, their domains), `role` teacher, seed or pool: no two
        roles share a document, and all are alike, as every fifth document goes to a role; or
        stretch, a seed from the first fifth of each domain."""
        places = {"teacher": (0, 2), "seed": (4,), "stretch": (4,), "pool": (1, 3)}[role]
        rng = np.random.default_rng([seed, len(role)])
        until = 0.2 if role == "stretch" else 1.0
        found: list[bytes] = []
        domain: list[int] = []
        for index, name in enumerate(DOMAINS):
            part = self._parts[name][: int(until * len(self._parts[name]))]
            part = [d for i, d in enumerate(part) if i % 5 in places]
            wanted = min(round(SHARES[name] * count), len(part))
            found += [part[i] for i in rng.permutation(len(part))[:wanted]]
            domain += [index] * wanted
        return found, np.array(domain)

    def held_out(self, count: int) -> dict[str, np.ndarray]:
        """The windows of the first documents of each domain."""
        return {d: windows_of(self._held[d][:count]) for d in DOMAINS}


def _documents(folder: Path) -> list[bytes]:
    texts = (path.read_bytes() for path in sorted(folder.glob("*.txt")))
    return _cut(b"\n".join(texts)[:LIMIT])


def _cut(data: bytes) -> list[bytes]:
    return [data[i : i + DOCUMENT] for i in range(0, len(data) - DOCUMENT + 1, DOCUMENT)]


class Found(NamedTuple):
    """The mean over seeds of a paired difference, with its 95% interval (Student's t)."""

    mean: float
    low: float
    high: float

    def excludes(self, value: float = 0.0) -> bool:
        """Whether the interval lies on one side of a value."""
        return self.low > value or self.high < value

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def over_seeds(values: Sequence[float]) -> Found:
    """Mean and 95% interval of one value a seed."""
    array = np.asarray(values, float)
    mean = float(array.mean())
    if len(array) < 2:
        return Found(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.975, len(array) - 1) * stats.sem(array))
    return Found(mean, mean - half, mean + half)


@dataclass
class Lab:
    """One experiment's folder, text and teacher, and what it has compiled."""

    out: Path
    scale: Scale
    done: int = 0
    began: float = field(default_factory=time.perf_counter)
    _steps: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    _starts: dict[Any, TrainState] = field(default_factory=dict)

    @cached_property
    def text(self) -> Text:
        return Text(self.out)

    @cached_property
    def key(self) -> str:
        """Hash of the settings: runs of other settings are other files."""
        return hashlib.blake2b(repr(self.scale).encode(), digest_size=4).hexdigest()

    def once(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What `compute` returns, from DIR/runs where an earlier call has finished it."""
        path = self.out / "runs" / f"{self.key}-{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        begin = time.perf_counter()
        found = dict(compute())
        write_atomically(path, json.dumps(found) + "\n")
        self.done += 1
        shown = "  ".join(f"{k} {v:.3f}" for k, v in found.items() if isinstance(v, float))
        now = time.perf_counter()
        print(
            f"{now - self.began:6.0f} s  {name:34} {now - begin:5.1f} s  {shown[:90]}", flush=True
        )
        return found

    def kept(self, name: str, model: ModelConfig, build: Callable[[], State]) -> State:
        """A model's (parameters, router), from DIR/runs where an earlier call has trained it."""
        path = self.out / "runs" / f"{self.key}-{name}.npz"
        like = split_model(model)[1:]
        if path.exists():
            with np.load(path) as arrays:
                leaves = [jnp.asarray(arrays[f"a{i}"]) for i in range(len(arrays))]
        else:
            leaves = jax.tree.leaves(build())
            content = io.BytesIO()
            np.savez(content, **{f"a{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)})  # pyright: ignore
            write_atomically(path, content.getvalue())
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def start(self, model: ModelConfig, seed: int) -> TrainState:
        """A fresh state; the same for all arms of a seed."""
        same = replace(model, dropout=0.0)
        if (same, seed) not in self._starts:
            config = run_config(same, 1, seed)
            self._starts[same, seed] = jax.jit(lambda: init_state(config))()
        return self._starts[same, seed]

    def compiled(self, name: Any, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """jit of `build()`, once a name."""
        if name not in self._steps:
            self._steps[name] = jax.jit(build())
        return self._steps[name]

    def step(
        self, config: TrainConfig, name: str, objective: Objective = losses
    ) -> Callable[..., tuple[TrainState, Any]]:
        """The update function; `name` stands for the objective."""
        return self.compiled((name, replace(config, seed=0)), lambda: make_step(config, objective))

    def train(
        self,
        config: TrainConfig,
        batches: Iterator[Any],
        name: str = "plain",
        objective: Objective = losses,
        more: Sequence[Any] = (),
        state: TrainState | None = None,
    ) -> TrainState:
        """config.steps updates from `state`, or from the seed's fresh one."""
        step = self.step(config, name, objective)
        state = state or self.start(config.model, config.seed)
        for _ in range(config.steps):
            rows = next(batches)
            batch = rows if isinstance(rows, dict) else batch_of(rows)
            state, _ = step(state, batch, *more)
        return state

    def nats(self, model: ModelConfig, state: State, windows: np.ndarray) -> np.ndarray:
        """Mean nats a byte of each window."""
        graph = split_model(model)[0]

        def build() -> Callable[..., Any]:
            return lambda state, batch: sequence_nats(nnx.merge(graph, *state), batch, LENGTH)

        nats = self.compiled(("nats", replace(model, dropout=0.0)), build)
        rows = 160
        padded = np.concatenate([windows, np.repeat(windows[:1], -len(windows) % rows, axis=0)])
        parts = [nats(state, batch_of(padded[i : i + rows])) for i in range(0, len(padded), rows)]
        return np.concatenate([np.asarray(p) for p in parts])[: len(windows)]

    def bits(self, model: ModelConfig, state: State) -> dict[str, float]:
        """Bits per byte of the held-out text: each domain, and `bits`, the mean of the domains."""
        found = {
            domain: float(self.nats(model, state, windows).mean() / math.log(2))
            for domain, windows in self.held.items()
        }
        return {"bits": float(np.mean(list(found.values()))), **found}

    @cached_property
    def held(self) -> dict[str, np.ndarray]:
        return self.text.held_out(self.scale.held_out)

    @cached_property
    def teacher_model(self) -> ModelConfig:
        return teacher_config(self.scale.teacher_width)

    @cached_property
    def teacher(self) -> State:
        """Trained on the teacher's own clean text, one for all seeds."""

        def build() -> State:
            documents, _ = self.text.draw("teacher", 3000, 0)
            config = run_config(self.teacher_model, self.scale.teacher_steps, learning_rate=3e-3)
            print(f"training the teacher, {config.steps} steps", flush=True)
            return states(self.train(config, shuffled_batches(windows_of(documents), 0)))

        return self.kept("teacher", self.teacher_model, build)

    def teacher_bits(self) -> float:
        """Bits per byte of the teacher on the held-out text."""
        run = self.once("teacher-bits", lambda: self.bits(self.teacher_model, self.teacher))
        return run["bits"]


def flops(model: ModelConfig) -> float:
    """Forward and backward of one window."""
    return train_flops_per_token(model, LENGTH) * LENGTH


Runs = dict[str, list[dict[str, Any]]]
"""For each arm its run of each seed."""


def difference(runs: Runs, one: str, other: str, value: str = "bits") -> Found:
    """Paired over the seeds: one arm's value less another's."""
    pairs = zip(runs[one], runs[other], strict=True)
    return over_seeds([a[value] - b[value] for a, b in pairs])


def measured(
    name: str, found: Found, baseline: str | None, scale: Scale, unit: str = "bits/byte"
) -> Measurement:
    """A mean over seeds as a line of result.json; where one seed gives no interval, without it."""
    interval = [found.low, found.high] if math.isfinite(found.low) else None
    seeds = list(scale.seeds)
    return Measurement(name, found.mean, unit, baseline, seeds=seeds, interval=interval)
