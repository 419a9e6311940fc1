"""experiments/routing.py on a published folder and on a run, and what it refuses."""

import json

import numpy as np
import pytest

from experiments import routing
from moe_jax.base.errors import UserError
from moe_jax.placement.trace import read_trace
from moe_jax.runs.load import load_run
from tests.interop import folder as small


@pytest.fixture
def texts(tmp_path):
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, text in zip(
        paths, ("def f(x):\n    return x\n", "the tin in the inn. "), strict=True
    ):
        path.write_text(text * 8)
    return [str(path) for path in paths]


def test_a_published_folder(tmp_path, texts):
    small.write(tmp_path / "model", "qwen3_moe")
    out = tmp_path / "out"
    options = ["--model", str(tmp_path / "model"), "--out", str(out), "--context", "32"]
    routing.main([*options, "--text", *texts])
    trace = read_trace(out / "routing.trace")
    assert trace.domains == tuple(texts)
    assert set(trace.domain.tolist()) == {0, 1}
    listed = json.loads((out / "tokens.json").read_text())
    assert (len(listed), len(listed[0])) == (trace.layers, trace.experts)
    # Every token goes to 2 of 4 experts, so that no expert gets all of them.
    shares = [top["share"] for expert in listed[0] for top in expert]
    assert 0 < min(shares) <= max(shares) <= 1
    rows = {r["name"]: r for r in json.loads((out / "result.json").read_text())["measurements"]}
    assert rows["tokens"]["value"] == len(trace.chosen)


def test_a_run_gives_its_own_routing(finished_run, tmp_path, texts):
    out = tmp_path / "out"
    options = ["--model", str(finished_run.out), "--out", str(out), "--context", "24"]
    routing.main([*options, "--text", texts[0]])
    with open(texts[0]) as file:
        shown = load_run(finished_run.out).routing(file.read()[:23])
    expected = np.array([layers for _, layers in shown])
    np.testing.assert_array_equal(read_trace(out / "routing.trace").chosen[1:24], expected)


def test_mistakes_are_one_line(tmp_path, texts):
    with pytest.raises(UserError, match="which model"):
        routing.main([])
    with pytest.raises(UserError, match="names a file twice"):
        routing.main(["--model", "a", "--text", texts[0], texts[0]])
    small.write(tmp_path / "dense", "llama")
    options = ["--out", str(tmp_path / "out"), "--model", str(tmp_path / "dense"), "--text"]
    with pytest.raises(UserError, match=r"a dense model .* has no routing"):
        routing.main([*options, *texts])
    small.write(tmp_path / "sparse", "qwen3_moe")
    options[3] = str(tmp_path / "sparse")
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(UserError, match="no text has the 256 tokens"):
        routing.main([*options, str(tmp_path / "short.txt")])
    with pytest.raises(UserError, match=r"short\.txt has fewer than context=32 tokens"):
        routing.main([*options, texts[0], str(tmp_path / "short.txt"), "--context", "32"])
    assert not (tmp_path / "out" / "routing.trace").exists()
    with pytest.raises(UserError, match=r"missing\.txt"):
        routing.main([*options, str(tmp_path / "missing.txt")])
