import json
import threading

import IPython.display
import pytest

from moe_jax.base.errors import UserError
from moe_jax.runs.notebook import compared, following, show_table

LINES = [
    {
        "step": step,
        "loss": 4.0,
        "cross_entropy": 5.0 - step,
        "load_imbalance": [2.0],
        "load": [[3, 1, 2, step]],
    }
    for step in (1, 2, 3)
]


class Cell:
    """What is below a cell: every picture, and whether it replaced the one before it."""

    def __init__(self):
        self.pictures = []
        self.drawn = threading.Event()

    def display(self, picture, **options):
        self.pictures.append(("new", options.get("display_id")))
        self.drawn.set()
        return self

    def update(self, picture):
        assert picture.data.startswith(b"\x89PNG")
        self.pictures.append(("update", None))


@pytest.fixture
def cell(monkeypatch):
    shown = Cell()
    monkeypatch.setattr(IPython.display, "display", shown.display)
    return shown


def followers():
    """Threads that still follow a run."""
    return [thread for thread in threading.enumerate() if "follow" in thread.name]


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_one_picture_follows_a_run_and_shows_its_end(cell, tmp_path):
    with following(tmp_path / "run", seconds=0.01):
        assert not cell.drawn.wait(0.05), "nothing is trained yet"
        write(tmp_path / "run", LINES[:2])
        assert cell.drawn.wait(20)
    assert cell.pictures[0] == ("new", True)
    assert set(cell.pictures[1:]) == {("update", None)}, "the end is drawn in the same place"
    assert not followers()


def test_an_error_of_the_run_ends_the_following_too(cell, tmp_path):
    with pytest.raises(UserError, match="no room"), following(tmp_path, seconds=10):
        raise UserError("no room")
    assert not followers()
    assert cell.pictures == []


def test_runs_are_compared_under_the_names_that_they_are_given(cell, tmp_path):
    runs = {"first": write(tmp_path / "a", LINES), "second": write(tmp_path / "b", LINES)}
    figure = compared(runs, "Training loss", "Highest expert load")
    loss, load = figure.axes
    assert [line.get_label() for line in loss.lines] == ["first", "second"]
    assert loss.lines[0].get_ydata().tolist() == [4.0, 3.0, 2.0]
    assert load.lines[0].get_ydata().tolist() == [2.0, 2.0, 2.0]
    show_table(runs)
    assert cell.pictures == [("new", None)]
    with pytest.raises(UserError, match="no plot 'Loss': use one of Training loss, Held-out text"):
        compared(runs, "Loss")
