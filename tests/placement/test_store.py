"""Files of experts name their damage; the store gives the right experts within its budget."""

import os
from concurrent.futures import ThreadPoolExecutor, wait

import jax
import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.placement.files import ExpertFiles, layer_name, write_experts
from moe_jax.placement.memory import SharedMemory
from moe_jax.placement.policy import LFU, LRU, ONLINE, Static, make_policy
from moe_jax.placement.store import ExpertStore

LAYERS, EXPERTS, WIDTH, HIDDEN = 3, 5, 6, 4


def matrices(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [
        (
            rng.normal(size=(EXPERTS, WIDTH, 2 * HIDDEN)).astype(dtype),
            rng.normal(size=(EXPERTS, HIDDEN, WIDTH)).astype(dtype),
        )
        for _ in range(LAYERS)
    ]


def record_start(files, layer, expert):
    file = files.records.files["parameters"][layer]
    return file.start + expert * file.stride


@pytest.fixture
def folder(tmp_path):
    assert write_experts(tmp_path / "experts", matrices()) == LAYERS
    return tmp_path / "experts"


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """The same as `folder`, for tests that damage nothing."""
    path = tmp_path_factory.mktemp("experts")
    write_experts(path, matrices())
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jax.numpy.bfloat16])
@pytest.mark.parametrize("direct", [False, True])
def test_what_is_written_is_read(tmp_path, dtype, direct):
    if direct and not hasattr(os, "O_DIRECT"):
        pytest.skip("no O_DIRECT here")
    content = matrices(dtype)
    write_experts(tmp_path, content)
    try:
        files = ExpertFiles(tmp_path, direct=direct)
    except UserError as error:
        pytest.skip(str(error))  # a file system without O_DIRECT
    assert (files.layers, files.experts) == (LAYERS, EXPERTS)
    assert files.expert_bytes == 3 * WIDTH * HIDDEN * np.dtype(dtype).itemsize
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            gate_up, down = files.read(layer, expert)
            np.testing.assert_array_equal(gate_up, content[layer][0][expert])
            np.testing.assert_array_equal(down, content[layer][1][expert])
    files.close()


def test_the_files_are_safetensors(folder):
    from safetensors.numpy import load_file

    tensors = load_file(folder / layer_name(1))
    np.testing.assert_array_equal(tensors["expert-00003.down"], matrices()[1][1][3])


def test_a_corrupt_expert_is_named_and_the_others_are_read(folder):
    path = folder / layer_name(1)
    content = bytearray(path.read_bytes())
    content[record_start(ExpertFiles(folder), 1, 3) + 7] ^= 1
    path.write_bytes(content)
    files = ExpertFiles(folder)
    files.read(1, 2)
    with pytest.raises(UserError, match=r"expert 3 of layer 1 in .*layer-001.* is corrupt"):
        files.read(1, 3)


@pytest.mark.parametrize("cut", ["header", "first", "last"])
def test_a_truncated_file_is_named(folder, cut):
    path, files = folder / layer_name(2), ExpertFiles(folder)
    starts = {"first": record_start(files, 2, 0), "last": record_start(files, 2, 4)}
    size = {"header": 20, **{which: start + 7 for which, start in starts.items()}}
    os.truncate(path, size[cut])
    with (
        pytest.raises(UserError, match=r"expert 4 of layer 2 .* truncated")
        if (cut == "last")
        else pytest.raises(UserError, match="truncated")
    ):
        files.read(2, 4)  # the file shrinks while it is open
    expected = {"header": "inside its header", "first": "expert 0 and", "last": "expert 4 and"}
    with pytest.raises(
        UserError, match=rf"layer-002.parameters.safetensors is truncated.*{expected[cut]}"
    ):
        ExpertFiles(folder)


def test_missing_and_foreign_files_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="holds no experts"):
        ExpertFiles(tmp_path)
    (folder / layer_name(0)).unlink()
    with pytest.raises(UserError, match=r"layer-000.parameters.safetensors is missing"):
        ExpertFiles(folder)
    (folder / layer_name(0)).write_bytes((5).to_bytes(8, "little") + b"[1,2]" * 9)
    with pytest.raises(UserError, match="no file of experts"):
        ExpertFiles(folder)


def budget(experts):
    return experts * 3 * WIDTH * HIDDEN * 4


