import pytest
from matplotlib.figure import Figure

from moe_jax.base.figures import readable, whole_ticks, write_figure
from tests.figures import cut_off, overlaps, shown_texts


def make_figure(x=(1, 2)):
    figure = Figure(figsize=(6, 3), layout="constrained")
    figure.subplots().plot(x, x)
    return figure


@pytest.mark.parametrize("name", ["run", "a $\\frac{1$ run", "r" * 200])
def test_a_plot_carries_the_name_of_its_run(tmp_path, name):
    figure = make_figure()
    figure.suptitle("loss")
    write_figure(figure, tmp_path / "plots" / "loss.png", name)
    assert figure.get_suptitle().startswith(name[:50])
    assert figure.get_suptitle().endswith(": loss")
    assert not cut_off(figure)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_planted_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "loss.png").symlink_to(tmp_path / "other")
    write_figure(make_figure(), tmp_path / "loss.png", "run")
    assert (tmp_path / "other").read_text() == "kept"


def test_there_is_no_half_a_step():
    figure = make_figure()
    axes = figure.axes[0]
    assert any("." in text.get_text() for text in shown_texts(figure))
    whole_ticks(axes)
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert all(float(text) == int(float(text)) for text in ticks if text)


def test_names_of_code_become_words_and_long_ones_lines():
    assert readable("decayed_lfu") == "decayed lfu"
    assert max(map(len, readable("many words " * 20, 30).split("\n"))) <= 30


def test_overlaps_are_noticed():
    figure = make_figure()
    assert not overlaps(figure)
    figure.axes[0].text(1.5, 1.5, "one text")
    figure.axes[0].text(1.52, 1.5, "another")
    assert overlaps(figure) == [("one text", "another")]
