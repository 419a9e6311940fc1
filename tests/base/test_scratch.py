import pytest

from moe_jax.base.errors import UserError
from moe_jax.base.scratch import MARKER, is_scratch, make_scratch, remove_scratch


def test_a_marked_folder_is_removed_with_everything_in_it(tmp_path):
    folder = make_scratch(tmp_path / "new" / "scratch")
    (folder / "below").mkdir()
    (folder / "below" / "file").write_text("ours")
    (folder / "link").symlink_to(tmp_path)
    assert make_scratch(folder) == folder  # what is there stays
    assert (folder / "below" / "file").exists()
    remove_scratch(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    remove_scratch(folder)


def test_a_folder_without_the_mark_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("the user's")
    remove_scratch(tmp_path)
    with pytest.raises(UserError, match="holds files that moe_jax did not make"):
        make_scratch(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_link_to_a_marked_folder_is_not_followed(tmp_path):
    make_scratch(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove_scratch(tmp_path / "link")
    assert is_scratch(tmp_path / "real")


def test_a_kill_on_the_way_leaves_the_mark(tmp_path, monkeypatch):
    folder = make_scratch(tmp_path / "scratch")
    (folder / "file").write_text("ours")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moe_jax.base.scratch._remove", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_scratch(folder)
    assert (folder / MARKER).is_file()
    remove_scratch(folder)
    assert not folder.exists()
