"""The whole experiment on less work: the agreed figures, exactness, and the plots."""

import json

import pytest

from experiments.hot_cold import run, traces
from moe_jax.base.errors import UserError

AGREED = {
    "decode_of_all_resident_at_50",
    "decode_of_all_resident_at_25",
    "decode_of_ceiling_at_25",
    "decode_over_naive_at_25",
    "hits_of_belady_best_online",
    "train_capacity_gain_at_25",
    "exact",
}


@pytest.mark.slow
def test_quick_runs_give_the_agreed_figures(tmp_path):
    source = tmp_path / "traces"
    out = tmp_path / "out"
    traces.main(["--quick", "--out", str(source)])
    assert (source / "plots" / "traces.png").exists()
    run.main(["--quick", "--out", str(out), "--model", str(source)])
    found = {m["name"]: m["value"] for m in json.loads((out / "result.json").read_text())[
        "measurements"
    ]}  # fmt: skip
    assert found.keys() >= AGREED
    assert found["exact"] == 1
    assert 0 < found["naive.of_all_resident"] < 1
    assert found["naive.hit_rate"] == 0
    assert found["all_resident.hit_rate"] == 1
    assert 0 < found["hits_of_belady_best_online"] <= 1
    assert found["train_capacity_gain_at_25"] > 0
    # Programs of a layer and of the whole model may round apart: here, without optimisation.
    assert found["largest_difference_of_losses"] < 1e-5
    assert found["rounding_kl"] > 0
    plots = {"speed.png", "timeline.png", "training_timeline.png"}
    assert {p.name for p in (out / "plots").iterdir()} == plots


def test_a_model_that_is_not_there_is_not_trained_there(tmp_path):
    argv = ["--out", str(tmp_path / "out"), "--model", str(tmp_path / "typo")]
    with pytest.raises(UserError, match=r"typo' holds no model of these settings \(seed, quick"):
        run.main(argv)
    assert not (tmp_path / "typo").exists()
