import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe_jax.base.errors import UserError
from moe_jax.commands import inspect_runs
from moe_jax.config import TrainConfig
from moe_jax.runs.comparison import Looked, differences, look, quantities, short_names, throughput
from moe_jax.runs.page import write_page


def line(step: int, **values) -> dict:
    return {
        "step": step,
        "loss": 4.0 - step,
        "cross_entropy": 4.0 - step,
        "seconds": 0.5,
        "tokens": 100 * step,
        "elapsed": step * 0.5,
        "load_imbalance": [1.5, 2.5 - step / 4],
        "dropped": step,
        **values,
    }


LINES = [line(1), line(2, validation_bits_per_byte=2.0), line(3, validation_bits_per_byte=2.5)]
CONFIG = TrainConfig(steps=3)


def test_the_quantities_of_a_run_by_hand():
    found = quantities(Looked("a", LINES, CONFIG, {"peak_resident_bytes": 2_000_000_000}))
    assert found == {
        "step": "3 of 3",
        "held-out": "2.5 bits/byte",
        "best held-out": "2 bits/byte",
        "loss": "1 nats/token",
        "throughput": "200 tokens/s",
        "training time": "1.5 s",
        "highest load / mean": "1.75",
        "dropped assignments": "6",
        "peak memory": "2 GB",
    }
    assert throughput(Looked("a", LINES, CONFIG, {})) == ([1, 2, 3], [200.0, 200.0, 200.0])


def test_only_settings_that_differ_are_shown():
    other = replace(CONFIG, out="elsewhere", model=replace(CONFIG.model, width=96))
    runs = [Looked("a", LINES, CONFIG, {}), Looked("b", LINES, other, {})]
    width = str(CONFIG.model.width)
    assert differences(runs) == {"model.width": [width, "96"]}
    unknown = Looked("c", LINES, None, {})
    assert differences([*runs, unknown]) == {"model.width": [width, "96", ""]}
    assert differences([runs[0], unknown]) == {}


def test_equal_names_are_told_apart_by_their_paths():
    runs = [Looked("x/run", LINES, None, {}), Looked("y/run", LINES, None, {})]
    assert short_names(runs) == ["x/run", "y/run"]
    assert short_names([*runs[:1], Looked("y/other", LINES, None, {})]) == ["run", "other"]


class Page(HTMLParser):
    """Counts the elements of a page, and asserts that every one is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_escapes_names():
    other = replace(CONFIG, model=replace(CONFIG.model, width=96))
    text = write_page([Looked("<b>&", LINES, CONFIG, {}), Looked("b", LINES[:1], other, {})])
    page = Page(text)
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;" in text
    assert page.seen.count("img") == 5
    assert page.seen.count("table") == 2
    assert not re.search(r'(src|href)="(?!data:)', text), "the page needs no other file"


def test_the_command_compares_runs_of_the_disk(finished_run, tmp_path, capsys):
    copy = tmp_path / "unfinished"
    copy.mkdir()
    lines = Path(finished_run.out, "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n")
    page = tmp_path / "page.html"
    inspect_runs.main([finished_run.out, str(copy), "--html", str(page)])
    said = capsys.readouterr().out
    assert "12 of 12" in said
    assert "5 of ?" in said
    assert Page(page.read_text()).seen.count("img") == 5


def test_a_stopped_run_has_the_settings_of_its_checkpoint(finished_run, tmp_path):
    folder = tmp_path / "stopped"
    folder.mkdir()
    for name in ("metrics.jsonl", "checkpoints"):
        (folder / name).symlink_to(Path(finished_run.out, name))
    config = look(str(folder)).config
    assert (config.model, config.optim) == (finished_run.model, finished_run.optim)
    assert config.steps == 12
    result = json.loads(Path(finished_run.out, "result.json").read_text())
    assert look(finished_run.out).measured["final_loss"] is not None
    assert result["config"]["steps"] == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which runs\\? give the folders"),
        (["--html", "a.html"], "which runs\\? give the folders"),
        (["no_such_folder"], "there is no folder 'no_such_folder'"),
        (["."], "holds no metrics.jsonl"),
        (["a", "--htm", "x"], "did you mean --html"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        inspect_runs.main(words)