@pytest.mark.parametrize("name", ["static", *ONLINE])
@pytest.mark.parametrize("slots", [2, 5, 9, 19])
@pytest.mark.parametrize(
    ("host", "on_miss", "blocking"),
    [
        (0, "copy", False),
        (0, "copy", True),
        (4, "copy", False),
        (4, "copy", True),
        (4, "compute", False),
    ],
)
def test_the_right_experts_within_the_budget(whole_files, name, slots, host, on_miss, blocking):
    rng, content = np.random.default_rng(slots), matrices()
    policy = make_policy(name, LAYERS * EXPERTS, LAYERS, np.arange(LAYERS * EXPERTS))
    with ExpertStore(
        ExpertFiles(whole_files),
        policy,
        device_bytes=budget(slots) + 3,
        working_set=2,
        host_bytes=budget(host),
        look_ahead=2,
        blocking=blocking,
        on_miss=on_miss,
    ) as store:
        if name == "static":
            store.fill()
        for step in range(60):
            layer = step % LAYERS
            experts = np.sort(rng.permutation(EXPERTS)[: rng.integers(1, 3)])
            ahead = rng.permutation(EXPERTS)[:3] if layer + 1 < LAYERS else None
            for expert, lease in zip(experts, store.fetch(layer, experts, ahead), strict=True):
                np.testing.assert_array_equal(lease.matrices[0], content[layer][0][expert])
                np.testing.assert_array_equal(lease.matrices[1], content[layer][1][expert])
        traffic = store.traffic
        assert 0 < traffic.peak_bytes <= budget(slots)
        assert len(store.tiers.host) <= host
        assert not store.tiers.host.keys() & store.tiers.resident.keys()
        assert traffic.hits + traffic.ahead + traffic.computed <= traffic.uses
        assert (traffic.computed > 0) == (on_miss == "compute" and slots < 19)
        copied = traffic.disk_bytes + traffic.host_bytes
        assert copied == len(traffic.copies) * store.files.expert_bytes
        if host == 0:
            assert traffic.host_bytes == 0
        if slots == 19:
            assert store.residency.placement.capacity == LAYERS * EXPERTS


def test_a_budget_below_the_working_set_states_the_minimum(folder):
    files = ExpertFiles(folder)
    with pytest.raises(UserError, match=f"2 experts of 288 bytes need at least {budget(2)}"):
        ExpertStore(files, LRU(15), device_bytes=budget(2) - 1, working_set=2)


