"""Published steps of pipelines, by formula: this project's engines do not have their layouts.

moe_jax/predict/layouts has a block's products and exchange, and the schedules. What a published
program does besides is added here, with TERMS:

    rest      a kept number is moved `passes` times: written and read forward, read backward, and
              its gradient written and read. A launch takes `launch` seconds
    tensor    devices that share a sequence: a gather and a scatter of activations forward, and
              three of them backward
    host      no part of a block is faster than the host, which takes `host` seconds a kernel
    sending   multiprocessors that compute nothing, because they exchange rows
    fp8       speed of a block with FP8 over bfloat16
    head      the device with the head has one block less, the head's products, and LOGIT bytes for
              each logit

Memory is not among it.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from moe_jax.cli import parse
from moe_jax.config import ModelConfig
from moe_jax.config.presets import PRESETS
from moe_jax.model.count import count_parameters
from moe_jax.predict.hardware import Card, find_card
from moe_jax.predict.layouts.block import Recompute, block_of
from moe_jax.predict.layouts.block_work import BlockWork, Cluster, Part
from moe_jax.predict.layouts.exchange import NUMBER, Exchange
from moe_jax.predict.layouts.pipelined import pipelined, schedule_on
from moe_jax.predict.step_time import Term

LENGTH = 4096
"""Tokens of a sequence. A micro-batch is one sequence."""
LAUNCHES = {"forward": 75, "backward_input": 120, "backward_weight": 30}
"""Kernels of a block beside the products of its experts. One of Qwen3-30B's has 225 in this
project's compiled program."""
PRODUCTS = 2
"""Kernels of an expert in each of the three parts: Transformer Engine launches one a product."""
LOGIT = 40
"""Bytes that a loss moves for a logit if it is not fused: it is written and cast to float32, and
read for the maximum, the exponential and the sum, and the same backward. A count of ours."""
TERMS: dict[str, Term] = {
    "products": Term(
        1.0,
        667 / 600,
        535 / 600,
        "of block_work.PRODUCT_SHARE: 667 and 535 TFLOP/s in Megatron-LM's moe_perf, 8 H100",
    ),
    "passes": Term(5, 3, 8, "a count, with more and with less fusion"),
    "launch": Term(3e-6, 1.5e-6, 6e-6, "seconds, moe_kernels.predict.LAUNCH"),
    "host": Term(27.5e-6, 15e-6, 35e-6, "the row that calibrates"),
    "sending": Term(20, 0, 24, "of an H100's 132: arXiv:2412.19437, section 3.2.2, and DeepEP"),
    "fp8": Term(
        14.19 / 12.83,
        1.5,
        1.0,
        "a DeepSeek layer, forward and backward, with HybridEP (moe_perf); 1.5 is assumed",
    ),
    "link": Term(1.0, 1.1, 0.8, "of the rate in links.toml"),
}


@dataclass(frozen=True)
class PublishedBlock(BlockWork):
    """A block as a published program runs it."""

    tensor: int = 1
    """Devices that share a sequence, and the matrices outside of the experts."""
    fp8: bool = False
    terms: Mapping[str, float] | None = None

    @property
    def forward(self) -> Part:
        return self._more(super().forward, "forward", 2 / 5, transfers=2)

    @property
    def backward_input(self) -> Part:
        return self._more(super().backward_input, "backward_input", 3 / 5, transfers=3)

    @property
    def backward_weight(self) -> Part:
        return self._more(super().backward_weight, "backward_weight", 0.0, transfers=0)

    def _more(self, part: Part, name: str, share: float, transfers: int) -> Part:
        assert self.terms is not None
        slower = 1 / self.terms["fp8"] if self.fp8 else 1.0
        if self.expert_axis > 1:
            processors = self.cluster.card.xla["core_count"]
            slower *= processors / (processors - self.terms["sending"])
        kernels = LAUNCHES[name] + PRODUCTS * self.block.experts // self.expert_axis
        moved = share * self.terms["passes"] * self.tokens * self.block.levels["none"].kept
        own = NUMBER * self.tokens * self.block.width
        seconds = slower * part.compute
        seconds += moved / self.cluster.card.memory_rate + kernels * self.terms["launch"]
        seconds += transfers * self.cluster.seconds("all-gather", own, self.tensor)
        # A PyTorch program without CUDA graphs.
        return Part(
            max(seconds, kernels * self.terms["host"]), part.exchange, slower * part.experts
        )


