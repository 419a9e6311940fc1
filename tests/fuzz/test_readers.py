"""Mutated files of every reader: read, or refused in one line without much memory."""

import pytest

from moe_jax.base.errors import UserError
from tests.fuzz.readers import READERS, failure, failures

FEW = {"gguf": 60, "llama": 60, "qwen3_moe": 60}
"""Readers of whole models take 20 ms a file, the others a millisecond or less."""


@pytest.mark.parametrize("name", READERS)
def test_some_mutations(tmp_path, name):
    assert list(failures(name, tmp_path, seed=0, count=FEW.get(name, 300))) == []


@pytest.mark.parametrize("directions", [[1, 1], [2], [0], [], [1, 2, 1]])
def test_a_sweep_of_another_number_of_objectives_is_a_sentence(tmp_path, directions):
    journal = READERS["journal"]
    path = journal.write(tmp_path)
    path.write_text(path.read_text().replace('"directions":[1]', f'"directions":{directions}'))
    assert failure(journal.read, path) is None
    with pytest.raises(UserError, match=r"log: its study is to .*, not to minimize: begin"):
        journal.read(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_mutations(tmp_path, name):
    assert list(failures(name, tmp_path, seed=1, count=10 * FEW.get(name, 500))) == []
