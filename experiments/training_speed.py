"""How fast is the training step, measured against the machine's own GEMM, and where does time go?

    python experiments/training_speed.py [--preset tiny] [--out DIR] [--quick]

Times the whole step, and each of its parts alone (gradient of the part at the step's own shapes),
beside the time that a plain GEMM of the same machine would take for the part's useful FLOPs. Then
it starts `train.py` from a warm token cache to time the way to the first update, and, paired with
it, once without huge pages (moe_jax/base/startup.py) and once with the reference dispatch.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track

from moe_jax.base.machine import gemm_rate
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, preset, program
from moe_jax.config import ModelConfig, TrainConfig
from moe_jax.config.presets import PRESETS
from moe_jax.model.attention import document_context
from moe_jax.model.count import train_flops_per_token
from moe_jax.model.transformer import Transformer
from moe_jax.objectives.next_token import token_nats
from moe_jax.train.metrics import read_lines
from moe_jax.train.step import init_state, make_step

QUESTION = "How fast is the training step, and where does the time go?"


@dataclass(frozen=True)
class Settings:
    """Times the training step of a preset."""

    preset: str = "tiny"
    """Preset whose step is timed."""
    out: str = "runs/training-speed"
    """Folder for result.json and plots."""
    seed: int = 0
    """Seed of the parameters and tokens."""
    repeats: int = 15
    """Timed calls of each part; the median counts."""
    quick: bool = False
    """Fewer repeats, and each kind of run once."""


@dataclass(frozen=True)
class Part:
    """A part of the step: how often it runs, its time, and the time its FLOPs need at GEMM rate."""

    name: str
    count: int
    seconds: float
    ideal: float


def median_seconds(function: Callable, *arguments: object, repeats: int) -> float:
    """Median wall time of a jitted call, after a first one that compiles."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def make_batch(config: TrainConfig) -> dict[str, jax.Array]:
    """Random tokens in one document a sequence."""
    length = config.data.length + 1 + config.model.mtp_depth
    key = jax.random.key(config.seed)
    tokens = jax.random.randint(key, (config.batch, length), 0, config.data.vocabulary)
    return {"tokens": tokens, "segments": jnp.ones_like(tokens)}


def step_seconds(config: TrainConfig, repeats: int) -> tuple[float, float]:
    """(compilation, median update) of the whole step."""
    state, batch = jax.jit(lambda: init_state(config))(), make_batch(config)
    start = time.perf_counter()
    step = jax.jit(make_step(config)).lower(state, batch).compile()
    compiled = time.perf_counter() - start
    return compiled, median_seconds(step, state, batch, repeats=repeats)


def part_seconds(config: TrainConfig, rate: float, repeats: int) -> list[Part]:
    """Forward and backward of each part alone, at the shapes of one update."""
    model_config = config.resolved_model()
    model = Transformer(model_config, rngs=nnx.Rngs(config.seed))
    batch, length = make_batch(config), config.data.length
    tokens, segments = batch["tokens"][:, :length], batch["segments"][:, :length]
    attention = document_context(model_config, segments)
    x = model.embed(tokens)
    graph, stacked = nnx.split(model.sparse.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], stacked))
    layers, sparse = model_config.layers, model_config.moe_layers
    sides = {
        "attention": (block.attention, lambda part, x: part(x, attention)[0], layers),
        "routed experts": (block.moe, lambda part, x: part(x)[0], sparse),
        "shared expert": (block.feed_forward, lambda part, x: part(x), sparse),
        "norms": (block.attention_norm, lambda part, x: part(x), 2 * layers),
    }
    flops = part_flops(model_config, length)
    found = []
    for name, (module, call, count) in track(sides.items(), "parts"):
        graph, *states = nnx.split(module, nnx.Param, ...)

        def total(parameters, x, graph=graph, rest=states[1:], call=call):
            return (call(nnx.merge(graph, parameters, *rest), x) * x).sum()

        seconds = median_seconds(jax.jit(jax.grad(total, (0, 1))), states[0], x, repeats=repeats)
        found.append(Part(name, count, seconds, flops[name] * tokens.size / rate))

    def head(table, x):
        logits = jnp.einsum("bld,vd->blv", x, table)
        return token_nats(logits, tokens, segments > 0)

    table = model.embedding[...]
    seconds = median_seconds(jax.jit(jax.grad(head, (0, 1))), table, x, repeats=repeats)
    found.append(Part("head and loss", 1, seconds, 6 * table.size * tokens.size / rate))
    return found


def part_flops(config: ModelConfig, length: int) -> dict[str, float]:
    """Useful FLOPs of one layer's part for one token, forward and backward."""
    one = replace(config, layers=2, dense_layers=1)
    moe = config.moe
    expert = 18.0 * config.width * moe.expert_hidden
    ffn = 18.0 * config.width * config.dense_hidden
    base = replace(one, dense_layers=2)
    dense = train_flops_per_token(base, length) - train_flops_per_token(
        replace(base, layers=1, dense_layers=1), length
    )
    return {
        "attention": dense - ffn,
        "routed experts": expert * moe.experts_per_token + 6.0 * config.width * moe.experts,
        "shared expert": expert * moe.shared_experts,
        "norms": 0.0,
    }


class Run(NamedTuple):
    """A short run of train.py in a process of its own."""

    first: float
    """Seconds from its start to the first update."""
    update: float
    """Median seconds of an update."""
    resident: float
    """Peak resident bytes."""


