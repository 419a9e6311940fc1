"""When does software replace a faster link between GPUs, and when can it not?

    python experiments/lever_interconnect.py [--out DIR] [--quick]

Everything is PREDICTED: no GPU was there. A block of DeepSeek-V3 and whole models run on links from
PCIe 4 to NVLink 5 and on one to eight nodes, with one software idea after another. The terms are
those of moe_jax/predict/layouts and of moe_jax/predict/hardware. What others measured stands beside
the prediction (moe_jax/study/interconnect/anchors.py). docs/results/interconnect.md has the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_jax.base.errors import require
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config.presets import PRESETS
from moe_jax.predict.hardware import find_card
from moe_jax.predict.layouts.block import block_of
from moe_jax.predict.layouts.block_work import Cluster
from moe_jax.study.interconnect.anchors import Anchor, anchors
from moe_jax.study.interconnect.figures import draw_interconnect
from moe_jax.study.interconnect.ladder import (
    BESIDE,
    PLAIN,
    WAYS,
    BlockOn,
    Way,
    equal_rate,
    link_rates,
)
from moe_jax.study.interconnect.whole import MODELS, job_of, plain, software
from moe_jax.study.results import publish

QUESTION = "When does software replace a faster link between GPUs, and when can it not?"
GIGA = 1e9
SLACK = 1.1
"""A block within this factor of its products alone is called hidden."""


@dataclass(frozen=True)
class Settings:
    """Predicts a block and whole models over links, nodes and software ideas."""

    out: str = "runs/lever_interconnect"
    """Folder for result.json and plots."""
    seed: int = 0
    """Unused, since a prediction draws nothing."""
    quick: bool = False
    """One and eight nodes, and no whole models."""
    tokens: int = 4096
    """Tokens of a device."""
    nodes: tuple[int, ...] = (1, 2, 4, 8)
    """Nodes of 8 GPUs over which the experts are split."""
    networks: tuple[float, ...] = (12, 24, 48.5, 97)
    """GB/s of a device between nodes: Ethernet of 100 Gb/s, InfiniBand of 200, 400 and 800 Gb/s."""

    def __post_init__(self) -> None:
        require(self.tokens > 0, f"tokens={self.tokens}: it must be at least 1")
        for count in self.nodes:
            require(
                count >= 1 and 256 % (8 * count) == 0,
                f"nodes has {count}: 256 experts are split over powers of two from 1 to 32 nodes",
            )
        for rate in self.networks:
            require(rate > 0, f"networks has {rate}: it must be positive")

    def block(self, nodes: int) -> BlockOn:
        """A block of DeepSeek-V3 on nodes of 8 H100."""
        block = block_of(PRESETS["deepseek_v3"].model, 4096)
        return BlockOn(block, Cluster(find_card("h100"), 8 * nodes), self.tokens)


def with_interval(name: str, block: BlockOn, way: Way) -> Measurement:
    """Milliseconds of a way, between the ends of the slowdown beside transfers."""
    ends = [replace(block, beside=end).seconds(way) for end in (BESIDE.fast, BESIDE.slow)]
    unit = f"ms of F + Bi + W, PREDICTED ({100 * block.hidden(way):.0f}% of the exchange hidden)"
    bounds = [1e3 * end for end in ends]
    return Measurement(name, 1e3 * block.seconds(way), unit, interval=bounds)


def of_block(settings: Settings) -> list[Measurement]:
    """Each way on each link, and the best combination."""
    rows = []
    for nodes in settings.nodes:
        here = settings.block(nodes)
        places = [(name, here.at(rate, inside=True)) for name, rate in link_rates()]
        if nodes > 1:
            places += [
                (f"network_{rate:g}", here.at(GIGA * rate, inside=False))
                for rate in settings.networks
            ]
        for place, block in places:
            name = f"v3_block.{nodes}_nodes.{place}"
            for way in WAYS:
                rows.append(with_interval(f"{name}.{way.name.replace(' ', '_')}", block, way))
            rows.append(with_interval(f"{name}.best", block, block.best()))
        rows.append(
            Measurement(
                f"v3_block.{nodes}_nodes.products",
                1e3 * here.compute(PLAIN),
                "ms of F + Bi + W, PREDICTED, no exchange",
            )
        )
    return rows


Needed = dict[int, tuple[float | None, float | None]]
"""Nodes -> rates of the link for the best software: to equal the plain way on the card's own link,
and to be hidden."""


def needed(settings: Settings) -> Needed:
    """The link is the one inside of the node for one node, and the network for more."""
    found = {}
    for nodes in settings.nodes:
        here = settings.block(nodes)
        inside = nodes == 1
        equal = equal_rate(here, here.seconds(PLAIN), inside=inside)
        hidden = equal_rate(here, SLACK * here.compute(PLAIN), inside=inside)
        found[nodes] = (equal, hidden)
    return found


def of_needed(settings: Settings, found: Needed) -> list[Measurement]:
    """The rates in GB/s, and the card's own rate over the first one."""
    rows = []
    card = find_card("h100")
    for nodes, (equal, hidden) in found.items():
        own = card.link.rate if nodes == 1 else card.network.rate
        name = f"v3_block.{nodes}_nodes"
        rows += [
            Measurement(
                f"{name}.equal_rate",
                None if equal is None else equal / GIGA,
                f"GB/s for software to equal the plain way at {own / GIGA:g} GB/s, PREDICTED",
            ),
            Measurement(
                f"{name}.replaces",
                None if equal is None else own / equal,
                "x: the faster link that software replaces, PREDICTED",
            ),
            Measurement(
                f"{name}.hidden_rate",
                None if hidden is None else hidden / GIGA,
                f"GB/s for software to be within {SLACK}x of products alone, PREDICTED",
            ),
        ]
    return rows


