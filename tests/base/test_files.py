import errno
import os

import pytest

from moe_jax.base.errors import UserError
from moe_jax.base.files import disk_errors, write_atomically


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
