import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_jax.base.errors import UserError
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.runs.report import _save as save_figure
from moe_jax.runs.report import describe_verdict, draw_load, draw_loss, draw_router

YARDSTICKS = {"gzip_bits_per_byte": 2.0, "xz_bits_per_byte": 1.5, "ngram_bits_per_byte": 2.2}


def make_lines(steps=10, layers=2, experts=4):
    rng = np.random.default_rng(0)
    return [
        {
            "step": step,
            "cross_entropy": 5.0 / step,
            "validation_bits_per_byte": 3.0 - 0.13 * step,
            "load": rng.integers(1, 9, (layers, experts)).tolist(),
            "router_entropy": [1.0] * layers,
            "load_imbalance": [1.5] * layers,
        }
        for step in range(1, steps + 1)
    ]


def test_figures_have_a_panel_for_each_layer(tmp_path):
    lines = make_lines()
    figure = draw_load(lines)
    assert len(figure.axes) == 3, "two layers and a colour bar"
    np.testing.assert_allclose(
        figure.axes[1].images[0].get_array()[:, 4],
        np.array(lines[4]["load"][1]) / np.mean(lines[4]["load"][1]),
    )
    lines[3]["cross_entropy"] = None  # a step whose loss was not finite
    for figure in (draw_loss(lines, YARDSTICKS), draw_router(lines, 4)):
        figure.savefig(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("bits", "said"),
    [(2.1, "below the byte 5-gram"), (1.7, "gzip -9 and the byte 5-gram"), (9, "none of")],
)
def test_the_verdict_places_the_result(bits, said):
    assert said in describe_verdict([{"validation_bits_per_byte": bits}], YARDSTICKS)


def test_result_file(tmp_path):
    write_result(
        tmp_path,
        experiment="e",
        question="q?",
        config={"a": 1},
        measurements=[Measurement("speed", 2.0, "x", "base", 2.0, [0])],
        verdict="v",
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {
        "experiment", "question", "version", "commit", "command", "date", "duration_seconds",
        "config", "environment", "measurements", "verdict",
    }  # fmt: skip
    assert result["measurements"][0]["ratio"] == 2.0
    assert {"jax", "python", "device", "cores", "triton"} <= set(result["environment"])


def test_an_output_folder_that_cannot_be_written():
    with pytest.raises(UserError, match="--out '/proc/x' cannot be written"):
        output_folder("/proc/x")


def test_trying_an_output_folder_touches_no_file_in_it(tmp_path):
    (tmp_path / ".writable").write_text("the user's")
    assert output_folder(str(tmp_path)) == tmp_path
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(".writable", "the user's")]


def test_a_plot_replaces_a_planted_link_and_does_not_follow_it(tmp_path):
    (tmp_path / "secret").write_text("the user's")
    for name in ("loss.png", "loss.tmp.png"):
        (tmp_path / name).symlink_to("secret")
    save_figure(Figure(), tmp_path / "loss.png")
    assert (tmp_path / "secret").read_text() == "the user's"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"secret", "loss.png", "loss.tmp.png"}
