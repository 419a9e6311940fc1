"""The report of a finished run: plots, sampled continuations and result.json."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moe_jax.base.console import console, say
from moe_jax.base.files import write_atomically
from moe_jax.base.initial import named_key
from moe_jax.base.machine import GemmRates, peak_resident_bytes
from moe_jax.base.result import Measurement, write_result
from moe_jax.config import TrainConfig
from moe_jax.model.abstract import graph_of
from moe_jax.model.generate import generate
from moe_jax.runs.baselines import compression_baselines
from moe_jax.runs.load import decode_until_end
from moe_jax.train.checkpoint import VALIDATION
from moe_jax.train.loop import RunSummary
from moe_jax.train.metrics import read_lines

QUESTION = "How well does this model predict held-out text, and how fast did it learn?"
BASELINE_NAMES = {
    "gzip_bits_per_byte": "gzip -9",
    "xz_bits_per_byte": "xz -9",
    "ngram_bits_per_byte": "the byte 5-gram",
}
PROMPT_TOKENS = 32
CONTINUATION_TOKENS = 96


def write_report(summary: RunSummary) -> None:
    """Writes plots/, samples.txt and result.json into the run's folder, and prints the verdict."""
    say("writing the report: samples, plots, and what gzip, xz and the 5-gram reach")
    samples = sample_continuations(summary)
    if jax.process_index() != 0:
        return
    lines = list(read_lines(summary.out / "metrics.jsonl"))
    baselines = compression_baselines(summary.data, summary.config.data.cache)
    write_atomically(summary.out / "samples.txt", samples)
    draw_plots(lines, baselines, summary)
    measurements = measure(lines, baselines, summary)
    verdict = describe_verdict(lines, baselines)
    write_result(
        summary.out,
        experiment="train",
        question=QUESTION,
        config=summary.config,
        measurements=measurements,
        verdict=verdict,
    )
    console.print(samples, markup=False)
    for m in measurements:
        value = "-" if m.value is None else f"{m.value:,.4g}"
        console.print(f"{m.name:28} {value:>12} {m.unit}", markup=False)
    if summary.gemm.moved:
        console.print(describe_moved(summary.gemm), markup=False)
    console.print(f"{verdict}\n{summary.out}/result.json, samples.txt, plots/", markup=False)


def describe_moved(gemm: GemmRates) -> str:
    """Says that the limit was not the same all the time."""
    return (
        f"the plain GEMM moved: {gemm.before / 1e9:,.0f} GFLOP/s before the run and "
        f"{gemm.after / 1e9:,.0f} after it. The machine did other work, so that "
        "tokens_per_second and gemm_fraction may be too low"
    )


def measure(
    lines: list[dict[str, Any]], baselines: dict[str, float], summary: RunSummary
) -> list[Measurement]:
    """The run's measurements. Tests and experiments look them up by these names.

    The fraction is of the faster of the two plain GEMMs, because other work on the machine only
    makes one slower.
    """
    seeds = [summary.config.seed]
    bits = last_validation(lines)
    speed = tokens_per_second(lines, summary.config)
    achieved = None if speed is None else speed * summary.flops_per_token
    gemm = summary.gemm
    limit = f"plain GEMM, {gemm.best / 1e9:.0f} GFLOP/s"
    fraction = None if achieved is None else achieved / gemm.best
    gzip = baselines["gzip_bits_per_byte"]
    return [
        Measurement(VALIDATION, bits, "bits/byte", "gzip -9", bits / gzip, seeds=seeds),
        *(Measurement(name, value, "bits/byte") for name, value in baselines.items()),
        Measurement("tokens_per_second", speed, "tokens/s"),
        # No MFU: that compares with the peak FLOP/s on the device's data sheet.
        Measurement("gemm_fraction", fraction, "of a plain GEMM's FLOP/s", limit, fraction),
        Measurement("gemm_flops_per_second", gemm.best, "FLOP/s"),
        Measurement("gemm_flops_per_second_before", gemm.before, "FLOP/s"),
        Measurement("gemm_flops_per_second_after", gemm.after, "FLOP/s"),
        Measurement("model_flops_per_token", summary.flops_per_token, "FLOP"),
        Measurement("peak_resident_bytes", peak_resident_bytes(), "bytes"),
        Measurement("compile_seconds", summary.compile_seconds, "s"),
        Measurement("final_loss", lines[-1]["loss"], "nats/token", seeds=seeds),
    ]


def last_validation(lines: list[dict[str, Any]]) -> float:
    """The last measured bits per byte."""
    return [x[VALIDATION] for x in lines if VALIDATION in x][-1]


def tokens_per_second(lines: list[dict[str, Any]], config: TrainConfig) -> float | None:
    """Trained tokens over the time from update to update.

    The time includes reading, logging and the start of checkpoints, and not evaluations. None for a
    run of a single step.
    """
    seconds = [x["seconds"] for x in lines if "seconds" in x]
    return len(seconds) * config.batch * config.data.length / sum(seconds) if seconds else None


def describe_verdict(lines: list[dict[str, Any]], baselines: dict[str, float]) -> str:
    """One sentence that places the result among the compressors."""
    bits = last_validation(lines)
    beaten = [BASELINE_NAMES[name] for name, value in baselines.items() if bits < value]
    below = " and ".join(beaten) or "none of gzip, xz and the 5-gram"
    return f"{bits:.3f} bits per byte on held-out text: below {below}"


