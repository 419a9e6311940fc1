"""Lever 3's adversaries: the text and its roles, the arithmetic over seeds, the verdicts."""

import json
import math

import adversarial_data
import adversarial_lab as lab_module
import lever_adversarial as lever
import numpy as np
import pytest


def runs_of(**bits):
    return {arm: [{"bits": value} for value in values] for arm, values in bits.items()}


def test_differences_are_paired_over_the_seeds():
    runs = runs_of(one=[2.0, 3.0, 4.0], other=[1.0, 1.0, 1.0])
    found = lab_module.difference(runs, "one", "other")
    assert found.mean == 2.0
    np.testing.assert_allclose([found.low, found.high], [2 - 2.4841, 2 + 2.4841], atol=1e-3)
    assert not math.isfinite(lab_module.over_seeds([1.0]).low)


@pytest.mark.slow
def test_roles_share_no_document(tmp_path):
    text = lab_module.Text(tmp_path)
    drawn = {role: set(text.draw(role, 200, 0)[0]) for role in ("teacher", "seed", "pool")}
    assert not drawn["teacher"] & drawn["seed"]
    assert not drawn["teacher"] & drawn["pool"]
    assert not drawn["seed"] & drawn["pool"]
    documents, domain = text.draw("pool", 200, 0)
    assert all(len(d) == lab_module.DOCUMENT for d in documents)
    np.testing.assert_array_equal(np.bincount(domain), [100, 60, 40])


def test_windows_predict_every_byte_but_the_first():
    document = bytes(i % 251 for i in range(lab_module.DOCUMENT))
    windows = lab_module.windows_of([document])
    assert windows.shape == (lab_module.WINDOWS, lab_module.LENGTH + 1)
    np.testing.assert_array_equal(windows[:, 1:].reshape(-1), list(document[1:]))


@pytest.mark.parametrize(("filtered", "says"), [(2.0, "better than"), (2.4, "worse than")])
def test_the_data_verdict_follows_the_figures(filtered, says, tmp_path):
    jitter = np.array([0.0, 0.001, 0.002])
    names = [*adversarial_data.ARMS, *(f"kd_{a}" for a in adversarial_data.KD_ARMS)]
    bits = {name: list(3.0 + jitter) for name in names}
    bits["filter"] = list(filtered + jitter[::-1])
    bits["one_shot"] = list(2.2 + jitter)
    runs = runs_of(**bits)
    for run in runs["filter"]:
        run |= dict.fromkeys(adversarial_data.FACTS, 0.9) | {"rounds": 2}
    lab = lab_module.Lab(tmp_path, lab_module.FULL)
    rows = {m.name: m for m in adversarial_data.measurements(runs, lab)}
    assert rows["data_filter_minus_uniform_bits"].value == pytest.approx(filtered - 3.0)
    assert says in adversarial_data.verdict(rows)


def test_a_finished_run_is_not_repeated(tmp_path):
    lab = lab_module.Lab(tmp_path, lab_module.QUICK)
    (tmp_path / "runs").mkdir(exist_ok=True)
    made = []
    for _ in range(2):
        run = lab.once("thing", lambda: made.append(1) or {"bits": 1.5})
        assert run == {"bits": 1.5}
    assert made == [1]


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    lever.main(["--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    names = {m["name"] for m in result["measurements"]}
    for kind in ("data", "generative", "perturbation"):
        assert {f"{kind}_minus_kd_bits", f"{kind}_control_minus_kd_bits"} <= names
    for part in lever.PARTS:
        assert (tmp_path / "plots" / f"{part}.png").exists()