def of_whole(settings: Settings) -> list[Measurement]:
    """Updates of whole models by link and nodes, without and with software."""
    rows = []
    for model in MODELS:
        for nodes in settings.nodes:
            for link, rate in link_rates():
                job = job_of(model, nodes, rate)
                name = f"{model}.{nodes}_nodes.{link}"
                alone = plain(job)
                best = software(job)
                slow = None if alone is None else alone.update.seconds
                fast = None if best is None else best.update.seconds
                ratio = None if slow is None or fast is None else slow / fast
                words = "does not fit" if best is None else best.name
                rows += [
                    Measurement(f"{name}.plain", slow, "s of an update, PREDICTED"),
                    Measurement(
                        f"{name}.software",
                        fast,
                        f"s of an update, PREDICTED ({words})",
                        f"{name}.plain",
                        ratio,
                    ),
                ]
    return rows


def of_anchors(found: Sequence[Anchor]) -> list[Measurement]:
    """Measured by others, and predicted."""
    rows = []
    for anchor in found:
        unit = f"{anchor.unit}, MEASURED by others ({anchor.source})"
        rows.append(Measurement(f"anchor.{anchor.name}.measured", anchor.measured, unit))
        rows.append(
            Measurement(
                f"anchor.{anchor.name}.predicted",
                anchor.predicted,
                f"{anchor.unit}, PREDICTED",
                "measured",
                anchor.predicted / anchor.measured,
            )
        )
    return rows


def verdict(rows: Sequence[Measurement]) -> str:
    """Where software is enough, where it is not."""
    values = {row.name: row.value for row in rows}
    first = values["v3_block.1_nodes.equal_rate"]
    words = ["PREDICTED, no GPU was there."]
    if first is not None:
        words.append(
            f"In one node software on a link of {first:.0f} GB/s equals the plain way on NVLink 4, "
            f"a link {values['v3_block.1_nodes.replaces']:.0f} times as fast."
        )
    last = max(int(name.split(".")[1].split("_")[0]) for name in values if ".equal_rate" in name)
    equal = values[f"v3_block.{last}_nodes.equal_rate"]
    hidden = values[f"v3_block.{last}_nodes.hidden_rate"]
    if equal is not None and hidden is not None:
        words.append(
            f"On {last} nodes it equals the plain way on InfiniBand of 48.5 GB/s at {equal:.0f} "
            f"GB/s, and all but 10% is hidden from {hidden:.0f} GB/s on. Below that the bytes "
            "decide, and no schedule replaces the link."
        )
    return " ".join(words)


def main(argv: list[str]) -> None:
    """Predicts, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    if settings.quick:
        settings = replace(settings, nodes=(1, 8), networks=(48.5,))
    out = output_folder(settings.out)
    found = anchors()
    rates = needed(settings)
    rows = [*of_block(settings), *of_needed(settings, rates), *of_anchors(found)]
    if not settings.quick:
        rows += of_whole(settings)
    publish(
        out,
        experiment="lever_interconnect",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict(rows),
        figures={
            "interconnect": draw_interconnect(
                settings.block(1), settings.block(max(settings.nodes)), rates, found
            )
        },
    )


if __name__ == "__main__":
    program(main)
