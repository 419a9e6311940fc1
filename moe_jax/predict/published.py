"""Published measurements of training steps, and the nearest program that this project has.

A row is a step of a model on GPUs that somebody measured. `options` are those of
experiments/predict.py. `differences` says what their program does otherwise. Steps of layouts that
no program of ours has are in moe_jax/predict/published_pipelines.py.
"""

import shlex
from dataclasses import dataclass

from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model.abstract import abstract_states
from moe_jax.model.parameters import role_of

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
class State:
    """How a published program keeps a model with its gradients and its optimizer."""

    data: int
    """Devices over which the master copy and the moments of all but the experts are split."""
    expert: int = 1
    """Devices over which the experts are split, with all that belongs to them."""
    tensor: int = 1
    """Devices over which other matrices are split, with all that belongs to them."""
    weights: int = 2
    """Bytes of a weight, whole on a device but for `expert` and `tensor`."""
    gradients: int = 4
    """Bytes of a gradient, likewise."""
    split: int = 12
    """Bytes of a master copy and two moments."""

    def bytes(self, model: ModelConfig) -> int:
        """Of a device."""
        sizes = {"expert": 0, "other": 0}
        for path, leaf in nnx.to_flat_state(abstract_states(model)[0]):
            sizes["expert" if role_of(path) == "expert" else "other"] += leaf.size
        experts = sizes["expert"] // self.expert
        others = sizes["other"] // self.tensor
        whole = (self.weights + self.gradients) * (experts + others)
        return whole + self.split * (experts + others // self.data)


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
    state: State | None = None
    """None: not known, or the same as ours."""
    activations: int = 0
    """Bytes that their program keeps more than ours, by formula. `differences` says which."""
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
        state=State(data=16, expert=16, gradients=2),
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
        "deepseek_v3_4_layers_8_b200",
        "deepseek_v3 --hardware b200 --devices 8 --parallel.expert 8 --batch 64 "
        "--optim.accumulation 8 --model.layers 4 --model.dense-layers 1 --model.mtp-depth 0 "
        "--model.remat none --parallel.exchange.buffer 1",
        "MooreThreads/SimuMax docs/b200: V3, 4 layers, EP8, 8 micro-batches",
        f"{MASTER}; they drop tokens at a capacity of 1",
        seconds=1.1017,
        memory=104.30 * GIB,
        state=State(data=8, expert=8),
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
        state=State(data=8, expert=8),
    ),
    Row(
        "moonlight_8_h100",
        f"{MOONLIGHT} --hardware h100 --devices 8 --parallel.tensor 2 --parallel.expert 4 "
        "--batch 4 --model.remat none --model.gradient-dtype compute --parallel.exchange.buffer 1",
        f"{BRIDGE} skills/activation-recompute: TP2, EP8, no recomputation",
        f"{MASTER}, and moments in bfloat16 (the recipe moonlight_16b); their experts are on 8 "
        "devices, and here on 4 with half the hidden units each",
        seconds=0.4572,
        memory=36.6e9,
        state=State(data=4, expert=8, tensor=2, gradients=2, split=8),
    ),
    Row(
        "llama_8b_8_h100",
        f"{LLAMA_8B} --hardware h100_96 --devices 8 --parallel.fsdp 8 --batch 16 "
        "--data.length 8192 --model.remat dots",
        "pytorch/torchtitan benchmarks/llama3_h100_202412: FSDP8, compiled, H100 of 96 GB",
        "they keep every second product and attention's result, and all products are kept here; "
        "their memory is what PyTorch reserves",
        seconds=16 * 8192 / 6667 / 8,
        memory=77.0 * GIB,
        # Of 16,384 tokens in 32 layers: keys, the output of attention and half of SwiGLU's inputs
        # less, attention's result more.
        activations=2 * 16384 * 32 * (4096 - 1024 - 4096 - 14336),
    ),
)
