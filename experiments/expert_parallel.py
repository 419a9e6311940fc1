"""How much of expert parallelism's communication lies under computation on 8 H100, and on 2 x 8?

    python experiments/expert_parallel.py [--out DIR] [--chunks N] [--quick]

No GPU is used, and times of H100s are predicted. XLA compiles the layer for absent H100s, Triton
kernels included. Its scheduled program is then read and priced (moe_jax/predict/scheduled_hlo.py
has the model). The same is done with the whole update of a model of DeepSeek-V3's shape, as
train.py runs it. It needs the packages triton, jax-triton, jax-cuda13-plugin and jax-cuda13-pjrt.

Before that the layer is timed here, in two processes with a core each
(moe_jax/study/exchange_speed.py). The load of devices, with and without replicas of hot experts, is
counted in training runs on simulated devices (experiments/rebalancing.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_jax.base.startup import ask_for_huge_pages, for_absent_gpus

if __name__ == "__main__":
    ask_for_huge_pages()
    for_absent_gpus()

from moe_kernels.launch import missing_package

from moe_jax.base.errors import UserError
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config import require
from moe_jax.config.exchange import ExchangeConfig
from moe_jax.predict.absent import missing
from moe_jax.study import exchange_speed, rebalancing
from moe_jax.study.exchange_programs import NODE, Case, Reading, Sizes, read
from moe_jax.study.exchange_speed import LayerSize
from moe_jax.study.on_cores import on_cores, two_cores
from moe_jax.study.results import publish

QUESTION = "How much of expert parallelism's communication lies under computation?"
TRAIN = Path(__file__).with_name("train.py")
TWO_PROCESSES = "two_process_chunked_over_plain"


@dataclass(frozen=True)
class Settings(Sizes):
    """Compiles DeepSeek-V3's layer for absent H100s, and reads what lies under what."""

    out: str = "runs/expert_parallel"
    """Folder for result.json."""
    seed: int = 0
    """Seed of the training runs in which loads are counted."""
    chunks: int = 16
    """Parts of a device's experts in the chunked layer."""
    rounds: int = 15
    """Times that the layer of two processes is timed."""
    quick: bool = False
    """The plain and the chunked layer and update on 8 devices alone, and a small one in two
    processes."""

    def __post_init__(self) -> None:
        own = self.experts // NODE
        require(
            own % self.chunks == 0,
            f"chunks={self.chunks} does not divide the {own} experts of a device",
        )


def cases(settings: Settings) -> dict[str, Case]:
    """All programs by name."""
    plain = ExchangeConfig()
    chunked = ExchangeConfig(chunks=settings.chunks)
    found = {}
    for name, exchange in (("plain", plain), ("chunked", chunked)):
        found[f"{name}_forward"] = Case(exchange)
        found[f"{name}_backward"] = Case(exchange, backward=True)
        found[f"{name}_scanned_forward"] = Case(exchange, scanned=True)
        found[f"{name}_scanned_backward"] = Case(exchange, backward=True, scanned=True)
        found[f"{name}_step"] = Case(exchange, step=True)
    if settings.quick:
        return found
    found["chunked_step_sliced"] = Case(chunked, step=True, sliced=True)
    found["all_gather_forward"] = Case(ExchangeConfig("all_gather"))
    found["ring_forward"] = Case(ExchangeConfig("ring"))
    found["copies_forward"] = Case(ExchangeConfig("copies"))
    found["chunked_fp8_forward"] = Case(ExchangeConfig(chunks=settings.chunks, fp8=True))
    own = settings.experts // (2 * NODE)
    halved = ExchangeConfig(chunks=min(settings.chunks, own))
    nodes = {"plain": plain, "chunked": halved, "copies": ExchangeConfig("copies", node=NODE)}
    found |= {f"{name}_2x8_forward": Case(way, nodes=2) for name, way in nodes.items()}
    return found


def device_loads(settings: Settings, out: Path) -> list[Measurement]:
    """eplb_load_before and eplb_load_after of a training run that places experts by load."""
    runs = rebalancing.Settings(seed=settings.seed, quick=settings.quick)
    rows, _ = rebalancing.measure(TRAIN, runs, output_folder(str(out / "rebalancing")))
    return [row for row in rows if row.name in ("eplb_load_before", "eplb_load_after")]


