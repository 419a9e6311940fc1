"""The prediction of launches follows from the stated model: counts by hand on small cases."""

import numpy as np
import pytest

pytest.importorskip("triton")

from moe_kernels.bench.shapes import Shape
from moe_kernels.launch import MULTIPROCESSORS
from moe_kernels.predict import (
    DEVICES,
    Device,
    LaunchTime,
    Predictor,
    balanced_routing,
    forward_launches,
    launch_name,
    matrix_gradient,
    product,
    routing_launches,
    train_launches,
)
from moe_kernels.predict.device import LAUNCH
from moe_kernels.predict.layers import BACKWARD
from moe_kernels.predict.matrix_gradient import MatrixTiles
from moe_kernels.predict.routing import routing_of
from moe_kernels.schedule import reference

PRODUCT = product.Product(
    depth=256, columns=256, halves=1, bm=128, bn=128, bk=64, stages=3, group=2, resident=1,
    special=0, threads=256, stored=1, gathered=False,
)  # fmt: skip
DEVICE = Device(
    name="two", arch=90, multiprocessors=2, gemm=1e12, memory=1e11, l2_bytes=1e6, l2_rate=1e12,
    l2_rate_low=5e11, latency=1e-6, special=1e9,
)  # fmt: skip
LAYER = Shape(tokens=512, width=256, hidden=512, experts=4, per_token=2)
AUDIT = {
    "registers": 170, "spill_bytes": 0, "shared_bytes": 147456, "cp_async": 36, "special": 129,
    "occupancy": 0.125, "config": "bf16",
}  # fmt: skip
"""What the audit says of a kernel with 8 warps and three buffers of 48 KiB."""


@pytest.fixture
def predictor(monkeypatch) -> Predictor:
    """Of LAYER, without Triton's compiler."""
    from moe_kernels.audit import compile as audit

    monkeypatch.setattr(audit, "compile_launch", lambda launch, arch: dict(AUDIT))
    return Predictor(balanced_routing(LAYER, 0), DEVICES["H100"])


