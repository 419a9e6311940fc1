import errno
import os
from pathlib import Path

import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.placement.files import PAGE
from moe_jax.placement.shelf import INDEX, Shelf, as_parts

LAYERS, EXPERTS = 2, 9
KINDS = {"parameters": (4 * 35, 4 * 1100), "gradients": (4 * 1024,)}


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def shelf(request, tmp_path):
    made = Shelf(tmp_path, LAYERS, EXPERTS, KINDS, direct=request.param)
    yield made
    made.close()


def rows(kind, experts, seed=0):
    """Rows that tell their expert and the seed."""
    rng = [np.random.default_rng([seed, e]) for e in experts]
    return [
        np.stack([r.standard_normal(size // 4).astype(np.float32) for r in rng])
        for size in KINDS[kind]
    ]


def read(shelf, kind, layer, experts):
    found = [np.full((len(experts), size // 4), np.nan, np.float32) for size in KINDS[kind]]
    shelf.read(kind, layer, np.asarray(experts), as_parts(found))
    return found


def write(shelf, kind, layer, experts, seed=0):
    shelf.write(kind, layer, np.asarray(experts), as_parts(rows(kind, experts, seed)))


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [[0, 1, 2, 3], [8], [0, 2, 3, 8], list(range(9))])
def test_rows_come_back_whatever_is_asked_together(shelf, kind, asked):
    write(shelf, kind, 1, [0, 1, 2, 3], seed=1)
    write(shelf, kind, 1, [4, 6, 8], seed=1)
    write(shelf, kind, 0, asked, seed=2)
    found = read(shelf, kind, 1, asked)
    expected = rows(kind, asked, seed=1)
    for part in expected:
        part[np.isin(asked, [5, 7])] = 0  # never written
    assert_same(found, expected)


def test_adjacent_rows_take_one_call(shelf, monkeypatch):
    write(shelf, "parameters", 0, list(range(EXPERTS)))
    calls, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: calls.append(a) or real(*a))
    read(shelf, "parameters", 0, [0, 1, 2, 3, 6, 7])
    assert len(calls) == 2
    assert shelf.moved.disk_read == 6 * 2 * PAGE


def test_rows_in_host_memory_leave_the_disk_alone(shelf):
    write(shelf, "parameters", 0, [0, 1, 2])
    shelf.keep(np.array([1, EXPERTS + 4]))
    before = shelf.moved.disk_written
    write(shelf, "parameters", 0, [1], seed=5)
    assert shelf.moved.disk_written == before
    assert_same(read(shelf, "parameters", 0, [1]), rows("parameters", [1], seed=5))
    expected = rows("parameters", [0, 1, 2])
    for part, new in zip(expected, rows("parameters", [1], seed=5), strict=True):
        part[1] = new[0]
    assert_same(read(shelf, "parameters", 0, [0, 1, 2]), expected)
    shelf.keep(np.array([], int))  # what leaves host memory is written down
    assert shelf.moved.disk_written == before + 2 * PAGE
    assert_same(read(shelf, "parameters", 0, [0, 1, 2]), expected)
    assert_same(read(shelf, "gradients", 1, [4]), [np.zeros((1, 1024), np.float32)])


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def test_a_corrupt_row_is_named(shelf):
    write(shelf, "parameters", 1, [3, 4, 5])
    flip(shelf.path("parameters", 1), 4 * 2 * PAGE + 4000)
    read(shelf, "parameters", 1, [3, 5])
    with pytest.raises(UserError, match=r"^expert 4 of layer 1 in .*layer-001.parameters is corr"):
        read(shelf, "parameters", 1, [3, 4, 5])


def test_a_truncated_file_names_the_first_row_that_is_not_there(shelf):
    write(shelf, "gradients", 0, list(range(EXPERTS)))
    os.truncate(shelf.path("gradients", 0), 7 * PAGE + 100)
    read(shelf, "gradients", 0, [5, 6])
    with pytest.raises(UserError, match=r"^expert 7 of layer 0 in .* is truncated"):
        read(shelf, "gradients", 0, [5, 6, 7, 8])


@pytest.mark.parametrize(
    ("call", "word", "use"), [("preadv", "read", read), ("pwritev", "written", write)]
)
def test_a_failing_disk_is_one_line(shelf, monkeypatch, call, word, use):
    write(shelf, "gradients", 0, [2])

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=rf"^expert 2 of layer 0 .* cannot be {word}: Input/output"):
        use(shelf, "gradients", 0, [2])


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    shelf = Shelf(tmp_path, LAYERS, EXPERTS, KINDS)
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def short(descriptor, buffers, at, real=real):
            return real(descriptor, [buffers[0][:777]], at)

        monkeypatch.setattr(os, name, short)
    write(shelf, "parameters", 0, [2, 3])
    assert_same(read(shelf, "parameters", 0, [2, 3]), rows("parameters", [2, 3]))
    shelf.close()


def test_a_finished_shelf_can_be_opened_and_an_unfinished_one_cannot(shelf, tmp_path):
    write(shelf, "parameters", 1, [3, 4])
    with pytest.raises(UserError, match="holds no complete shelf"):
        Shelf.opened(tmp_path)
    shelf.finish()
    again = Shelf.opened(tmp_path)
    assert_same(read(again, "parameters", 1, [3, 4]), rows("parameters", [3, 4]))
    assert not read(again, "parameters", 0, [0])[0].any()
    flip(again.path("parameters", 1), 3 * 2 * PAGE)
    with pytest.raises(UserError, match="expert 3 of layer 1"):
        read(again, "parameters", 1, [3])
    again.close()
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(UserError, match="holds no complete shelf"):
        Shelf.opened(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line():
    with pytest.raises(UserError, match=r"^cannot write in /proc/shelf: "):
        Shelf(Path("/proc/shelf"), 1, 1, KINDS)