HUGE_PAGES = "glibc.malloc.hugetlb=1"
VARIANTS = {
    "default": (HUGE_PAGES, []),
    "no huge pages": ("", []),
    "reference dispatch": (HUGE_PAGES, ["--model.moe.implementation", "reference"]),
}
"""(allocator settings, further options) of the runs that are paired."""


def short_run(config: TrainConfig, tunables: str, options: list[str], steps: int = 40) -> Run:
    """Starts train.py on a few steps and waits for its end."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).with_name("train.py")
        command = [sys.executable, str(script), config.preset, "--out", folder]
        command += ["--steps", str(steps), "--evaluate-every", "100000", "--samples", "0", *options]
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            env={**os.environ, "GLIBC_TUNABLES": tunables},
            stdout=subprocess.DEVNULL,
        )
        metrics = Path(folder) / "metrics.jsonl"
        while not any(read_lines(metrics)):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
            time.sleep(0.02)
        first = time.perf_counter() - start
        _, _, usage = os.wait4(process.pid, 0)
        seconds = [line["seconds"] for line in read_lines(metrics) if "seconds" in line]
        resident = usage.ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
        return Run(first, float(np.median(seconds)), resident)


def paired_runs(config: TrainConfig, rounds: int) -> tuple[dict[str, list[Run]], float]:
    """Every variant once a round; and the plain GEMM's rate, the best of all before and between
    the runs: one taken while something else ran would make the limit too low."""
    runs: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    rates = []
    for _ in track(range(rounds), "short runs of train.py"):
        for name, (tunables, options) in VARIANTS.items():
            rates.append(gemm_rate(config.model.compute_dtype))
            runs[name].append(short_run(config, tunables, options))
    return runs, max(rates)


def speedup(runs: dict[str, list[Run]], over: str) -> float:
    """How much faster an update of the default run is, the median over pairs."""
    pairs = zip(runs["default"], runs[over], strict=True)
    return float(np.median([other.update / mine.update for mine, other in pairs]))


def draw(parts: list[Part], step: float) -> Figure:
    """Time of each part beside what the plain GEMM would need for it."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    names = [f"{part.count} x {part.name}" for part in parts]
    axes.barh(names, [1e3 * p.seconds * p.count for p in parts], color="lightsteelblue")
    axes.barh(names, [1e3 * p.ideal * p.count for p in parts], height=0.35, color="tab:blue")
    axes.invert_yaxis()
    axes.set(
        xlabel="milliseconds of a training step (dark: the same FLOPs in a plain GEMM)",
        title=f"where an update of {1e3 * step:.0f} ms goes",
    )
    return figure


def main(argv: list[str]) -> None:
    """Measures, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    repeats = 3 if settings.quick else settings.repeats
    config = replace(preset(PRESETS, settings.preset), seed=settings.seed)
    compiled, step = step_seconds(config, repeats)
    runs, rate = paired_runs(config, 1 if settings.quick else 3)
    parts = part_seconds(config, rate, repeats)
    tokens = config.batch * config.data.length
    flops = train_flops_per_token(config.resolved_model(), config.data.length) * tokens
    utilisation = flops / step / rate
    huge, dispatch = speedup(runs, "no huge pages"), speedup(runs, "reference dispatch")
    achieved = {
        name: flops / float(np.median([run.update for run in some])) / rate
        for name, some in runs.items()
    }
    last = runs["default"][-1]
    gemm = f"plain GEMM, {rate / 1e9:.0f} GFLOP/s"
    measurements = [
        Measurement("tokens_per_second", tokens / step, "tokens/s"),
        Measurement("model_flop_utilisation", utilisation, "fraction", gemm, utilisation),
        Measurement("step_seconds", step, "s", gemm, step * rate / flops),
        Measurement("compile_seconds", compiled, "s"),
        Measurement("first_step_seconds", last.first, "s"),
        Measurement("peak_resident_bytes_short_run", last.resident, "bytes"),
        Measurement("huge_pages_speedup", huge, "ratio", "the same run without", huge),
        Measurement("dispatch_speedup", dispatch, "ratio", "reference dispatch", dispatch),
    ]
    for name, value in achieved.items():
        label = f"run_model_flop_utilisation.{name}"
        measurements.append(Measurement(label, value, "fraction", gemm, value))
    for part in parts:
        share = part.count * part.seconds / step
        ratio = part.seconds / part.ideal if part.ideal else None
        measurements.append(Measurement(f"share.{part.name}", share, "of the step", gemm, ratio))
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    draw(parts, step).savefig(plots / "training_speed.png", dpi=120)
    explained = sum(part.count * part.seconds for part in parts) / step
    verdict = (
        f"{utilisation:.0%} of the plain GEMM rate end to end; the parts timed alone add up to "
        f"{explained:.0%} of the step"
    )
    write_result(
        out,
        experiment="training_speed",
        question=QUESTION,
        config=settings,
        measurements=measurements,
        verdict=verdict,
    )
    for m in measurements:
        ratio = "" if m.ratio is None else f"{m.ratio:8.2f} x {m.baseline}"
        print(f"{m.name:36} {m.value:14,.4g} {m.unit:12} {ratio}")
    print(f"{verdict}\n{out}/result.json, plots/training_speed.png")


if __name__ == "__main__":
    program(main)
