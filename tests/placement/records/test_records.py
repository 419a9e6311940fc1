"""Records come back whatever is asked together, and every damage names expert, layer and file."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.base.scratch import MARKER
from moe_jax.placement.records.file import RecordFile, as_parts
from moe_jax.placement.records.host import HostRecords
from moe_jax.placement.records.layout import RecordLayout
from moe_jax.placement.records.pages import PAGE
from moe_jax.placement.records.store import RecordStore, claim, file_name

LAYERS = 2
EXPERTS = 9
WIDTHS = {"parameters": (35, 1100), "gradients": (1024,)}
"""Float32 numbers of each field; a record takes two pages, or exactly one."""
LAYOUTS = {
    kind: RecordLayout.of({f"field_{i}": np.zeros(width, np.float32) for i, width in enumerate(w)})
    for kind, w in WIDTHS.items()
}


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def store(request, tmp_path):
    records = RecordStore.create(tmp_path, LAYERS, EXPERTS, LAYOUTS, direct=request.param)
    yield records
    records.close()


def rows(kind, experts, seed=0):
    """Rows that tell their expert and the seed."""
    rng = [np.random.default_rng([seed, e]) for e in experts]
    return [
        np.stack([r.standard_normal(width).astype(np.float32) for r in rng])
        for width in WIDTHS[kind]
    ]


def read(store, kind, layer, experts):
    arrays = [np.full((len(experts), width), np.nan, np.float32) for width in WIDTHS[kind]]
    store.read(kind, layer, np.asarray(experts), as_parts(arrays))
    return arrays


def write(store, kind, layer, experts, seed=0):
    store.write(kind, layer, np.asarray(experts), as_parts(rows(kind, experts, seed)))


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("asked", [[0, 1, 2, 3], [8], [0, 2, 3, 8], list(range(9))])
def test_rows_come_back_whatever_is_asked_together(store, kind, asked):
    write(store, kind, 1, [0, 1, 2, 3], seed=1)
    write(store, kind, 1, [4, 6, 8], seed=1)
    write(store, kind, 0, asked, seed=2)
    stored = read(store, kind, 1, asked)
    expected = rows(kind, asked, seed=1)
    for part in expected:
        part[np.isin(asked, [5, 7])] = 0  # never written
    assert_same(stored, expected)


def test_adjacent_rows_take_one_call(store, monkeypatch):
    write(store, "parameters", 0, list(range(EXPERTS)))
    calls, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: calls.append(a) or real(*a))
    read(store, "parameters", 0, [0, 1, 2, 3, 6, 7])
    assert len(calls) == 2
    assert store.moved.read == 6 * 2 * PAGE


def test_records_in_host_memory_leave_the_disk_alone(store):
    records = HostRecords(store)
    write(records, "parameters", 0, [0, 1, 2])
    records.keep(np.array([1, EXPERTS + 4]))
    before = store.moved.written
    write(records, "parameters", 0, [1], seed=5)
    assert store.moved.written == before
    assert_same(read(records, "parameters", 0, [1]), rows("parameters", [1], seed=5))
    expected = rows("parameters", [0, 1, 2])
    for part, new in zip(expected, rows("parameters", [1], seed=5), strict=True):
        part[1] = new[0]
    assert_same(read(records, "parameters", 0, [0, 1, 2]), expected)
    records.keep(np.array([], int))  # what leaves host memory is written down
    assert store.moved.written == before + 2 * PAGE
    assert_same(read(records, "parameters", 0, [0, 1, 2]), expected)
    assert_same(read(records, "gradients", 1, [4]), [np.zeros((1, 1024), np.float32)])


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def test_a_corrupt_row_is_named(store):
    write(store, "parameters", 1, [3, 4, 5])
    flip(store.path("parameters", 1), store.files["parameters"][1].start + 4 * 2 * PAGE + 4000)
    read(store, "parameters", 1, [3, 5])
    with pytest.raises(
        UserError, match=r"^expert 4 of layer 1 in .*layer-001.parameters.safetensors is corr"
    ):
        read(store, "parameters", 1, [3, 4, 5])


def test_a_truncated_file_names_the_first_row_that_is_not_there(store):
    write(store, "gradients", 0, list(range(EXPERTS)))
    start = store.files["gradients"][0].start
    os.truncate(store.path("gradients", 0), start + 7 * PAGE + 100)
    read(store, "gradients", 0, [5, 6])
    with pytest.raises(UserError, match=r"^expert 7 of layer 0 in .* is truncated"):
        read(store, "gradients", 0, [5, 6, 7, 8])


@pytest.mark.parametrize(
    ("call", "word", "use"), [("preadv", "read", read), ("pwritev", "written", write)]
)
def test_a_failing_disk_is_one_line(store, monkeypatch, call, word, use):
    write(store, "gradients", 0, [2])

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=rf"^expert 2 of layer 0 .* cannot be {word}: Input/output"):
        use(store, "gradients", 0, [2])


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    store = RecordStore.create(tmp_path, LAYERS, EXPERTS, LAYOUTS)
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def short(descriptor, buffers, at, real=real):
            return real(descriptor, [buffers[0][:777]], at)

        monkeypatch.setattr(os, name, short)
    write(store, "parameters", 0, [2, 3])
    assert_same(read(store, "parameters", 0, [2, 3]), rows("parameters", [2, 3]))
    store.close()


def test_a_finished_store_can_be_opened_and_an_unfinished_one_cannot(store, tmp_path):
    write(store, "parameters", 1, [3, 4])
    with pytest.raises(UserError, match="is incomplete, its writer was interrupted"):
        RecordStore.open(tmp_path)
    store.finish()
    again = RecordStore.open(tmp_path)
    assert_same(read(again, "parameters", 1, [3, 4]), rows("parameters", [3, 4]))
    assert not read(again, "parameters", 0, [0])[0].any()
    flip(again.path("parameters", 1), again.files["parameters"][1].start + 3 * 2 * PAGE)
    with pytest.raises(UserError, match="expert 3 of layer 1"):
        read(again, "parameters", 1, [3])
    again.close()
    again.path("gradients", 1).write_text("{")
    with pytest.raises(UserError, match=r"layer-001.gradients.safetensors is truncated"):
        RecordStore.open(tmp_path)


def test_a_finished_store_is_safetensors(store, tmp_path):
    from safetensors.numpy import load_file

    write(store, "parameters", 1, [3, 4])
    store.finish()
    tensors = load_file(store.path("parameters", 1))
    for index, field in enumerate(rows("parameters", [3, 4])):
        np.testing.assert_array_equal(tensors[f"expert-00004.field_{index}"], field[1])
    assert not tensors["expert-00005.field_0"].any()


def test_a_folder_that_cannot_be_made_is_one_line():
    with pytest.raises(UserError, match=r"^cannot write in /proc/store: "):
        RecordStore.create(Path("/proc/store"), 1, 1, LAYOUTS)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    file = RecordFile.create(tmp_path / "file", 3, LAYOUTS["gradients"], EXPERTS)
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(UserError, match=r"^expert 2 of layer 3 .*is the disk full"):
        file.write(np.array([2]), as_parts(rows("gradients", [2])))
    with pytest.raises(UserError, match=r"file cannot be finished: No space left"):
        file.finish()
    file.close()


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_record_is_never_used_while_another_thread_writes_it(store, monkeypatch, call):
    write(store, "gradients", 0, [2, 3, 5])
    real = getattr(os, call)
    inside, leave = threading.Event(), threading.Event()

    def slow(*arguments):
        inside.set()
        leave.wait(10)
        return real(*arguments)

    use = read if call == "preadv" else write
    with monkeypatch.context() as patch:
        patch.setattr(os, call, slow)
        thread = threading.Thread(target=use, args=(store, "gradients", 0, [2, 3]))
        thread.start()
        assert inside.wait(10)
    try:
        with pytest.raises(AssertionError, match="changed while being used"):
            write(store, "gradients", 0, [3])
        write(store, "gradients", 0, [5])  # other records may be written meanwhile
        if call == "pwritev":
            with pytest.raises(AssertionError, match="used while being changed"):
                read(store, "gradients", 0, [2])
        else:
            read(store, "gradients", 0, [2])
    finally:
        leave.set()
        thread.join()
    write(store, "gradients", 0, [3])


def test_host_memory_changes_while_nothing_uses_it(store, monkeypatch):
    records = HostRecords(store)
    real = store.read

    def read_and_keep(*arguments):
        real(*arguments)
        with pytest.raises(AssertionError, match="changed while being used"):
            records.keep(np.array([1]))

    write(records, "gradients", 0, [1])
    monkeypatch.setattr(store, "read", read_and_keep)
    read(records, "gradients", 0, [1])


def test_only_records_of_ours_are_removed(tmp_path):
    """A killed run's records go. The user's files stay, also records that bear no mark."""
    folder = tmp_path / "expert-records"
    folder.mkdir()
    (folder / "notes.txt").write_text("the user's")
    claim(folder)
    store = RecordStore.create(folder, LAYERS, EXPERTS, LAYOUTS)
    store.close()  # a kill: nothing is removed
    claim(folder)
    assert {p.name for p in folder.iterdir()} == {"notes.txt", MARKER}
    store = RecordStore.create(folder, LAYERS, EXPERTS, LAYOUTS)
    store.close()
    store.remove()
    assert (folder / "notes.txt").read_text() == "the user's"
    other = tmp_path / "other"
    RecordStore.create(other, LAYERS, EXPERTS, LAYOUTS).close()
    before = sorted(other.iterdir())
    with pytest.raises(UserError, match="files of records that no run left behind: move them"):
        claim(other)
    assert sorted(other.iterdir()) == before


def test_a_planted_link_is_not_written_through(tmp_path):
    (tmp_path / "secret").write_text("the user's")
    (tmp_path / file_name("parameters", 0)).symlink_to("secret")
    with pytest.raises(UserError, match="cannot be opened"):
        RecordStore.create(tmp_path, LAYERS, EXPERTS, LAYOUTS)
    assert (tmp_path / "secret").read_text() == "the user's"