def test_the_order_of_tiles_is_the_kernels():
    """Three blocks of expert 0, none of 1, one of 2, two columns each, groups of two blocks."""
    order = product.order(np.array([300, 0, 1]), PRODUCT)
    assert order == [
        (0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 2, 0), (0, 2, 1), (2, 3, 0), (2, 3, 1),
    ]  # fmt: skip
    block_expert = np.array([0, 0, 0, 2])
    starts = np.array([0, 384, 384])
    counts = np.array([300, 0, 1])
    for tile, (expert, block, column) in enumerate(order):
        first = starts[expert] // 128
        blocks = -(-counts[expert] // 128)
        own = tile // 2
        assert block_expert[own] == expert
        group = first + (own - first) // 2 * 2
        size = min(2, first + blocks - group)
        within = tile - group * 2
        assert (block, column) == (group + within % size, within // size)


def test_what_fits_in_l2_is_read_once():
    tiles = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    source = np.arange(256).reshape(2, 128)
    row = 512
    panel = 512 * 128
    written = 4 * 128 * 128 * 2
    large = product.dram_bytes(tiles, source, PRODUCT, DEVICE)
    assert large == 256 * row + 2 * panel + written
    none = product.dram_bytes(tiles, source, PRODUCT, DEVICE._replace(l2_bytes=0))
    # Two multiprocessors: the tiles of a wave share their rows, nothing outlives the wave.
    assert none == 256 * row + 4 * panel + written


def test_gathered_rows_are_shared_by_the_blocks_that_read_the_same_tokens():
    tiles = [(0, 0, 0), (1, 1, 0)]
    source = np.stack([np.arange(128), np.where(np.arange(128) < 100, np.arange(128), -1)])
    gathered = PRODUCT._replace(gathered=True)
    panels = 2 * 512 * 128
    written = 2 * 128 * 128 * 2
    assert product.dram_bytes(tiles, source, gathered, DEVICE) == 128 * 512 + panels + written
    # Rows of its own: every block reads its rows, and padding is not read.
    assert product.dram_bytes(tiles, source, PRODUCT, DEVICE) == 228 * 512 + panels + written
    # The hidden gradient reads z (two numbers) and writes dz and s A (three).
    more = gathered._replace(loaded=2, stored=3)
    expected = 128 * 512 + panels + 5 * written
    assert product.dram_bytes(tiles, source, more, DEVICE) == expected


def test_a_step_without_asynchronous_copies_waits():
    flops = 2 * 128 * 128 * 64
    size = 2 * 256 * 64
    compute = flops * 2 / 1e12
    copy = size * 2 / 1e12
    one = product.step_seconds(PRODUCT._replace(stages=1), DEVICE)
    assert one == pytest.approx(1e-6 + copy + compute)
    assert product.step_seconds(PRODUCT, DEVICE) == pytest.approx(compute)
    slow = DEVICE._replace(latency=1e-3)
    assert product.step_seconds(PRODUCT, slow) == pytest.approx((1e-3 + copy) / 2)


def test_a_launch_by_hand():
    step = product.step_seconds(PRODUCT, DEVICE)
    entry = PRODUCT._replace(special=10, gathered=True, loaded=2, stored=3)
    epilogue = 128 * 128 * 5 * 2 * 2 / 1e12 + 10 * 256 / 1e9
    tile = 4 * step + epilogue + 4e-6  # a row's number, the first step, z, the end
    assert product.tile_seconds(entry, 4, DEVICE) == pytest.approx(tile)
    # Five tiles on two multiprocessors are three waves.
    assert product.launch_seconds(5, 0, entry, DEVICE) == pytest.approx(3 * tile + LAUNCH)
    assert product.launch_seconds(5, 1e9, entry, DEVICE) == pytest.approx(1e-2 + LAUNCH)


def test_the_matrices_gradient_by_hand():
    """Experts of 64 and 192 rows: 1 and 3 steps a tile. Two tiles of a matrix, two programs."""
    entry = PRODUCT._replace(bn=256, gathered=True)
    tiles = MatrixTiles(2, 1)
    counts = np.array([64, 192])
    short = product.tile_seconds(entry, 1, DEVICE)
    long = product.tile_seconds(entry, 3, DEVICE)
    assert long - short == pytest.approx(2 * product.step_seconds(entry, DEVICE))
    found = matrix_gradient.launch_seconds(counts, 0, tiles, entry, DEVICE)
    assert found == pytest.approx(short + long + LAUNCH)
    # Three programs: the third tile starts at once, the fourth after a short one.
    three = DEVICE._replace(multiprocessors=3)
    times = [product.tile_seconds(entry, steps, three) for steps in (1, 3)]
    found = matrix_gradient.launch_seconds(counts, 0, tiles, entry, three)
    assert found == pytest.approx(sum(times) + LAUNCH)
    # Each expert: two panels of 128 columns and one of 256, read once. Four tiles are written.
    moved = (64 + 192) * 2 * (2 * 128 + 256) + 4 * 128 * 256 * 2
    assert matrix_gradient.dram_bytes(counts, tiles, entry, DEVICE) == moved


def test_an_expert_without_rows_still_writes_its_gradient():
    entry = PRODUCT._replace(bn=256, gathered=True)
    found = matrix_gradient.launch_seconds(np.array([0]), 0, MatrixTiles(1, 1), entry, DEVICE)
    assert found > LAUNCH
    assert matrix_gradient.dram_bytes(np.array([0]), MatrixTiles(1, 1), entry, DEVICE) > 0


def test_the_launches_of_training_are_the_tables_of_today():
    launches = {launch_name(x): x.constants for x in train_launches(LAYER, 90)}
    assert list(launches) == [
        "up", "down", "combine", "hidden gradient", "down gradient", "gate_up gradient",
        "input gradient", "combine, unweighted",
    ]  # fmt: skip
    assert set(BACKWARD) < set(launches)
    assert launches["up"]["SAVE"]
    assert launches["hidden gradient"]["BN"] == 128
    for name in ("down gradient", "gate_up gradient"):
        assert (launches[name]["BM"], launches[name]["BN"]) == (128, 256)
    forward = forward_launches(LAYER, 90)
    assert [launch_name(x) for x in forward] == ["up", "down", "combine"]
    assert not forward[0].constants["SAVE"]
    assert {launch_name(x) for x in routing_launches(LAYER, 90)} == {"gate", "schedule"}


def test_every_launch_is_charged_its_own_flops(predictor):
    times = {launch_name(x): predictor.time(x) for x in train_launches(LAYER, 90)}
    one = 2 * 512 * 2 * 256 * 512  # 2 T K D F
    expected = {
        "up": 2, "down": 1, "hidden gradient": 1, "down gradient": 1, "gate_up gradient": 2,
        "input gradient": 2,
    }  # fmt: skip
    for name, time in times.items():
        assert time.flops == expected.get(name, 0) * one, name
    assert sum(time.flops for time in times.values()) == 3 * LAYER.flops


def test_no_launch_is_faster_than_memory_and_the_gemm_allow(predictor):
    device = predictor.device
    for launch in train_launches(LAYER, 90):
        time: LaunchTime = predictor.time(launch)
        assert time.seconds > max(time.dram_bytes / device.memory, time.flops / device.gemm)
        assert time.seconds_low_l2 >= time.seconds


def test_the_routing_is_the_schedule():
    chosen = np.array([[0, 2], [2, 3], [0, 3], [2, 0], [3, 2]])
    found = routing_of(chosen, 5)
    rows = found.block_rows
    _, counts, _, assignment, _, _ = reference.schedule(chosen, 5, rows, len(found.token))
    np.testing.assert_array_equal(found.counts, counts)
    assignment = np.asarray(assignment).reshape(found.token.shape)
    np.testing.assert_array_equal(found.token, np.where(assignment < 10, assignment // 2, -1))
    assert (found.row[found.token < 0] == -1).all()


def test_devices_have_as_many_multiprocessors_as_the_kernels_think():
    for device in DEVICES.values():
        assert device.multiprocessors == MULTIPROCESSORS[device.arch]
        assert device.l2_rate_low < device.l2_rate
