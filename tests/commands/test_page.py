"""The page of `moe-jax inspect-runs`, in a browser."""

import json

import matplotlib.image
import numpy as np
import pytest

from moe_jax.commands import inspect_runs
from tests.browser import screenshot, seen

HEADINGS = [
    "Runs side by side",
    "Where they are",
    "Settings that differ",
    "Training loss",
    "Held-out text",
    "Throughput",
    "Highest expert load",
    "Dropped assignments",
]


@pytest.fixture
def page(tmp_path):
    """The page of two runs of which nothing but metrics.jsonl is there."""
    outs = []
    for number, name in enumerate(("first-run-with-a-long-name", "second")):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            {
                "step": step,
                "loss": 9.0 / step + number,
                "cross_entropy": 9.0 / step + number,
                "validation_bits_per_byte": 3.0 - step / 50,
                "seconds": 0.5,
                "tokens": 1000 * step,
                "elapsed": step * 0.5,
                "load_imbalance": [1.5 + number],
                "dropped": step,
            }
            for step in range(1, 60)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        outs.append(str(folder))
    inspect_runs.main([*outs, "--html", str(tmp_path / "page.html")])
    return tmp_path / "page.html"


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 500])
def test_the_page_in_a_browser(page, tmp_path, width, dark):
    found = seen(page, tmp_path, width=width, dark=dark)
    assert found["headings"] == HEADINGS
    assert found["images"] == [True] * 5, "each plot is drawn and described"
    assert found["links"] == [], "the page needs no other file"
    assert found["dark"] == dark
    assert found["width"] <= found["window"], "nothing reaches over the window's edge"
    picture = matplotlib.image.imread(screenshot(page, tmp_path, width=width, dark=dark))
    background = picture[2, 2, :3].mean()
    assert (background < 0.2) if dark else (background > 0.8)
    assert np.unique(picture.reshape(-1, picture.shape[-1]), axis=0).shape[0] > 50
