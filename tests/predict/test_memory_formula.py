"""Bytes of small programs for absent H100 by formula. All matrices divide over eight devices."""

import math
from functools import cache

import jax
import pytest

from moe_jax.cli import parse
from moe_jax.config import TrainConfig
from moe_jax.config.presets import PRESETS
from moe_jax.predict.absent import missing
from moe_jax.predict.hardware import find_card
from moe_jax.predict.hlo_text import shape_bytes
from moe_jax.predict.lower import Compiled, compile_step
from moe_jax.predict.memory import KINDS, kept_arrays, memory_of
from moe_jax.train.state import abstract_state

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
LAYERS, D, F, E, K, V, L = 4, 256, 384, 8, 2, 4096, 512
H, KV = 128, 64
"""Numbers of a token's queries, and of its keys."""
BATCH = 16
SIZES = (
    f"tiny --model.width {D} --model.layers {LAYERS} --model.moe.experts {E} "
    f"--model.moe.shared-experts 0 --model.mtp-depth 0 --model.moe.expert-hidden {F} "
    f"--model.dense-hidden {F} --model.vocabulary {V} --model.no-tied-embedding "
    f"--model.unroll 1 --model.compute-dtype bfloat16 --data.length {L} --batch {BATCH}"
)
LAYOUTS = {
    "one": (1, 1),
    "data": (8, 1),
    "fsdp": (8, 8),
    "expert": (8, 8),
}
"""(devices, devices over which a matrix is split)"""


@cache
def compiled(layout: str, *options: str) -> tuple[TrainConfig, Compiled]:
    """A program, which is compiled once for all tests."""
    axis = [] if layout in ("one", "data") else [f"--parallel.{layout}", "8"]
    config = parse([*SIZES.split(), *axis, *options], PRESETS).resolved()
    return config, compile_step(config, find_card("h100"), LAYOUTS[layout][0], None)


def numbers(dense: bool) -> tuple[int, int]:
    """Numbers of the matrices of all blocks, and of their norms."""
    attention = 2 * D * H + 2 * D * KV
    feed_forward = 3 * D * F if dense else E * 3 * D * F + D * E
    return LAYERS * (attention + feed_forward), LAYERS * 2 * D


def kept(program: Compiled) -> int:
    """Bytes of tokens that the scan over layers keeps for the backward pass."""
    arrays = kept_arrays(program, LAYERS)
    return sum(
        shape_bytes(f"{dtype}[{','.join(map(str, sizes))}]")
        for dtype, sizes in arrays
        if math.prod(sizes) >= LAYERS * L  # statistics of a layer are smaller
    )


def options(dense: bool, optimizer: str, *others: str) -> tuple[str, ...]:
    layers = str(LAYERS if dense else 0)
    return ("--model.dense-layers", layers, "--optim.optimizer", optimizer, *others)


@pytest.mark.parametrize(
    ("layout", "dense", "optimizer"),
    [
        ("one", False, "adamw"),
        ("data", True, "adamw"),
        ("fsdp", False, "adamw"),
        ("expert", False, "adamw"),
        ("expert", False, "muon"),
    ],
)
def test_state_and_batch(layout, dense, optimizer):
    """Parameters, moments, counters, batch and metrics, and all kinds are XLA's total."""
    config, program = compiled(layout, *options(dense, optimizer, "--model.remat", "full"))
    devices, parts = LAYOUTS[layout]
    memory = memory_of(program, find_card("h100").memory_bytes, devices)
    blocks, norms = numbers(dense)
    vectors = norms + D
    matrices = (blocks + 2 * V * D) // parts
    bias = 0 if dense else LAYERS * E
    assert memory.kinds["parameters"] == 4 * (matrices + vectors + bias)
    # Muon has one moment of a hidden matrix, and AdamW's two of all else: the tables, the router.
    # Three coefficients of its iteration are beside its counters.
    hidden = blocks - (0 if dense else LAYERS * D * E)
    second = 0 if optimizer == "adamw" else hidden // parts
    counters = {"adamw": 2, "muon": 6}[optimizer]
    assert memory.kinds["optimizer"] == 4 * (2 * (matrices + vectors) - second + counters)
    batch = 2 * 4 * (BATCH // devices) * (L + 1)
    progress = 3 * 4 + 8  # step, updates, skipped, and the key
    # Eight numbers, and of each layer the load of every expert and five numbers.
    metrics = 4 * (8 + (0 if dense else LAYERS * (E + 5)))
    leaves = len(jax.tree.leaves(abstract_state(config))) + 8 + (0 if dense else 6)
    table = 8 * leaves  # XLA returns a tuple, which is a list of addresses
    assert memory.kinds["other"] == batch + progress + metrics + table
    assert memory.program == program.arguments + program.outputs + program.temporaries
    assert set(memory.kinds) == set(KINDS)


def test_gradients_of_micro_batches():
    """Their sum and those of one micro-batch. XLA adds those of the two tables in place."""
    _, program = compiled(
        "data", *options(False, "adamw", "--model.remat", "full", "--optim.accumulation", "2")
    )
    memory = memory_of(program, find_card("h100").memory_bytes, 8)
    blocks, norms = numbers(False)
    assert memory.kinds["gradients"] == 4 * (2 * (blocks + norms) + 2 * V * D)


def test_full_recomputation_keeps_the_residual_stream():
    for layout in ("one", "fsdp", "expert"):
        _, program = compiled(layout, *options(False, "adamw", "--model.remat", "full"))
        rows = BATCH // LAYOUTS[layout][0]
        assert kept(program) == LAYERS * rows * L * D * 2


def test_what_a_dense_block_keeps():
    """Numbers of a token. In bfloat16: 4 D (the stream before both norms, and what they give), 3 H
    (queries, attention's result, and the same as the next product reads it), 2 KV, and 3 F of
    SwiGLU. In float32: the sums of attention's softmax, a number for each head.
    """
    _, program = compiled("data", *options(True, "adamw", "--model.remat", "none"))
    heads = 4
    token = 2 * (4 * D + 3 * H + 2 * KV + 3 * F) + 4 * heads
    assert kept(program) == LAYERS * BATCH // 8 * L * token


def test_products_are_kept_and_nothing_else_is():
    """`dots`: the stream before a block, and all products but the last one of a block."""
    _, program = compiled("data", *options(True, "adamw", "--model.remat", "dots"))
    token = 2 * (D + H + 2 * KV + D + 2 * F)
    assert kept(program) == LAYERS * BATCH // 8 * L * token


def test_buffers_of_an_exchange():
    """A device sends a row for each of K experts of a token, in slots with a quarter to spare, and
    keeps those that it received with SwiGLU's input, in blocks of an expert."""
    _, program = compiled("expert", *options(False, "adamw", "--model.remat", "none"))
    tokens = BATCH // 8 * L
    slots = 8 * (8 * math.ceil(1.25 * tokens * K / 8 / 8))
    arrays = kept_arrays(program, LAYERS)
    assert ("bf16", (LAYERS, slots, D)) in arrays
