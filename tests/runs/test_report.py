import json
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_jax.base.errors import UserError
from moe_jax.base.figures import write_figure
from moe_jax.base.machine import GemmRates
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.runs.figures import draw_load, draw_loss, draw_plots, draw_router
from moe_jax.runs.report import describe_moved, describe_verdict, measure, read_metrics
from tests.figures import cut_off, overlaps, shown_texts

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


def test_the_load_has_a_panel_for_each_layer():
    lines = make_lines()
    figure = draw_load(lines)
    assert len(figure.axes) == 3, "two layers and a colour bar"
    np.testing.assert_allclose(
        figure.axes[1].collections[0].get_array()[:, 4],
        np.array(lines[4]["load"][1]) / np.mean(lines[4]["load"][1]),
    )


def test_a_load_above_the_scale_is_said():
    lines = make_lines()
    for line in lines:
        line["load"] = [[3, 4, 4, 5]] * 2
    assert draw_load(lines).get_suptitle() == "expert load (white: balanced)"
    lines[6]["load"] = [[0, 0, 0, 16]] * 2
    figure = draw_load(lines)
    assert "purple: above 2, the highest is 4.0 at step 7" in figure.get_suptitle()
    assert figure.axes[1].collections[0].colorbar.extend == "max"


@pytest.mark.parametrize("steps", [1, 2, 7, 600])
def test_plots_of_a_run_are_readable(steps):
    lines = make_lines(steps)
    lines[steps // 2]["cross_entropy"] = None  # a step whose loss was not finite
    for figure in (draw_loss(lines, YARDSTICKS), draw_load(lines), draw_router(lines, 4)):
        figure.suptitle("a run")
        assert not overlaps(figure)
        assert not cut_off(figure)
        for axes in figure.axes:
            if axes.get_xlabel() == "step":
                assert all("." not in text.get_text() for text in axes.get_xticklabels())
        assert not any("_" in text.get_text() for text in shown_texts(figure))


def test_plots_carry_the_name_of_the_run(tmp_path, monkeypatch):
    named = []
    write = "moe_jax.runs.figures.write_figure"
    monkeypatch.setattr(write, lambda figure, path, run: named.append((path.name, run)))
    draw_plots(make_lines(), YARDSTICKS, tmp_path / "first-run", 4)
    assert named == [(f"{name}.png", "first-run") for name in ("loss", "load", "router")]


def test_the_rate_is_a_fraction_of_the_faster_gemm():
    lines = [{"seconds": 1.0, "loss": 2.0, "validation_bits_per_byte": 1.0}]
    summary = SimpleNamespace(
        config=SimpleNamespace(seed=0, batch=2, data=SimpleNamespace(length=50)),
        gemm=GemmRates(before=34e9, after=104e9),
        flops_per_token=1e8,
        compile_seconds=1.0,
    )
    rows = {row.name: row for row in measure(lines, YARDSTICKS, summary)}
    assert rows["gemm_fraction"].value == pytest.approx(100 * 1e8 / 104e9)
    assert rows["gemm_fraction"].baseline == "plain GEMM, 104 GFLOP/s"
    assert rows["gemm_flops_per_second_before"].value == 34e9
    assert "34 GFLOP/s before the run and 104 after it" in describe_moved(summary.gemm)


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
    with pytest.raises(UserError, match=r"--placement.folder '/proc/x' cannot be written"):
        output_folder("/proc/x", "--placement.folder")


def test_trying_an_output_folder_touches_no_file_in_it(tmp_path):
    (tmp_path / ".writable").write_text("the user's")
    assert output_folder(str(tmp_path)) == tmp_path
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(".writable", "the user's")]


def test_a_plot_replaces_a_planted_link_and_does_not_follow_it(tmp_path):
    (tmp_path / "secret").write_text("the user's")
    for name in ("loss.png", "loss.tmp.png"):
        (tmp_path / name).symlink_to("secret")
    write_figure(Figure(), tmp_path / "loss.png", "run")
    assert (tmp_path / "secret").read_text() == "the user's"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"secret", "loss.png", "loss.tmp.png"}


def test_a_run_that_lost_its_metrics_is_reported_from_its_checkpoint(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoints" / "12" / "metrics"
    checkpoint.mkdir(parents=True)
    (checkpoint / "metrics").write_text('{"validation_bits_per_byte": 1.75}')
    lines = read_metrics(tmp_path, 12)
    assert lines == [{"step": 12, "validation_bits_per_byte": 1.75}]
    assert "lacks step 12" in capsys.readouterr().out
    draw_plots(lines, YARDSTICKS, tmp_path, 4)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]
    assert describe_verdict(lines, YARDSTICKS).startswith("1.750 bits per byte")
