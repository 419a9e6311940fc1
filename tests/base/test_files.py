import errno
import os

import pytest

from moe_jax.base import files
from moe_jax.base.errors import UserError
from moe_jax.base.files import appearing, disk_errors, patiently, write_atomically


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_atomically(path, "one")
    assert path.read_text() == "one"

    def crash(*_):
        raise RuntimeError

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(RuntimeError):
        write_atomically(path, b"two")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("Error writing d/0: [No space left on device] [locations=...]"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EIO, "Input/output error"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory"),
    ],
)
def test_disk_errors_are_one_line_that_names_the_folder(tmp_path, error):
    with (
        pytest.raises(UserError, match=f"cannot write in {tmp_path}") as refused,
        disk_errors(tmp_path),
    ):
        raise error
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("error", [ValueError("shape"), FileNotFoundError(errno.ENOENT, "gone")])
def test_other_errors_pass_through(tmp_path, error):
    with pytest.raises(type(error)), disk_errors(tmp_path):
        raise error


def test_a_link_planted_under_the_name_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "secret").write_text("the user's")
    (tmp_path / "file").symlink_to("secret")
    write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "secret").read_text() == "the user's"
    assert not (tmp_path / "file").is_symlink()


def test_a_file_appears_when_it_is_whole(tmp_path):
    with appearing(tmp_path / "file") as unfinished:
        unfinished.write_text("whole")
        assert not (tmp_path / "file").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def failing(times, error):
    left = [times]

    def read():
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return "read"

    return read


def test_a_failing_read_is_tried_again_and_an_answer_is_not(monkeypatch):
    waits = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    tries = len(files.RETRY_SECONDS)
    assert patiently(failing(tries, OSError(errno.EIO, ""))) == "read"
    assert tuple(waits) == files.RETRY_SECONDS
    assert 3 < sum(waits) < 10
    with pytest.raises(OSError, match="Errno 5"):
        patiently(failing(tries + 1, OSError(errno.EIO, "")))
    with pytest.raises(FileNotFoundError):
        patiently(failing(1, FileNotFoundError(errno.ENOENT, "")))
