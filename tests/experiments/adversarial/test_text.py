"""The text of the adversarial experiment: the roles of documents, and windows."""

import numpy as np
import pytest

from experiments.adversarial.settings import DOCUMENT, LENGTH, WINDOWS
from experiments.adversarial.text import Text, shuffled_batches, windows_of


@pytest.mark.slow
def test_roles_share_no_document(tmp_path):
    text = Text(tmp_path)
    drawn = {role: set(text.draw(role, 200, 0)[0]) for role in ("teacher", "seed", "pool")}
    assert not drawn["teacher"] & drawn["seed"]
    assert not drawn["teacher"] & drawn["pool"]
    assert not drawn["seed"] & drawn["pool"]
    documents, domain = text.draw("pool", 200, 0)
    assert all(len(d) == DOCUMENT for d in documents)
    np.testing.assert_array_equal(np.bincount(domain), [100, 60, 40])


def test_windows_predict_every_byte_but_the_first():
    document = bytes(i % 251 for i in range(DOCUMENT))
    windows = windows_of([document])
    assert windows.shape == (WINDOWS, LENGTH + 1)
    np.testing.assert_array_equal(windows[:, 1:].reshape(-1), list(document[1:]))


def test_an_epoch_has_every_row_once():
    batches = shuffled_batches(np.arange(6), seed=0, count=4)
    two_epochs = np.concatenate([next(batches) for _ in range(3)])
    np.testing.assert_array_equal(np.sort(two_epochs[:6]), np.arange(6))
    np.testing.assert_array_equal(np.sort(two_epochs[6:]), np.arange(6))
