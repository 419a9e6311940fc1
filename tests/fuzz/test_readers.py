"""Mutated files of every reader: read, or refused in one line without much memory."""

import pytest

from tests.fuzz.readers import READERS, failures

FEW = {"gguf": 60, "llama": 60, "qwen3_moe": 60}
"""Readers of whole models take 20 ms a file, the others a millisecond or less."""


@pytest.mark.parametrize("name", READERS)
def test_some_mutations(tmp_path, name):
    assert list(failures(name, tmp_path, seed=0, count=FEW.get(name, 300))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_mutations(tmp_path, name):
    assert list(failures(name, tmp_path, seed=1, count=10 * FEW.get(name, 500))) == []