def test_a_failing_read_stops_the_fetch_and_names_the_expert(folder, monkeypatch):
    with ExpertStore(ExpertFiles(folder), LFU(15), device_bytes=budget(4), working_set=2) as store:
        store.fetch(0, np.array([0, 1]))

        def broken(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(UserError, match=r"expert 3 of layer 1 .*: Input/output error"):
            store.fetch(1, np.array([3]))
        store.fetch(0, np.array([0, 1]))  # residents are still there


def test_predictions_that_come_true_are_counted_and_wrong_ones_switch_off(folder):
    with ExpertStore(
        ExpertFiles(folder),
        Static(np.zeros(15)),
        device_bytes=budget(4),
        working_set=2,
        look_ahead=2,
        recall_floor=0.5,
    ) as store:
        for _ in range(5):
            store.fetch(0, np.array([0]), [2, 3])
            store.fetch(1, np.array([2, 3]))
        assert store.traffic.ahead == 10
        assert store.traffic.wasted_bytes == 0
        assert store.residency.ahead.recall == 1
        for _ in range(40):
            store.fetch(0, np.array([0]), [0, 1])
            store.fetch(1, np.array([2, 3]))
        assert not store.residency.ahead.active
        copies = len(store.traffic.copies)
        store.fetch(0, np.array([0]), [2, 3])
        assert not store.tiers.arriving
        assert len(store.traffic.copies) == copies + 1
        for _ in range(60):
            store.fetch(0, np.array([0]), [2, 3])
            store.fetch(1, np.array([2, 3]))
        assert store.residency.ahead.active


def test_eight_bit_copies_are_close_and_a_quarter_of_the_size(tmp_path):
    content = matrices()
    content[0][0][1, :, 2] = 0  # a column of zeros has no scale of its own
    write_experts(tmp_path, content, low_bit=True)
    files = ExpertFiles(tmp_path)
    assert files.low_bit
    assert files.dtype == np.float32
    for layer, (gate_up, down) in enumerate(content):
        for expert in range(EXPERTS):
            for low, exact in zip(
                files.read(layer, expert), (gate_up[expert], down[expert]), strict=True
            ):
                half_a_step = np.abs(exact).max(axis=0) / 127 / 2
                assert (np.abs(low - exact) <= half_a_step * (1 + 1e-5)).all()


def test_absent_experts_of_little_weight_are_served_by_eight_bit_copies(folder, tmp_path):
    write_experts(tmp_path / "low", matrices(), low_bit=True)
    exact, low = ExpertFiles(folder), ExpertFiles(tmp_path / "low")
    with ExpertStore(
        exact, LRU(15), device_bytes=budget(5), working_set=2, low_bit=low, low_bit_share=0.5
    ) as store:
        share = np.array([0.9, 0.1])
        heavy, light = store.fetch(0, np.array([1, 3]), share=share)
        np.testing.assert_array_equal(heavy.matrices[0], matrices()[0][0][1])
        np.testing.assert_array_equal(light.matrices[0], low.read(0, 3)[0])
        assert store.traffic.low_bit == 1
        store.settle()
        assert set(store.tiers.resident) == {1}  # what stood in is not kept
        again = store.fetch(0, np.array([3]), share=np.array([0.6]))
        np.testing.assert_array_equal(again[0].matrices[0], matrices()[0][0][3])


def test_the_sizes_that_a_device_computes_with_in_place_are_read_without_a_copy(tmp_path):
    rng = np.random.default_rng(0)
    large = [(rng.normal(size=(4, 16, 32)), rng.normal(size=(4, 16, 16)))]
    write_experts(tmp_path, [tuple(m.astype(np.float32) for m in layer) for layer in large])
    files = ExpertFiles(tmp_path)
    memory = SharedMemory(files, 1, jax.local_devices()[0])
    first = memory.read(0, 1, files)
    address = first.matrices[0].unsafe_buffer_pointer()
    memory.release(first)
    second = memory.read(0, 2, files)
    assert second.matrices[0].unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(second.matrices[0], large[0][0][2].astype(np.float32))


def test_many_misses_with_a_full_host_tier_end_with_the_last_step(tmp_path):
    """More copies down than readers, and nobody who fetches again: the exit must not wait."""
    rng = np.random.default_rng(0)
    layer = tuple(rng.normal(size=size).astype(np.float32) for size in ((24, 6, 8), (24, 4, 6)))
    with pytest.raises(UserError, match=r"float64.* cannot be written"):
        write_experts(tmp_path, [tuple(part.astype(float) for part in layer)])
    write_experts(tmp_path, [layer, layer])
    files = ExpertFiles(tmp_path)
    size = files.expert_bytes
    with ExpertStore(
        files, LRU(48), device_bytes=12 * size, working_set=12, host_bytes=12 * size,
        on_miss="compute",
    ) as store:  # fmt: skip
        for step in range(5):
            store.fetch(step % 2, np.arange(12) + 12 * (step % 3 == 0))
            store.settle()


def test_residents_are_handed_over_before_others_are_read(whole_files):
    files = ExpertFiles(whole_files)
    with ExpertStore(files, LRU(15), device_bytes=budget(6), working_set=3) as store:
        store.fetch(0, np.array([1, 3]))
        order = []

        def arrived(index, lease):
            order.append((index, len(store.traffic.copies)))
            np.testing.assert_array_equal(lease.matrices[0], files.read(0, (1, 2, 3)[index])[0])

        store.fetch(0, np.array([1, 2, 3]), arrived=arrived)
        assert order == [(0, 2), (2, 2), (1, 3)]


def test_a_layer_that_misses_takes_the_places_of_others(folder):
    """Five places: one is for a passing expert, and yet all three misses come, and stay."""
    with ExpertStore(
        ExpertFiles(folder), LRU(15), device_bytes=budget(5), working_set=3
    ) as store:  # fmt: skip
        for layer, experts in ((0, [0, 1]), (1, [0, 1]), (2, [0, 1, 2]), (0, [0])):
            store.fetch(layer, np.array(experts))
        store.settle()
        assert store.traffic.peak_bytes <= budget(5)
        assert np.flatnonzero(store.residency.placement.resident).tolist() == [0, 10, 11, 12]


def test_more_experts_than_the_working_set_are_refused(folder):
    with (
        ExpertStore(ExpertFiles(folder), LRU(15), device_bytes=budget(4), working_set=2) as store,
        pytest.raises(UserError, match=r"3 experts of one layer .* working set of 2"),
    ):
        store.fetch(0, np.array([0, 1, 2]))


def test_a_prediction_that_could_not_be_read_is_forgotten(folder, monkeypatch):
    with ExpertStore(
        ExpertFiles(folder),
        LRU(15),
        device_bytes=budget(6),
        working_set=2,
        look_ahead=2,
        host_bytes=budget(4),
    ) as store:

        def broken(*_):
            raise OSError(5, "Input/output error")

        store.fetch(0, np.array([0]))
        store.settle()
        with monkeypatch.context() as broken_disk:
            broken_disk.setattr(os, "preadv", broken)
            store.fetch(0, np.array([0]), [3])
            wait(store.tiers.arriving.values())
        for expert in (1, 3):  # the prediction was wrong, and then it is right
            (lease,) = store.fetch(1, np.array([expert]))
            np.testing.assert_array_equal(lease.matrices[0], matrices()[1][0][expert])


def test_a_lease_ends_with_the_next_fetch(whole_files):
    with ExpertStore(
        ExpertFiles(whole_files), LRU(15), device_bytes=budget(4), working_set=2
    ) as store:
        (lease,) = store.fetch(0, np.array([1]))
        store.settle()
        output = lease.used_by(lease.matrices[0] * 2)
        store.fetch(1, np.array([2]))
        assert output.is_ready()
        with pytest.raises(AssertionError, match="fetched before the last fetch"):
            _ = lease.matrices


def test_a_store_belongs_to_one_thread(whole_files):
    with (
        ExpertStore(
            ExpertFiles(whole_files), LRU(15), device_bytes=budget(4), working_set=2
        ) as store,
        ThreadPoolExecutor(1) as other,
    ):
        store.fetch(0, np.array([1]))
        for call in (store.settle, store.fill, store.reset, lambda: store.fetch(0, np.array([1]))):
            with pytest.raises(AssertionError, match="called from a second thread"):
                other.submit(call).result()
