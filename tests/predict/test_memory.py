"""Bytes by kind: XLA's dumps by hand."""

import pytest

from moe_jax.base.errors import UserError
from moe_jax.cli import parse
from moe_jax.config.presets import PRESETS
from moe_jax.predict.lower import check_visible
from moe_jax.predict.memory import fullest, heap_places, live_ranges

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
        (["--distill.teacher", "smollm2"], "a teacher is not in the program"),
    ],
)
def test_what_a_program_does_not_show_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        check_visible(parse(["tiny", *options], PRESETS))