@dataclass(frozen=True)
class PipelineRow:
    """A measured step of a pipeline."""

    name: str
    model: str
    """Options of a run of this model."""
    hardware: str
    devices: int
    pipe: int
    expert: int
    """Neighbouring devices that share the experts."""
    sequences: int
    """Of a step."""
    seconds: float
    source: str
    differences: str
    """Between their program and the formula."""
    tensor: int = 1
    pieces: int = 1
    """Parts of the model on a device (virtual pipeline)."""
    schedule: str = "interleaved"
    recompute: Recompute = "none"
    nodes: int = 0
    """Nodes that a token may use. 0: all."""
    fp8: bool = False
    calibrates: bool = False

    @cached_property
    def config(self) -> ModelConfig:
        """The model."""
        return parse(shlex.split(self.model), PRESETS).resolved().model

    def block(self, terms: Mapping[str, float]) -> PublishedBlock:
        """A block for a micro-batch. A token's copies travel once to each node and device."""
        return PublishedBlock(
            block_of(self.config, LENGTH),
            Cluster(_priced(find_card(self.hardware), terms), self.devices),
            tokens=LENGTH // self.tensor,
            expert_axis=self.expert,
            recompute=self.recompute,
            route=Exchange(True, self.nodes, self.fp8, chunks=1),
            tensor=self.tensor,
            fp8=self.fp8,
            terms=terms,
        )


def _priced(card: Card, terms: Mapping[str, float]) -> Card:
    return replace(
        card,
        gemm_flops=terms["products"] * card.product_rate,
        link=replace(card.link, rate=terms["link"] * card.link.rate),
        network=replace(card.network, rate=terms["link"] * card.network.rate),
    )


class Estimate(NamedTuple):
    """Seconds of a step, PREDICTED, with an interval as step_time.predict's."""

    seconds: float
    low: float
    high: float


def estimate(row: PipelineRow) -> Estimate:
    """The time of a row's step."""
    values = {name: term.value for name, term in TERMS.items()}
    seconds = row_seconds(row, values)

    def change(name: str, end: float) -> float:
        return row_seconds(row, values | {name: end}) - seconds

    less = math.hypot(*(min(0.0, change(name, term.fast)) for name, term in TERMS.items()))
    more = math.hypot(*(max(0.0, change(name, term.slow)) for name, term in TERMS.items()))
    return Estimate(seconds, seconds - less, seconds + more)


def row_seconds(row: PipelineRow, terms: Mapping[str, float]) -> float:
    """Seconds of a step with these values of TERMS.

    Embedding and head take the place of a block each, as Megatron splits its models.
    """
    work = row.block(terms)
    blocks = row.config.layers + row.config.mtp_depth + 2
    pipelines = row.devices // row.pipe // row.tensor
    schedule = schedule_on(row.schedule, row.pipe, row.sequences // pipelines, row.pieces)
    return pipelined(work, blocks, schedule).seconds * _slowest(row, work, blocks / row.pipe)


def _slowest(row: PipelineRow, work: PublishedBlock, blocks: float) -> float:
    """Work of the device with the head over that of one with `blocks` blocks, at least 1."""
    if row.schedule == "dualpipe":  # a device has stages of both ends
        return 1.0
    parts = (work.forward, work.backward_input, work.backward_weight)
    block = sum(part.seconds(work.parts) for part in parts)
    counts = count_parameters(row.config)
    products = 6 * LENGTH * counts.embedding / work.cluster.product_rate
    moved = LOGIT * LENGTH * counts.embedding / row.config.width / work.cluster.card.memory_rate
    head = (products + moved) / row.tensor
    return max(1.0, (blocks - 1 + head / block) / blocks)
