"""How fast is the training step, measured against the machine's own GEMM, and where does time go?

    python experiments/training_speed.py [--preset tiny] [--out DIR] [--quick]

Times the whole step, and the gradient of each of its parts alone at the step's own shapes. Beside
each is the time that a plain GEMM of the same machine would take for the same useful FLOPs. Then it
starts `train.py` from a warm token cache, and times the way to the first update. Paired with that
run are one without huge pages (moe_jax/base/startup.py) and one with the reference dispatch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from moe_jax.base.console import track
from moe_jax.base.initial import root_key
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, preset, program
from moe_jax.config import ModelConfig, TrainConfig
from moe_jax.config.checks import positive
from moe_jax.config.presets import PRESETS
from moe_jax.model.attention import document_context
from moe_jax.model.count import train_flops_per_token
from moe_jax.model.transformer import Transformer
from moe_jax.objectives.base import token_nats
from moe_jax.study.results import publish
from moe_jax.study.short_runs import ShortRun, Variant, paired_runs, update_speedup
from moe_jax.train.checks import check_memory
from moe_jax.train.state import abstract_state, init_state, tree_bytes
from moe_jax.train.step import make_step

QUESTION = "How fast is the training step, and where does the time go?"
GEMM_UNIT = "of a plain GEMM's FLOP/s"


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
    """Timed calls of each part, of which the median counts."""
    quick: bool = False
    """Fewer repeats, and each kind of run once."""

    def __post_init__(self) -> None:
        positive("", self, "repeats")


@dataclass(frozen=True)
class Part:
    """A part of the step."""

    name: str
    count: int
    """Times that a step runs it."""
    seconds: float
    """Forward and backward, once."""
    ideal: float
    """Seconds that its useful FLOPs take at the plain GEMM's rate."""


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
    key = root_key(config.seed)
    tokens = jax.random.randint(key, (config.batch, length), 0, config.data.vocabulary)
    return {"tokens": tokens, "segments": jnp.ones_like(tokens)}


def step_seconds(config: TrainConfig, repeats: int) -> tuple[float, float]:
    """(compilation, median update) of the whole step."""
    state = jax.jit(lambda: init_state(config))()
    batch = make_batch(config)
    start = time.perf_counter()
    step = jax.jit(make_step(config)).lower(state, batch).compile()
    compiled = time.perf_counter() - start
    return compiled, median_seconds(step, state, batch, repeats=repeats)


def part_seconds(config: TrainConfig, rate: float, repeats: int) -> list[Part]:
    """Forward and backward of each part alone, at the shapes of one update."""
    model_config = config.model
    model = Transformer(model_config, key=root_key(config.seed))
    batch = make_batch(config)
    length = config.data.length
    tokens = batch["tokens"][:, :length]
    segments = batch["segments"][:, :length]
    attention = document_context(model_config, segments)
    x = model.embed(tokens)
    graph, stacked = nnx.split(model.sparse.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], stacked))
    layers = model_config.layers
    sparse = model_config.moe_layers
    parts = {  # module, its call, times a step
        "attention": (block.attention, lambda part, x: part(x, attention)[0], layers),
        "routed experts": (block.moe, lambda part, x: part(x)[0], sparse),
        "shared expert": (block.shared_experts, lambda part, x: part(x), sparse),
        "norms": (block.attention_norm, lambda part, x: part(x), 2 * layers),
    }
    flops = part_flops(model_config, length)
    timed = []
    for name, (module, call, count) in track(parts.items(), "parts"):
        graph, *states = nnx.split(module, nnx.Param, ...)

        # The defaults bind this part's values: a closure would see the last part's.
        # The product with x gives the outputs cotangents that are not all ones, as in training.
        def total(parameters, x, graph=graph, rest=states[1:], call=call):
            return (call(nnx.merge(graph, parameters, *rest), x) * x).sum()

        seconds = median_seconds(jax.jit(jax.grad(total, (0, 1))), states[0], x, repeats=repeats)
        timed.append(Part(name, count, seconds, flops[name] * tokens.size / rate))

    def head(table, x):
        logits = jnp.einsum("bld,vd->blv", x, table)
        return token_nats(logits, tokens, segments > 0)

    table = model.embedding[...]
    seconds = median_seconds(jax.jit(jax.grad(head, (0, 1))), table, x, repeats=repeats)
    timed.append(Part("head and loss", 1, seconds, 6 * table.size * tokens.size / rate))
    return timed


