"""Bytes by kind: XLA's dumps by hand, and small programs by formula (slow)."""

from dataclasses import replace

import pytest

from moe_jax.base.errors import UserError
from moe_jax.cli import parse
from moe_jax.config.presets import PRESETS
from moe_jax.predict.absent import missing
from moe_jax.predict.hardware import find_card
from moe_jax.predict.lower import check_visible, compile_step
from moe_jax.predict.memory import KINDS, fullest, heap_places, live_ranges, memory_of

BUFFERS = """BufferAssignment:
allocation 0: size 100, parameter 0, shape |f32[25]|:
 value: <1 x @0> (size=100,offset=0): f32[25]{0}
allocation 1: size 700, preallocated-temp:
 value: <2 a @0> (size=400,offset=0): f32[100]{0}
 value: <3 b{1} (phi) @0> (size=200,offset=400): f32[50]{0}
 value: <4 c @0> (size=300,offset=400): f32[75]{0}
 value: <5 d @0> (size=300,offset=400): f32[75]{0}
allocation 2: size 8, preallocated-temp:
 value: <6 e @0> (size=8,offset=0): f32[2]{0}
"""
LIVE = """  BufferLiveRange:
    a{}:0-5
    b{1}:1-3
    c{}:4-6
    d{}:4-6
    e{}:6-7
  Live ranges at 4 (peak):
    a{}: 400 bytes (cumulative: 400 bytes)
"""


def test_places_in_the_heap():
    places = heap_places(BUFFERS)
    assert places == {
        "a": (0, 400),
        "b{1}": (400, 200),
        "c": (400, 300),
        "d": (400, 300),
        "e": (700, 8),
    }


def test_the_fullest_moment_counts_a_shared_place_once():
    found = fullest(heap_places(BUFFERS), live_ranges(LIVE))
    assert found == {(0, 400): ["a"], (400, 300): ["c", "d"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--placement.device-budget", "1MB"], "experts in tiers move between host and device"),
        (["--parallel.pipe", "2"], "cannot be traced for absent GPUs yet"),
        (["--distill.teacher", "smollm2"], "a teacher is not in the program"),
    ],
)
def test_what_a_program_does_not_show_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        check_visible(parse(["tiny", *options], PRESETS))


def small(*options: str):
    """A model of powers of two, of which every matrix divides over 8 devices."""
    sizes = (
        *("--model.width", "256", "--model.layers", "4", "--model.dense-layers", "0"),
        *("--model.moe.experts", "8", "--model.moe.shared-experts", "0", "--model.mtp-depth", "0"),
        *("--model.moe.expert-hidden", "256", "--model.moe.implementation", "xla"),
        *("--data.length", "512", "--batch", "8", "--model.no-tied-embedding"),
        *("--model.vocabulary", "4096", "--model.compute-dtype", "bfloat16"),
    )
    return parse(["tiny", *sizes, *options], PRESETS).resolved()


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize(
    "layout", [["--parallel.fsdp", "8"], ["--parallel.expert", "8"], ["--parallel.data", "8"]]
)
def test_kinds_by_formula(layout):
    """Parameters, moments and gradients to the byte, and all kinds sum to XLA's total."""
    card = find_card("h100")
    config = small(*layout, "--model.remat", "full")
    compiled = compile_step(config, card, 8, None)
    memory = memory_of(compiled, card.memory_bytes, 8)
    a = config.model.attention
    d = 256
    heads = a.heads * a.head_dim
    keys = a.kv_heads * a.head_dim
    layer = 2 * d * heads + 2 * d * keys + d * 8 + 8 * 3 * d * 256
    matrices = 4 * layer + 2 * 4096 * d
    vectors = 4 * 2 * d + d  # norms are whole on every device
    router_bias = 4 * 8
    split = 1 if "--parallel.data" in layout else 8
    own = 4 * (matrices // split + vectors)
    assert memory.kinds["parameters"] == own + 4 * router_bias
    assert memory.kinds["optimizer"] == 2 * own + 2 * 4  # AdamW's and the schedule's counters
    assert memory.kinds["update"] == 0
    assert memory.program == compiled.arguments + compiled.outputs + compiled.temporaries
    assert set(memory.kinds) == set(KINDS)
    # Gradients of all matrices are there at the end of the backward pass at the latest.
    assert memory.kinds["gradients"] <= own


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_what_is_kept_between_the_passes():
    """With full recomputation the residual stream [layers, 1, L, D] is kept, and more without."""
    card = find_card("h100")
    sizes = {}
    for remat in ("full", "none"):
        compiled = compile_step(
            small("--parallel.fsdp", "8", "--model.remat", remat), card, 8, None
        )
        sizes[remat] = memory_of(compiled, card.memory_bytes, 8).kinds["activations"]
    assert sizes["full"] >= 4 * 512 * 256 * 2
    assert sizes["none"] > 2 * sizes["full"]


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_cached_program_is_the_same(tmp_path):
    card = find_card("h100")
    config = small("--parallel.fsdp", "8")
    first = compile_step(config, card, 8, tmp_path)
    (path,) = tmp_path.iterdir()
    second = compile_step(config, card, 8, tmp_path)
    assert replace(second, lower_seconds=first.lower_seconds) == first
    path.write_bytes(b"damaged")
    again = compile_step(config, card, 8, tmp_path)
    assert again.arguments == first.arguments
