import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.runs.load import load_run


def test_a_run_can_be_loaded_completed_and_dissected(finished_run):
    run = load_run(finished_run.out)
    assert run.step == finished_run.steps
    text = run.complete("def f", tokens=8)
    assert text.startswith("def f")
    assert text == run.complete("def f", tokens=8)
    routing = run.routing("return")
    assert "".join(token for token, _ in routing) == "return"
    for _, layers in routing:
        assert len(layers) == finished_run.model.moe_layers
        assert all(len(set(experts)) == 2 for experts in layers)
    assert np.isfinite(np.asarray(run.state.parameters["embedding"][...])).all()


def test_a_folder_without_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="there is no folder '~/absent'"):
        load_run("~/absent")
    with pytest.raises(UserError, match="~ holds no checkpoints"):
        load_run("~")
    with pytest.raises(UserError, match="holds no checkpoints"):
        load_run(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder '.*/no/such'"):
        load_run(tmp_path / "no" / "such")