def part_flops(config: ModelConfig, length: int) -> dict[str, float]:
    """Useful FLOPs of one layer's part for one token, forward and backward."""
    moe = config.moe
    # Three matrices, two FLOPs a multiplication and addition, three passes: 18 a weight.
    expert = 18.0 * config.width * moe.expert_hidden
    feed_forward = 18.0 * config.width * config.dense_hidden
    # The difference of a model with two dense layers and one with a single one is a layer.
    two = replace(config, layers=2, dense_layers=2)
    one = replace(config, layers=1, dense_layers=1)
    dense = train_flops_per_token(two, length) - train_flops_per_token(one, length)
    return {
        "attention": dense - feed_forward,
        "routed experts": expert * moe.experts_per_token + 6.0 * config.width * moe.experts,
        "shared expert": expert * moe.shared_experts,
        "norms": 0.0,
    }


TRAIN = Path(__file__).with_name("train.py")
HUGE_PAGES = "glibc.malloc.hugetlb=1"
VARIANTS = {
    "default": Variant(HUGE_PAGES, []),
    "no huge pages": Variant("", []),
    "reference dispatch": Variant(HUGE_PAGES, ["--model.moe.implementation", "reference"]),
}
"""The runs of train.py that are paired."""


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


def step_measurements(
    config: TrainConfig, step: float, compiled: float, rate: float
) -> list[Measurement]:
    """The whole step. `step` and `compiled` are seconds, `rate` is the plain GEMM's FLOP/s."""
    tokens = config.batch * config.data.length
    flops = flops_per_step(config)
    fraction = flops / step / rate
    gemm = gemm_text(rate)
    return [
        Measurement("tokens_per_second", tokens / step, "tokens/s"),
        Measurement("gemm_fraction", fraction, GEMM_UNIT, gemm, fraction),
        Measurement("step_seconds", step, "s", gemm, step * rate / flops),
        Measurement("compile_seconds", compiled, "s"),
    ]


def run_measurements(
    config: TrainConfig, runs: dict[str, list[ShortRun]], rate: float
) -> list[Measurement]:
    """The short runs of train.py."""
    last = runs["default"][-1]
    huge = update_speedup(runs["default"], runs["no huge pages"])
    dispatch = update_speedup(runs["default"], runs["reference dispatch"])
    rows = [
        Measurement("first_step_seconds", last.first, "s"),
        Measurement("peak_resident_bytes_short_run", last.resident, "bytes"),
        Measurement("huge_pages_speedup", huge, "ratio", "the same run without", huge),
        Measurement("dispatch_speedup", dispatch, "ratio", "reference dispatch", dispatch),
    ]
    for name, some in runs.items():
        update = float(np.median([run.update for run in some]))
        value = flops_per_step(config) / update / rate
        label = f"run_gemm_fraction.{name}"
        rows.append(Measurement(label, value, GEMM_UNIT, gemm_text(rate), value))
    return rows


def share_measurements(parts: list[Part], step: float, rate: float) -> list[Measurement]:
    """Each part's share of the step. The ratio is the part's time over that at GEMM rate."""
    rows = []
    for part in parts:
        share = part.count * part.seconds / step
        ratio = part.seconds / part.ideal if part.ideal else None
        label = f"share.{part.name}"
        rows.append(Measurement(label, share, "of the step", gemm_text(rate), ratio))
    return rows


def flops_per_step(config: TrainConfig) -> float:
    """Useful FLOPs of one update."""
    tokens = config.batch * config.data.length
    return train_flops_per_token(config.model, config.data.length) * tokens


def gemm_text(rate: float) -> str:
    """The limit, as a baseline's name."""
    return f"plain GEMM, {rate / 1e9:.0f} GFLOP/s"


def main(argv: list[str]) -> None:
    """Measures, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    repeats = 3 if settings.quick else settings.repeats
    config = replace(preset(PRESETS, settings.preset), seed=settings.seed).resolved()
    check_memory(config, 1, tree_bytes(abstract_state(config)))
    compiled, step = step_seconds(config, repeats)
    runs, rates = paired_runs(TRAIN, config, VARIANTS, 1 if settings.quick else 3)
    rate = max(rates)
    parts = part_seconds(config, rate, repeats)
    explained = sum(part.count * part.seconds for part in parts) / step
    publish(
        out,
        experiment="training_speed",
        question=QUESTION,
        settings=settings,
        measurements=[
            Measurement("gemm_flops_per_second", rate, "FLOP/s"),
            Measurement("gemm_flops_per_second_lowest", min(rates), "FLOP/s"),
            *step_measurements(config, step, compiled, rate),
            *run_measurements(config, runs, rate),
            *share_measurements(parts, step, rate),
        ],
        verdict=f"The step runs at {flops_per_step(config) / step / rate:.0%} of the plain GEMM's "
        f"rate end to end. The parts timed alone add up to {explained:.0%} of it.",
        figures={"training_speed": draw(parts, step)},
    )


if __name__ == "__main__":
    program(main)
