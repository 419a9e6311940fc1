"""How even is the load of devices in a training run that places its experts by load?

    python experiments/rebalancing.py [--out DIR] [--quick]

`train.py` trains `tiny` with 32 experts on four simulated devices of the axis `expert`. Every few
steps the experts are placed anew, and each device has a slot for a replica. `metrics.jsonl` has the
assignments that the device with the most computed, over the mean, counted in the exchange itself
(device_imbalance). It also has each expert's load, which gives what the same tokens are without
replicas, in the order of the experts' numbers. Loads are counted and not timed: simulated devices
share the cores.
"""

from collections.abc import Mapping
from pathlib import Path

from moe_jax.base.result import output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.study.rebalancing import Settings, measure
from moe_jax.study.results import publish

QUESTION = "How even is the load of devices in training that places experts by load?"
TRAIN = Path(__file__).with_name("train.py")


def verdict(values: Mapping[str, float | int | None]) -> str:
    """The answer, in sentences."""
    return (
        f"In the order of the experts' numbers the device with the most load has "
        f"{values['eplb_load_before']:.2f} times the mean. Placed anew by the loads of the steps "
        f"before, with a replica's slot a device, it has {values['eplb_load_after']:.2f}, or "
        f"{values['eplb_load_bounded']:.2f} by {values['eplb_moved_bounded']:.1f} moves a layer "
        f"instead of {values['eplb_moved']:.1f}."
    )


def main(argv: list[str]) -> None:
    """Trains, counts, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    rows, figure = measure(TRAIN, settings, out)
    publish(
        out,
        experiment="rebalancing",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict({m.name: m.value for m in rows}),
        figures={"rebalancing": figure},
    )


if __name__ == "__main__":
    program(main)
