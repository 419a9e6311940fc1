"""The verdict on adversarial data follows the measurements."""

import numpy as np
import pytest

from experiments.adversarial import data
from experiments.adversarial.lab import Lab
from experiments.adversarial.pool import STATISTICS
from experiments.adversarial.settings import FULL


@pytest.mark.parametrize(("filtered", "says"), [(2.0, "better than"), (2.4, "worse than")])
def test_the_data_verdict_follows_the_measurements(filtered, says, tmp_path):
    jitter = np.array([0.0, 0.001, 0.002])
    names = [*data.ARMS, *(f"kd_{a}" for a in data.KD_ARMS)]
    bits = {name: list(3.0 + jitter) for name in names}
    bits["filter"] = list(filtered + jitter[::-1])
    bits["one_shot"] = list(2.2 + jitter)
    runs = {arm: [{"bits": value} for value in values] for arm, values in bits.items()}
    for run in runs["filter"]:
        run |= dict.fromkeys(STATISTICS, 0.9) | {"rounds": 2}
    rows = {m.name: m for m in data.measurements(runs, Lab(tmp_path, FULL))}
    assert rows["data_filter_minus_uniform_bits"].value == pytest.approx(filtered - 3.0)
    assert says in data.verdict(rows)
