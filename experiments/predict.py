"""Does a run fit on N GPUs that are not here, and how fast is it there?

    python experiments/predict.py PRESET --hardware NAME --devices N [--price P] [--FIELD VALUE …]
    python experiments/predict.py PRESET --hardware NAME --devices N --search [--search-minutes 30]

The very step that experiments/train.py would run is compiled for absent GPUs, on a machine without
one. Memory is the compiler's. Time is PREDICTED from the scheduled program by a model of few terms
(docs/predict.md). With --search many layouts are compiled and ranked. All options of train.py are
taken. It needs the packages of moe_jax[predict].
"""

import os
from collections.abc import Callable
from dataclasses import asdict

from moe_jax.base.startup import for_absent_gpus

if __name__ == "__main__":
    for_absent_gpus()
    # The compiler warns of memory in its own words.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import program
from moe_jax.predict.answer import Answer, answer, read_command
from moe_jax.predict.figures import draw
from moe_jax.study.layout_search.report import report
from moe_jax.study.layout_search.search import Search, plan, run
from moe_jax.study.results import publish

QUESTION = "Does this run fit on GPUs that are not here, and how fast is it there?"
NOT_SHOWN = (
    "Not in it: cuDNN's workspaces, fragmentation between programs, unequal loads of experts, the "
    "host's overhead, data, checkpoints, and evaluations."
)
IN_TICKS = (
    " In a pipeline a tick is taken to last as long as the longest step of any device, and FLOPs, "
    "bytes sent and the timeline are those of the busiest device."
)
GIB = 2**30


def measurements(found: Answer, price: float) -> list[Measurement]:
    """The numbers of result.json."""
    memory = found.memory
    compiled = found.compiled
    line = found.prediction.line
    rows = [
        Measurement("bytes_per_device", memory.total, "bytes, compiled, with stated terms"),
        Measurement("card_bytes", memory.card, "bytes"),
        Measurement("fits", int(memory.fits), "1 or 0"),
    ]
    stated = {"context": memory.context, "nccl": memory.nccl}
    rows += [Measurement(f"memory.{n}", v, "bytes, compiled") for n, v in memory.kinds.items()]
    rows += [Measurement(f"memory.{n}", v, "bytes, a stated term") for n, v in stated.items()]
    rows.append(Measurement("flops_per_device", found.flops, "FLOP a step"))
    sent = sum(found.collectives.values())
    rows.append(Measurement("collective_bytes", sent, "bytes sent a device and step"))
    for (kind, axes), size in sorted(found.collectives.items()):
        rows.append(Measurement(f"collective_bytes.{kind}.{axes}", size, "bytes"))
    rows.append(
        Measurement("collective_covered", line.covered, "of the transfers' time, PREDICTED")
    )
    rows += times(found, price)
    for name in ("products", "rest", "transfers", "stalled", "idle"):
        rows.append(Measurement(f"step.{name}", getattr(line, name), "s, PREDICTED"))
    for name, (fast, slow) in found.prediction.effects.items():
        changes = [found.prediction.seconds + fast, found.prediction.seconds + slow]
        unit = "s a step over the term's range, PREDICTED"
        rows.append(Measurement(f"term.{name}", found.prediction.seconds, unit, interval=changes))
    rows.append(Measurement("lower_seconds", compiled.lower_seconds, "s"))
    rows.append(Measurement("compile_seconds", compiled.compile_seconds, "s"))
    rows.append(Measurement("host_bytes", compiled.host_bytes, "bytes, of the compiling process"))
    return rows


def times(found: Answer, price: float) -> list[Measurement]:
    """Seconds, rates and costs, each with its interval."""
    low = found.prediction.low
    high = found.prediction.high
    middle = found.prediction.seconds

    def row(name: str, of: Callable[[float], float], unit: str) -> Measurement:
        ends = sorted((of(low), of(high)))
        return Measurement(name, of(middle), f"{unit}, PREDICTED", interval=ends)

    rows = [
        row("step_seconds", float, "s"),
        row("tokens_per_second_per_device", found.rate, "tokens/s"),
        row("mfu", found.mfu, "of the data sheet"),
        row("gpu_hours_per_trillion_tokens", found.gpu_hours, "hours of one GPU"),
    ]
    if price:
        cost = row("cost_per_trillion_tokens", lambda s: price * found.gpu_hours(s), "price units")
        rows.append(cost)
    return rows


def verdict(found: Answer) -> str:
    """Memory, time, and what was left out."""
    memory = found.memory
    prediction = found.prediction
    size = f"{memory.total / GIB:.1f} of {memory.card / GIB:.1f} GiB"
    fits = f"It fits: {size}." if memory.fits else f"It does NOT fit: {size}."
    if memory.fits:
        fits += (
            " JAX reserves 0.75 of a card: set XLA_PYTHON_CLIENT_MEM_FRACTION to at least "
            f"{min(0.99, memory.program / memory.card + 0.01):.2f}."
            if memory.program > 0.75 * memory.card
            else ""
        )
    return (
        f"{fits} PREDICTED, and not measured: {prediction.seconds:.3g} s a step "
        f"({prediction.low:.3g} to {prediction.high:.3g}), "
        f"{found.rate(prediction.seconds):,.0f} tokens/s a device, MFU "
        f"{found.mfu(prediction.seconds):.1%}, {prediction.line.covered:.0%} of the transfers' "
        f"time covered. {NOT_SHOWN}{IN_TICKS if found.config.parallel.pipe > 1 else ''}"
    )


def main(argv: list[str]) -> None:
    """Checks, compiles, writes."""
    settings, config = read_command(argv)
    if settings.search:
        search = Search.of(settings, config, argv, __file__)
        report(search, run(search, plan(search)))
        return
    found = answer(settings, config)
    title = f"{config.preset} on {settings.devices} {found.card.name}"
    publish(
        output_folder(settings.out),
        experiment="predict",
        question=QUESTION,
        settings={**asdict(settings), "run": asdict(config)},
        measurements=measurements(found, settings.price),
        verdict=verdict(found),
        figures={"prediction": draw(found.memory, found.prediction, title)},
    )


if __name__ == "__main__":
    program(main)
