"""Published measurements of training steps, and the nearest program that this project has.

A row is a step of a model on GPUs that somebody measured. `options` are those of
experiments/predict.py. `differences` says what their program does otherwise.
"""

import shlex
from dataclasses import dataclass

BRIDGE = "NVIDIA-NeMo/Megatron-Bridge"
GIB = 2**30
QWEN_235B = (
    "qwen3_30b_a3b --model.width 4096 --model.layers 94 --model.attention.heads 64 "
    "--model.moe.expert-hidden 1536"
)
DEEPSEEK_V2 = (
    "deepseek_v2_lite --model.width 5120 --model.dense-hidden 12288 --model.attention.heads 128 "
    "--model.attention.q-rank 1536 --model.moe.experts 160 --model.moe.expert-hidden 1536"
)
MOONLIGHT = "deepseek_v2_lite --model.vocabulary 163840 --model.dense-hidden 11264"
LLAMA_8B = (
    "mixtral_8x7b --model.dense-layers 32 --model.dense-hidden 14336 --model.vocabulary 128256"
)
QWEN_30B = (
    "qwen3_30b_a3b --hardware h100 --devices 16 --parallel.expert 16 --batch 1024 "
    "--optim.accumulation 64 --model.remat none --model.gradient-dtype compute "
    "--parallel.exchange.buffer 1"
)
MASTER = "their parameters are bfloat16 with a float32 copy that is split over devices"


@dataclass(frozen=True)
class Row:
    """A measured step."""

    name: str
    options: str
    """Of experiments/predict.py, the hardware and the devices among them."""
    source: str
    differences: str
    """Between their program and ours."""
    seconds: float | None = None
    """None: not published."""
    memory: float | None = None
    """Bytes on a device. None: not published."""
    calibrates: bool = False
    """Whether TERMS were chosen with it. It is then no test."""

    @property
    def argv(self) -> list[str]:
        """The command's arguments."""
        return shlex.split(self.options)


ROWS: tuple[Row, ...] = (
    Row(
        "qwen3_30b_16_h100_copies",
        f"{QWEN_30B} --parallel.exchange.kind copies --parallel.exchange.node 8",
        f"{BRIDGE} skills/expert-parallel-overlap: HybridEP, no overlap",
        MASTER,
        seconds=24.714,
        memory=62.17 * GIB,
    ),
    Row(
        "qwen3_30b_16_h100_all_to_all",
        QWEN_30B,
        f"{BRIDGE} skills/expert-parallel-overlap: all-to-all, no overlap, fine-tuning",
        f"{MASTER}; the sequence length is not published (4096 here)",
        seconds=41.25,
    ),
    Row(
        "qwen3_30b_16_h100_all_to_all_chunked",
        f"{QWEN_30B} --parallel.exchange.chunks 4",
        f"{BRIDGE} skills/expert-parallel-overlap: all-to-all, overlapped, fine-tuning",
        f"{MASTER}; they overlap two micro-batches, and here parts of the experts overlap",
        seconds=31.31,
    ),
    Row(
        "qwen3_30b_8_h100",
        "qwen3_30b_a3b --hardware h100 --devices 8 --parallel.expert 8 --batch 512 "
        "--optim.accumulation 16 --parallel.exchange.buffer 1",
        "NVIDIA-NeMo/Automodel docs/performance-summary.md",
        "whole blocks are recomputed here; what they recompute is not published",
        seconds=21.773,
        calibrates=True,
    ),
    Row(
        "qwen3_235b_256_h100",
        f"{QWEN_235B} --hardware h100 --devices 256 --parallel.expert 8 --parallel.fsdp 32 "
        "--batch 2048 --optim.accumulation 4 --model.gradient-dtype compute "
        "--parallel.exchange.buffer 1",
        "ModelZoo best_practice/qwen3: FSDP, TP2, EP8, full recomputation",
        "none that is known",
        seconds=17.6,
    ),
    Row(
        "deepseek_v3_2048_h800",
        "deepseek_v3 --hardware h800 --devices 2048 --parallel.expert 64 --parallel.fsdp 32 "
        "--batch 16384 --optim.accumulation 8 --model.moe.precision fp8 "
        "--parallel.exchange.kind copies --parallel.exchange.node 8 --parallel.exchange.fp8",
        "arXiv:2412.19437: 180K GPU hours a trillion tokens",
        "they have 16 stages of a pipeline (DualPipe), 15,360 sequences and FP8 in all products",
        seconds=16384 * 4096 * 180e3 * 3600 / 1e12 / 2048,
    ),
    Row(
        "deepseek_v3_4_layers_8_b200",
        "deepseek_v3 --hardware b200 --devices 8 --parallel.expert 8 --batch 64 "
        "--optim.accumulation 8 --model.layers 4 --model.dense-layers 1 --model.mtp-depth 0 "
        "--model.remat none --parallel.exchange.buffer 1",
        "MooreThreads/SimuMax docs/b200: V3, 4 layers, EP8, 8 micro-batches",
        f"{MASTER}; they drop tokens at a capacity of 1",
        seconds=1.1017,
        memory=104.30 * GIB,
        calibrates=True,
    ),
    Row(
        "deepseek_v2_4_layers_8_b200",
        f"{DEEPSEEK_V2} --hardware b200 --devices 8 --parallel.expert 8 --batch 64 "
        "--optim.accumulation 8 --model.layers 4 --model.remat none --parallel.exchange.buffer 1",
        "MooreThreads/SimuMax docs/b200: V2, 4 layers, EP8, 8 micro-batches",
        f"{MASTER}; they drop tokens at a capacity of 1",
        seconds=0.6762,
        memory=45.63 * GIB,
    ),
    Row(
        "moonlight_8_h100",
        f"{MOONLIGHT} --hardware h100 --devices 8 --parallel.tensor 2 --parallel.expert 4 "
        "--batch 4 --model.remat none --model.gradient-dtype compute --parallel.exchange.buffer 1",
        f"{BRIDGE} skills/activation-recompute: TP2, EP8, no recomputation",
        f"{MASTER}; their experts are on 8 devices, and here on 4 with half the hidden units each",
        seconds=0.4572,
        memory=36.6e9,
    ),
    Row(
        "llama_8b_8_h100",
        f"{LLAMA_8B} --hardware h100_96 --devices 8 --parallel.fsdp 8 --batch 16 --data.length 8192 "
        "--model.remat dots",
        "pytorch/torchtitan benchmarks/llama3_h100_202412: FSDP8, compiled, H100 of 96 GB",
        "they keep every second product where all are kept here",
        seconds=16 * 8192 / 6667 / 8,
        memory=77.0 * GIB,
    ),
)