def in_two_processes(settings: Settings) -> list[Measurement]:
    """The layer on two cores of this machine, if it has them."""
    size = LayerSize().quick() if settings.quick else LayerSize()
    rounds = 2 if settings.quick else settings.rounds
    try:
        cores = two_cores()
    except UserError as error:
        return [Measurement(TWO_PROCESSES, None, f"not measured: {error}")]
    seconds = on_cores(exchange_speed.time_exchanges, cores, size, rounds)
    return exchange_speed.measurements(size, seconds)


def measurements(readings: Mapping[str, Reading]) -> list[Measurement]:
    """The shares of the issue's names, and a table of every program."""
    share = "of the transfers' time, under products, predicted"
    exchange = "of the all-to-alls' time, under products, predicted"
    rows = [
        Measurement("covered_plain", readings["plain_forward"].covered, share),
        Measurement("covered_chunked_forward", readings["chunked_forward"].covered, share),
        Measurement("covered_chunked_backward", readings["chunked_backward"].covered, share),
    ]
    for arm in ("plain", "chunked"):
        covered = readings[f"{arm}_step"].exchange
        rows.append(Measurement(f"covered_{arm}_step", covered, exchange))
    for which in ("forward", "backward", "scanned_forward", "scanned_backward", "step"):
        plain = readings[f"plain_{which}"].line.total
        ratio = plain / readings[f"chunked_{which}"].line.total
        name = f"speedup_{which}"
        rows.append(Measurement(name, ratio, "x, predicted", f"plain_{which}", ratio))
    for name, reading in readings.items():
        line = reading.line
        for part in ("total", "products", "rest", "transfers", "stalled"):
            value = 1e3 * getattr(line, part)
            rows.append(Measurement(f"{name}.{part}", value, "ms a device, predicted"))
        rows.append(Measurement(f"{name}.covered", reading.covered, share))
        rows.append(Measurement(f"{name}.exchange_covered", reading.exchange, exchange))
        rows.append(Measurement(f"{name}.temporary", reading.memory, "bytes a device"))
        rows.append(Measurement(f"{name}.copied", reading.copied, "bytes a device, in loops"))
    return rows


def verdict(values: Mapping[str, float | int | None]) -> str:
    """Shares and times, with what they are."""
    return (
        "Predicted from programs compiled for 8 absent H100, and not measured: "
        f"{values['covered_chunked_forward']:.1%} of the transfers lie under products forward, "
        f"{values['covered_chunked_backward']:.1%} with the backward pass "
        f"({values['covered_plain']:.1%} without chunks). The layers of a scanned model are "
        f"{values['speedup_scanned_forward']:.2f}x as fast forward, "
        f"{values['speedup_scanned_backward']:.2f}x with the backward pass. In a whole update "
        f"{values['covered_chunked_step']:.1%} of the exchange lies under products, and chunks "
        f"make it {values['speedup_step']:.2f}x as fast. Counted in a training "
        f"run, the device with the most load has {values['eplb_load_before']:.2f} times the mean, "
        f"and {values['eplb_load_after']:.2f} times with experts placed by load."
    )


def verdict_of_two(ratio: float | None) -> str:
    """The measured sentence, or nothing."""
    if ratio is None:
        return ""
    return (
        f" Measured in two processes with a core each: in {LayerSize().chunks[0]} chunks the "
        f"layer, forward and backward, takes {ratio:.2f} times as long as with one exchange."
    )


def main(argv: list[str]) -> None:
    """Measures, compiles, reads, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    problem = missing() or missing_package()
    require(not problem, f"no compiler for absent GPUs: {problem}")
    out = output_folder(settings.out)
    # First, because JAX starts here in what follows, and its threads would use both cores.
    timed = in_two_processes(settings)
    readings = {}
    for name, case in cases(settings).items():
        readings[name] = read(settings, case)
        line = readings[name].line
        print(
            f"{name:24s} {1e3 * line.total:8.2f} ms predicted, "
            f"{readings[name].covered:6.1%} of {1e3 * line.transfers:.2f} ms covered",
            flush=True,
        )
    rows = measurements(readings) + timed + device_loads(settings, out)
    values = {m.name: m.value for m in rows}
    publish(
        out,
        experiment="expert_parallel",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict(values) + verdict_of_two(values[TWO_PROCESSES]),
        figures={},
    )


if __name__ == "__main__":
    program(main)
