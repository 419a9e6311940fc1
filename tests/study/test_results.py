"""result.json and its table: intervals over seeds, one seed, figures that are written."""

from matplotlib.figure import Figure

from moe_jax.base.result import Measurement
from moe_jax.study.plots import highest_mean_first, plot_band, plot_dots
from moe_jax.study.results import (
    publish,
    read_measurements,
    seed_difference,
    seed_mean,
    significance,
    table,
)


def difference(one, other):
    return seed_difference("d", one, other, baseline="other", unit="bits", seeds=[4, 5, 6])


def test_a_difference_is_over_the_seeds_that_both_have():
    fewer = difference([3.0, 5.0], [1.0, 2.0, 9.0])
    assert (fewer.value, fewer.seeds, fewer.baseline) == (2.5, [4, 5], "other")


def test_significance_in_words():
    assert significance(difference([2.0, 2.1, 1.9], [1.0, 1.0, 1.0])) == "+1.000 (significant)"
    assert significance(difference([0.0, 1.0], [1.0, 0.0])) == "+0.000 (not significant)"
    assert significance(difference([0.5], [1.0])) == "-0.500 (one seed)"


def test_a_table_has_a_line_for_each_measurement():
    rows = [
        seed_mean("kd.bits", [1.0, 2.0, 3.0], unit="bits per byte", seeds=[0, 1, 2]),
        Measurement("ratio", None, "ratio"),
    ]
    first, second = table(rows).splitlines()
    assert first.split() == ["kd.bits", "2", "bits", "per", "byte", "[-0.4841,", "4.484]"]
    assert second.split() == ["ratio", "none", "ratio"]


def test_what_is_published_can_be_read(tmp_path, capsys):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    plot_band(left, [1, 2], [[3.0, 2.0], [3.5, 2.5]], label="kd", color="C0")
    values = {"kd": [2.0, 2.5], "scratch": [3.0, 3.5]}
    assert highest_mean_first(values) == ["scratch", "kd"]
    plot_dots(right, values, ["scratch", "absent", "kd"], {"kd": "C1"})
    rows = [seed_mean("kd.bits", [2.0, 2.5], unit="bits per byte", seeds=[0, 1])]
    publish(
        tmp_path,
        experiment="test",
        question="Does it work?",
        settings={"seeds": 2},
        measurements=rows,
        verdict="It does.",
        figures={"loss": figure},
    )
    assert read_measurements(tmp_path / "result.json") == {"kd.bits": rows[0]}
    assert (tmp_path / "plots" / "loss.png").exists()
    assert "It does." in capsys.readouterr().out
