"""Lever 1: what does each kernel idea buy, and is it the article's 2-5x, or 4-10x with PTX?

    python experiments/lever_kernels.py [--out DIR] [--quick] [--device H100|A100]

The layer forward, from XLA's own path to the full kernels, one idea at a time (kernel_ladder.py),
on the sizes of real models. On a GPU every rung is measured. Without one it is PREDICTED, and
labelled so everywhere: each rung's launches are compiled for the GPU that is not there, and their
registers, shared memory and instructions go into the model of kernel_model.py.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from moe_kernels.launch import capability, triton_support
from moe_kernels.timing import paired, ratio

from experiments.kernel_ladder.launch_model import A100, H100, Device
from experiments.kernel_ladder.prediction import (
    DTYPE,
    Backward,
    Shape,
    Step,
    arrays,
    backward,
    predict,
    routing,
)
from experiments.kernel_ladder.rungs import RUNGS, before, built, possible, train, train_with_y
from experiments.moe_layer.cases import Table
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, program

QUESTION = "What does each kernel idea buy, and is it the article's 2-5x, or 4-10x with PTX?"


@dataclass(frozen=True)
class Settings:
    """Climbs the ladder from XLA's own path to the kernels."""

    out: str = "runs/lever-kernels"
    """Folder for result.json, metrics.jsonl and the plot."""
    quick: bool = False
    """One small shape."""
    device: Literal["H100", "A100"] = "H100"
    """What is predicted where there is no GPU."""
    seed: int = 0
    """Seed of the routing and, on a GPU, of the inputs."""


SHAPES = {
    "OLMoE-1B-7B": Shape(8192, 2048, 1024, 64, 8),
    "Qwen3-30B-A3B": Shape(8192, 2048, 768, 128, 8),
    "DeepSeek-V3": Shape(8192, 7168, 2048, 256, 8),
}
QUICK = {"small": Shape(1024, 512, 256, 16, 4)}
DEVICES = {"H100": H100, "A100": A100}


def make_inputs(shape: Shape, seed: int) -> list[jax.Array]:
    """Normal numbers for `arrays`; the matrices divided by the root of their inputs' width."""
    keys = jax.random.split(jax.random.key(seed), 4)
    scales = (1.0, 1.0, shape.width**-0.5, shape.hidden**-0.5)
    return [
        (scale * jax.random.normal(key, a.shape)).astype(a.dtype)
        for key, a, scale in zip(keys, arrays(shape), scales, strict=True)
    ]


Rounds = dict[str, list[float]]
"""Seconds of each call, round by round."""
Gains = dict[str, tuple[float, float]]
"""By rung: (over the rung before, over XLA's path)."""


def measure(shape: Shape, seed: int, rounds: int) -> tuple[dict[str, Step], Rounds]:
    """Every rung on the GPU at hand, and the plain GEMM as `gemm`: medians, and all rounds."""
    inputs, plan = make_inputs(shape, seed), routing(shape, seed)
    calls, notes = {}, {}
    for rung in possible(capability()):
        with built(rung, DTYPE, plan.block_rows):
            compiled = (
                jax.jit(lambda *a, layer=rung.layer: layer(*a)).lower(*inputs, plan).compile()
            )
        memory: Any = compiled.memory_analysis()
        calls[rung.name] = partial(compiled, *inputs, plan)
        notes[rung.name] = f"{memory.temp_size_in_bytes / 1e9:.2f} GB of temporaries"
    side = min(8192, shape.tokens)
    square = jnp.ones((side, side), DTYPE)
    calls["gemm"] = partial(jax.jit(jnp.matmul), square, square)
    seconds = paired(calls, rounds)
    seconds["gemm"] = [t * shape.flops / (2.0 * side**3) for t in seconds["gemm"]]
    steps = {n: Step(1e3 * float(np.median(seconds[n])), None, notes[n]) for n in notes}
    return steps, seconds


def measure_backward(shape: Shape, seed: int, rounds: int, device: Device) -> Backward:
    """The same on the GPU at hand, y given."""
    inputs, plan = make_inputs(shape, seed), routing(shape, seed)
    y = jnp.ones((plan.assignment.size, shape.width), DTYPE)
    arguments = (*inputs, plan, inputs[0])
    calls = {
        "without": partial(jax.jit(train), *arguments),
        "with": partial(jax.jit(train_with_y), y, *arguments),
    }
    seconds = paired(calls, rounds)
    expected = backward(shape, Step(1.0, None, ""), device)
    return expected._replace(speedup=ratio(seconds["without"], seconds["with"]))


def gains(
    steps: dict[str, Step], seconds: dict[str, list[float]]
) -> dict[str, tuple[float, float]]:
    """By rung: (over the rung before, over XLA's path)."""
    times = seconds or {name: [step.milliseconds] for name, step in steps.items()}
    found = {}
    for rung in (rung for rung in RUNGS if rung.name in times):
        previous = before(rung)
        over = 1.0 if previous is None else ratio(times[rung.name], times[previous])
        found[rung.name] = over, ratio(times[rung.name], times["xla"])
    return found


