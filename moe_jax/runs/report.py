"""The report of a finished run: plots, sampled continuations and result.json."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.base import process
from moe_jax.base.console import console, say
from moe_jax.base.files import write_atomically
from moe_jax.base.initial import named_key
from moe_jax.base.machine import GemmRates, peak_resident_bytes
from moe_jax.base.numbers import amount_text
from moe_jax.base.result import Measurement, write_result
from moe_jax.config import TrainConfig
from moe_jax.model.abstract import graph_of
from moe_jax.model.generate import generate
from moe_jax.runs.baselines import BASELINE_NAMES, compression_baselines
from moe_jax.runs.figures import draw_plots
from moe_jax.runs.load import decode_until_end
from moe_jax.train.checkpoint import VALIDATION, evaluated_bits
from moe_jax.train.loop import RunSummary
from moe_jax.train.metrics import read_lines

QUESTION = "How well does this model predict held-out text, and how fast did it learn?"
PROMPT_TOKENS = 32
CONTINUATION_TOKENS = 96


def write_report(summary: RunSummary) -> None:
    """Writes plots/, samples.txt and result.json into the run's folder, and prints the verdict.

    Of several processes the first one does.
    """
    if process.index() != 0:
        return
    say("writing the report: samples, plots, and what gzip, xz and the 5-gram reach")
    samples = sample_continuations(summary)
    lines = read_metrics(summary.out, summary.config.last_step)
    baselines = compression_baselines(summary.data, summary.config.data.cache)
    write_atomically(summary.out / "samples.txt", samples)
    draw_plots(lines, baselines, summary.out, summary.config.model.moe.experts)
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
        value, unit = amount_text(m.value, m.unit)
        console.print(f"{m.name:28} {value:>12} {unit}", markup=False)
    if summary.gemm.moved:
        console.print(describe_moved(summary.gemm), markup=False)
    console.print(f"{verdict}\n{summary.out}/result.json, samples.txt, plots/", markup=False)


def read_metrics(out: Path, last_step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. The last one is always there, if need be from the checkpoint.

    A finished run can have lost the file. Its last checkpoint still has the last evaluation.
    """
    lines = list(read_lines(out / "metrics.jsonl"))
    if any(line["step"] == last_step and VALIDATION in line for line in lines):
        return lines
    say(f"{out}/metrics.jsonl lacks step {last_step}: the report has what the checkpoint knows")
    bits = evaluated_bits(out / "checkpoints" / str(last_step))
    return [*lines, {"step": last_step, VALIDATION: np.nan if bits is None else bits}]


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
        # Of all processes of the run, evaluations included.
        Measurement("training_seconds", lines[-1].get("elapsed"), "s"),
        Measurement("final_loss", lines[-1].get("loss"), "nats/token", seeds=seeds),
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
