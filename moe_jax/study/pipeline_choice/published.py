"""What others measured of pipelines: against FSDP, and of schedules against 1F1B."""

from typing import NamedTuple

from moe_jax.parallel.schedules import build
from moe_jax.parallel.simulate import simulate


class Measured(NamedTuple):
    """A ratio of speeds that someone else measured."""

    name: str
    ratio: float
    """Speed of the pipeline over that of the baseline."""
    source: str
    link: float | None = None
    """GB/s of a device on the link that stages use. None: not stated."""
    note: str = ""


NVLINK = 362.0
INFINIBAND = 48.5
MARIN = "marin-community/marin #6532"
MARIN_PR = "marin-community/marin #6534"

OVER_FSDP: tuple[Measured, ...] = (
    Measured("marin, 8 H100, GPipe order, P=8, M=8", 1 / 7.06, MARIN, NVLINK),
    Measured("marin, 8 H100, GPipe order, P=8, M=16", 1 / 8.26, MARIN, NVLINK),
    Measured("marin, 8 H100, GPipe order, P=4, M=8", 1 / 4.69, MARIN, NVLINK),
    Measured("marin, 8 H100, 1F1B, P=8, M=8", 1.01 / 2.20, MARIN, NVLINK),
    Measured("marin, 8 H100, ZB-H1, P=8, M=8", 1.01 / 2.43, MARIN, NVLINK, "recomputes twice"),
    Measured("marin, 16 H100, 1F1B, P=8, M=256", 22.9 / 145, MARIN_PR, INFINIBAND),
    Measured(
        "marin with JaxPP, 64 H100, DualPipeV, P=8, M=32",
        603_327 / 271_405,
        "marin-community/marin #7024",
        INFINIBAND,
        "FSDP at a fourth of the batch, because larger ones did not fit",
    ),
    Measured(
        "marin, 32 TPU v6e",
        1.22,
        MARIN_PR,
        note="FSDP's gather crosses the data-centre network",
    ),
    Measured(
        "Qwen3-235B, 256 H100, interleaved, P=8",
        276 / 276,
        "ModelZoo best_practice/qwen3",
        INFINIBAND,
        "with overlapped experts, 245 TFLOP/s without",
    ),
    Measured(
        "GPT-OSS-120B, 64 H100, P=4",
        5824 / 7626,
        "NVIDIA-NeMo performance summaries",
        INFINIBAND,
        "two frameworks",
    ),
)
"""Where a link is InfiniBand, its rate is the usual adapter of 400 Gb/s a GPU."""

OVER_1F1B: tuple[Measured, ...] = (
    Measured("zero bubble, the memory of 1F1B", 1.23, "arXiv:2401.10241"),
    Measured("zero bubble, more memory", 1.31, "arXiv:2401.10241"),
    Measured("interleaved, 6.2B, 8 H800", 66 / 55, "sail-sg/zero-bubble #21"),
    Measured("ZB-H2, 6.2B, 8 H800", 67 / 55, "sail-sg/zero-bubble #21", note="79 GB, not 48"),
    Measured("ZB-V, 6.2B, 8 H800", 64 / 55, "sail-sg/zero-bubble #21"),
    Measured("ZB-H1, 7B, P=4, M=8", 2886 / 2590, "InternLM/InternEvo #282"),
    Measured("interleaved, 405B, 512 H100", 128 / 100, "pytorch/torchtitan #773"),
    Measured(
        "interleaved zero bubble, 405B, 512 H100",
        13 / 100,
        "pytorch/torchtitan #773",
        note="not compiled",
    ),
    Measured("DualPipeV, DeepSeek sizes, at least", 1.04, "flagos-ai/FlagScale #644"),
    Measured("DualPipeV, DeepSeek sizes, at most", 1.11, "flagos-ai/FlagScale #644"),
    Measured(
        "DualPipeV, 535B at 65,536 tokens, 192 H100",
        4.917 / 15.523,
        "marin-community/marin #9277",
        note="recomputes more and offloads",
    ),
)


class Explained(NamedTuple):
    """A measurement of marin on 8 H100 beside two simulations, all as times over FSDP's."""

    name: str
    measured: float
    schedule: float
    """If the stages work as the schedule says, and no time is lost otherwise."""
    serial: float
    """If one stage works at a time."""


def explained() -> list[Explained]:
    """marin-community/marin #6532, with FSDP's own time as the work of all stages.

    FSDP's time has F + B = 3 F. Its pipelines have 3 F, but ZB-H1 computes each forward three
    times: F, 2 F in Bi, 2 F in W.
    """
    rows = (
        ("GPipe order, P=8, M=8", "gpipe", 8, 8, 7.06, (1.0, 1.0, 1.0)),
        ("GPipe order, P=8, M=16", "gpipe", 8, 16, 8.26, (1.0, 1.0, 1.0)),
        ("GPipe order, P=4, M=8", "gpipe", 4, 8, 4.69, (1.0, 1.0, 1.0)),
        ("1F1B, P=8, M=8", "1f1b", 8, 8, 2.20 / 1.01, (1.0, 1.0, 1.0)),
        ("ZB-H1, P=8, M=8", "zb-h1", 8, 8, 2.43 / 1.01, (1.0, 2.0, 2.0)),
    )
    return [
        Explained(
            text,
            measured,
            simulate(build(name, P, M), *costs).makespan / (3 * M),
            P * sum(costs) / 3,
        )
        for text, name, P, M, measured, costs in rows
    ]