def draw(found: dict[str, Gains], title: str) -> Figure:
    """Speed over XLA's path, rung by rung, a group of bars for each shape; the article's claims."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    names = list(next(iter(found.values())))
    for index, (shape, rungs) in enumerate(found.items()):
        at = np.arange(len(names)) + 0.26 * (index - (len(found) - 1) / 2)
        bars = axes.bar(at, [rungs[name][1] for name in names], 0.24, label=shape)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="0.5", linewidth=1)
    axes.axhspan(2, 5, color="tab:orange", alpha=0.08)
    axes.text(len(names) - 0.5, 2.03, "the article's 2-5x begins here", ha="right", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, max(2.3, 1.15 * max(r[1] for rungs in found.values() for r in rungs.values())))
    axes.set(ylabel="speed over XLA's own path", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def verdict(found: dict[str, Gains], label: str) -> str:
    """The article's claims against what was seen, geometric means over the shapes."""

    def mean(name: str, which: int) -> float:
        values = [rungs[name][which] for rungs in found.values()]
        return float(np.exp(np.mean(np.log(values))))

    steps = ", ".join(
        f"{rung.name} {mean(rung.name, 0):.2f}x"
        for rung in RUNGS
        if before(rung) is not None and rung.name in next(iter(found.values()))
    )
    whole, over_naive = mean("raster", 1), mean("raster", 1) / mean("grouped", 1)
    claim = "inside" if 2 <= whole <= 5 else "below" if whole < 2 else "above"
    return (
        f"{label}: all ideas together are {whole:.2f}x XLA's own path, {claim} the article's 2-5x, "
        f"and {over_naive:.2f}x the naive Triton kernels they began with; each over what "
        f"it is added to: {steps}. Inline PTX is {mean('ptx', 0):.2f}x, where the article says "
        "4-10x."
    )


def slug(text: str) -> str:
    """A name for result.json."""
    return re.sub(r"\W+", "_", text).lower()


def rung_measurements(
    shape: str, rung: str, over_xla: float, of_gemm: float, kind: str
) -> list[Measurement]:
    """The two ratios of one rung; `kind` says whether they were measured or predicted."""
    key = slug(f"{shape} {rung}")
    gemm_unit = f"of the plain GEMM's FLOP/s, {kind}"
    return [
        Measurement(key, over_xla, f"x XLA's path, {kind}", "xla", over_xla),
        Measurement(f"{key}_of_gemm", of_gemm, gemm_unit, "gemm", of_gemm),
    ]


def main(argv: list[str]) -> None:
    """Climbs, prints, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    measured = triton_support().name == "gpu"
    device = DEVICES[settings.device]
    label = f"PREDICTED for {device.name}, no GPU was there"
    if measured:
        label = f"measured on {jax.devices()[0].device_kind}"
    kind = "measured" if measured else "PREDICTED"
    table, found, measurements = Table(out / "metrics.jsonl"), {}, []
    for name, shape in (QUICK if settings.quick else SHAPES).items():
        if measured:
            steps, seconds = measure(shape, settings.seed, rounds=7)
            kept = measure_backward(shape, settings.seed, 7, device)
        else:
            steps, seconds = predict(shape, device, settings.seed), {}
            kept = backward(shape, steps["raster"], device)
        found[name] = gains(steps, seconds)
        limit = 1e3 * shape.flops / device.gemm
        if seconds:
            limit = 1e3 * float(np.median(seconds["gemm"]))
        for rung in (rung for rung in RUNGS if rung.name in steps):
            step, (over_before, over_xla) = steps[rung.name], found[name][rung.name]
            of_gemm = limit / step.milliseconds
            values = {"ms": step.milliseconds, "of_gemm": of_gemm, "over_before": over_before}
            values |= {"over_xla": over_xla, "DRAM_GB": step.dram_gigabytes}
            table.row(f"{name}, {label}", rung.name, step.note, **values)
            measurements += rung_measurements(name, rung.name, over_xla, of_gemm, kind)
        table.row(f"{name}, backward", "without Y", label, **kept._asdict())
        key, unit = slug(f"{name} backward without y"), f"x with Y kept, {kind}"
        measurements.append(Measurement(key, kept.speedup, unit, "with Y", kept.speedup))
        saved = kept.kept_with_y / kept.kept_gigabytes
        unit = "bytes kept with Y over those without, by the formula"
        measurements.append(Measurement(f"{key}_memory", saved, unit, "with Y", saved))
    sentence = verdict(found, label)
    draw(found, label).savefig(out / "ladder.png", dpi=120)
    write_result(
        out,
        experiment="lever_kernels",
        question=QUESTION,
        config=settings,
        measurements=measurements,
        verdict=sentence,
    )
    print(f"\n{sentence}\n{out}/result.json, metrics.jsonl, ladder.png")


if __name__ == "__main__":
    program(main)
