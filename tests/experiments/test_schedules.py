"""The eight schedules from the command: numbers, pictures and one-line errors."""

import json

import pytest

from experiments.schedules import Settings, built, draw, main, simulate_row, verdict
from moe_jax.base.errors import UserError
from moe_jax.parallel.schedules import SCHEDULES, build
from tests.figures import cut_off, overlaps, shown_texts


def rows(settings):
    return [simulate_row(schedule, settings) for schedule in built(settings)]


def test_result_and_plots(tmp_path, capsys):
    main(["--out", str(tmp_path), "--stages", "2", "--microbatches", "4"])
    result = json.loads((tmp_path / "result.json").read_text())
    values = {m["name"]: m["value"] for m in result["measurements"]}
    for name in SCHEDULES:
        assert values[f"{name}.bubble"] == values[f"{name}.bubble_closed_form"]
        assert values[f"{name}.peak_activations"] == values[f"{name}.peak_closed_form"]
        assert (tmp_path / "plots" / f"{name.replace('-', '_')}.png").is_file()
    assert values["1f1b.messages"] == 2 * 4
    assert (tmp_path / "plots" / "all.png").is_file()
    assert result["verdict"].startswith("8 of 8 schedules cost what is published")
    assert "(P-1)(F+Bi-W)" in capsys.readouterr().out


def test_differences_have_a_reason():
    unequal = verdict(rows(Settings(backward_weight=0.5)))
    assert unequal.startswith("7 of 8 ")
    assert "zb-v has a bubble of 1.5, not 0: the closed form needs F = Bi = W." in unequal
    slow = verdict(rows(Settings(communication=0.5)))
    assert "the closed form has no communication" in slow
    assert "UNEXPLAINED" not in unequal + slow


def test_impossible_schedules_are_left_out(capsys):
    names = [schedule.name for schedule in built(Settings(stages=3, microbatches=4))]
    assert names == ["gpipe", "1f1b", "zb-h1"]
    assert "left out: dualpipe needs an even number of stages" in capsys.readouterr().out
    with pytest.raises(UserError, match="no schedule can be built"):
        built(Settings(stages=0))
    with pytest.raises(UserError, match="forward has a cost of -1"):
        rows(Settings(forward=-1.0))


def test_the_picture_is_readable():
    """Numbers where there is room for them, words in the legend, nothing over something else."""
    for figure in (
        draw(rows(Settings(stages=2, microbatches=4))),
        draw(rows(Settings())[6:7]),  # dualpipe, which has overlapped pairs
    ):
        texts = [text.get_text() for text in shown_texts(figure)]
        assert texts.count("0") > 4
        assert "backward to the weights" in texts
        assert not overlaps(figure)
        assert not cut_off(figure)


def test_boxes_without_room_have_no_number():
    settings = Settings(stages=1, microbatches=130)
    figure = draw([simulate_row(build("1f1b", stages=1, microbatches=130), settings)])
    assert "101" not in [text.get_text() for text in shown_texts(figure)]