def sample_continuations(summary: RunSummary) -> str:
    """Beginnings of held-out documents and the model's continuations, as text."""
    config = summary.config
    array = summary.data.validation
    tokenizer = summary.data.tokenizer
    ends = np.append(array.starts[1:], len(array.tokens))
    long_enough = array.starts[ends - array.starts > 2 * PROMPT_TOKENS]
    if summary.state is None or not len(long_enough):
        return ""
    # Spread evenly over the held-out text, so that every run on it shows the same beginnings.
    chosen = long_enough[np.linspace(0, len(long_enough) - 1, config.samples).astype(int)]
    prompts = np.stack([array.tokens[s : s + PROMPT_TOKENS] for s in chosen]).astype(np.int32)
    continuations = generate(
        graph_of(config.model),
        (summary.state.parameters, summary.state.router),
        jnp.asarray(prompts),
        named_key(jax.random.wrap_key_data(summary.state.key), "samples"),
        count=CONTINUATION_TOKENS,
        vocabulary=tokenizer.vocabulary,
    )
    blocks = []
    for prompt, tokens in zip(prompts, np.asarray(continuations), strict=True):
        text = f"{tokenizer.decode(prompt)}⟫{decode_until_end(tokenizer, tokens)}"
        blocks.append(f"--- held-out beginning ⟫ continuation\n{text}\n")
    return "\n".join(blocks)


def draw_plots(
    lines: list[dict[str, Any]], baselines: dict[str, float], summary: RunSummary
) -> None:
    """plots/loss.png, and for a mixture of experts load.png and router.png."""
    matplotlib.use("Agg")  # a machine without a display
    plots = summary.out / "plots"
    plots.mkdir(exist_ok=True)
    _save(draw_loss(lines, baselines), plots / "loss.png")
    if any("load" in line for line in lines):
        _save(draw_load(lines), plots / "load.png")
        _save(draw_router(lines, summary.config.model.moe.experts), plots / "router.png")


def _save(figure: Figure, path: Path) -> None:
    # Atomically: whoever watches the folder never sees half a picture.
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())


def draw_smoothed(axes: Any, steps: list[int], values: Any, color: str, label: str) -> None:
    """Every value as a faint line, and their running mean over a fortieth of the run."""
    values = np.asarray(values, float)  # a skipped step has None: a gap in the curve
    axes.plot(steps, values, alpha=0.25, color=color, linewidth=0.8)
    width = max(1, len(values) // 40)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color=color, label=label)


def draw_loss(lines: list[dict[str, Any]], baselines: dict[str, float]) -> Figure:
    """Training loss by step, and validation bits per byte among the compressors."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [x["cross_entropy"] for x in lines]
    draw_smoothed(left, [x["step"] for x in lines], losses, "tab:blue", "running mean")
    left.set(xlabel="step", ylabel="cross-entropy (nats/token)", title="training")
    left.legend()
    measured = [(x["step"], x[VALIDATION]) for x in lines if VALIDATION in x]
    right.plot(*zip(*measured, strict=True), marker="o", color="tab:blue", label="model")
    for (name, value), style in zip(baselines.items(), ("--", "-.", ":"), strict=True):
        right.axhline(value, linestyle=style, color="gray", label=BASELINE_NAMES[name])
    right.set(xlabel="step", ylabel="bits per byte", title="held-out text")
    right.set_xlim(left=0)
    right.legend()
    return figure


def draw_load(lines: list[dict[str, Any]]) -> Figure:
    """Expert load relative to the mean, over layers (panels), experts (rows) and time."""
    snapshots = [x for x in lines if "load" in x]
    load = np.array([x["load"] for x in snapshots], float)
    relative = load / load.mean(axis=-1, keepdims=True)
    layers = relative.shape[1]
    figure = Figure(figsize=(11, 1.2 + 1.3 * layers), layout="constrained")
    panels = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    extent = (snapshots[0]["step"], snapshots[-1]["step"] + 1, relative.shape[2] - 0.5, -0.5)
    image: Any = None
    for layer, panel in enumerate(panels):
        image = panel.imshow(
            relative[:, layer].T,
            aspect="auto",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            extent=extent,
            interpolation="nearest",
        )
        panel.set_ylabel(f"MoE layer {layer}\nexpert")
    panels[-1].set_xlabel("step")
    figure.colorbar(image, ax=panels.tolist(), label="load / mean load")
    figure.suptitle("expert load (white: balanced)")
    return figure


def draw_router(lines: list[dict[str, Any]], experts: int) -> Figure:
    """Router entropy and load imbalance of every layer by step."""
    routed = [x for x in lines if "router_entropy" in x]
    steps = [x["step"] for x in routed]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    # Guarded for one expert, whose log E is 0.
    entropy = np.array([x["router_entropy"] for x in routed]) / max(np.log(experts), 1e-9)
    imbalance = np.array([x["load_imbalance"] for x in routed])
    for layer in range(entropy.shape[1]):
        color = f"C{layer % 10}"
        label = f"MoE layer {layer}"
        draw_smoothed(left, steps, entropy[:, layer], color, label)
        draw_smoothed(right, steps, imbalance[:, layer], color, label)
    left.set(xlabel="step", ylabel="entropy / log E", title="router entropy", ylim=(0, 1.02))
    right.set(xlabel="step", ylabel="max / mean", title="expert load imbalance")
    left.legend(fontsize="small")
    right.axhline(1, linestyle=":", color="gray")
    return figure
