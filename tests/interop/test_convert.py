"""Conversion file by file: resumed, verified, and equal to a model that is saved whole."""

import json
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax.base.errors import UserError
from moe_jax.base.hashes import digest_file
from moe_jax.interop import convert as module
from moe_jax.interop.convert import convert, of_memory, open_source, size_of
from moe_jax.interop.hugging_face import load_model, read, save
from tests.interop import conftest
from tests.interop import folder as small
from tests.interop.hugging_face.test_save import MODELS, TOKENIZER, random_states


def test_a_folder_is_rewritten_bit_for_bit(tmp_path):
    config = MODELS["deepseek_v3"]
    save(tmp_path / "a", config, *random_states(config, 0), TOKENIZER, shard_bytes=5000)
    convert(open_source(str(tmp_path / "a")), tmp_path / "b", shard_bytes=9000)
    first, second = (read(tmp_path / name) for name in "ab")
    assert first[0] == second[0]
    for name, array in first[1].items():
        np.testing.assert_array_equal(array, second[1][name])
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()
    hashes = json.loads((tmp_path / "b/conversion.json").read_text())["hashes"]
    assert hashes == {p.name: digest_file(p) for p in (tmp_path / "b").glob("*.safetensors")}
    convert(open_source(str(tmp_path / "a"), mtp="drop"), tmp_path / "c")
    assert load_model(tmp_path / "c").config.mtp_depth == 0


def test_a_gguf_file_and_a_model_in_memory(tmp_path):
    path = conftest.write(tmp_path / "m.gguf")
    convert(open_source(str(path)), tmp_path / "a")
    found = load_model(tmp_path / "a")
    text = "the tin 123 naïve 🙂"
    ids = found.tokenizer.encode(text)
    assert (found.tokenizer.bos, found.tokenizer.eos) == (1, 0)
    assert found.tokenizer.decode(ids) == text
    source = of_memory(found.config, found.parameters, found.router, found.tokenizer, "mine")
    convert(source, tmp_path / "b")
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


def test_a_killed_conversion_goes_on_and_trusts_no_damaged_file(tmp_path, monkeypatch):
    config = MODELS["mixtral"]
    save(tmp_path / "a", config, *random_states(config, 0), TOKENIZER)
    target = tmp_path / "b"
    written = []

    def killed(target, config, shard, part):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(shard.file)
        return real(target, config, shard, part)

    real = module.write_shard
    monkeypatch.setattr(module, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(open_source(str(tmp_path / "a")), target, shard_bytes=9000)
    assert not (target / "config.json").exists()
    with pytest.raises(UserError, match="conversion of another model, or with other settings"):
        convert(open_source(str(tmp_path / "a")), target, shard_bytes=8000)
    damaged = target / written[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    first, again = written[0], []
    monkeypatch.setattr(module, "write_shard", lambda *a: again.append(a[2].file) or real(*a))
    sizes = []
    convert(open_source(str(tmp_path / "a")), target, shard_bytes=9000, on_bytes=sizes.append)
    assert first not in again
    assert written[1] in again
    assert sum(sizes) == size_of(config)
    for name, array in read(tmp_path / "a")[1].items():
        np.testing.assert_array_equal(array, read(target)[1][name])


def test_memory_is_that_of_a_matrix(tmp_path):
    """The largest matrix and a copy of it, whatever the size of the file."""
    small.write(tmp_path / "a", "llama", rows=30_000)  # an embedding of 2.9 MB
    source = open_source(str(tmp_path / "a"))
    tracemalloc.start()
    convert(source, tmp_path / "b", shard_bytes=1 << 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 30_000 * small.WIDTH * 4
    # The matrix itself, and whether each of its numbers is finite.
    assert peak < 2.6 * largest
    with pytest.raises(UserError, match="conversion of another model"):
        convert(open_source(str(tmp_path / "a"), dtype="bfloat16"), tmp_path / "b")


def test_a_folder_with_a_model_is_left_alone(tmp_path):
    small.write(tmp_path / "a")
    with pytest.raises(UserError, match="holds a model already"):
        convert(open_source(str(tmp_path / "a")), tmp_path / "a")
