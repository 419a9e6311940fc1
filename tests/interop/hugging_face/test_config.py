"""Folders whose settings or tensors do not fit are refused in one line."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.base.errors import UserError
from moe_jax.interop.hugging_face import read
from moe_jax.interop.hugging_face.config import read_config
from tests.interop import folder as small

UP = "model.layers.1.mlp.up_proj.weight"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
REFUSED = {
    "kind": ({"fields": {"model_type": "mamba"}}, "model_type 'mamba' is not supported"),
    "scaled rope": (
        {"fields": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}},
        r"rope scaling \('llama3'\) is not supported",
    ),
    "bias": ({"fields": {"attention_bias": True}}, "attention_bias=True is not supported"),
    "activation": ({"fields": {"hidden_act": "gelu"}}, "hidden_act='gelu' is not supported"),
    "window": ({"fields": {"layer_types": ["sliding_attention"]}}, "layer_types other than"),
    "unknown switch": (
        {"fields": {"logit_softcapping": 30.0}},
        "'logit_softcapping': 30.0 is not known of a llama model",
    ),
    "yarn with an attention factor": (
        {"fields": {"rope_scaling": {**YARN, "attention_factor": 2.0}}},
        r"attention_factor=2.0 is not supported: only 1\.13",
    ),
    "yarn without rounding": (
        {"fields": {"rope_scaling": {**YARN, "truncate": False}}},
        "truncate=False",
    ),
    "yarn with an unknown field": (
        {"fields": {"rope_scaling": {**YARN, "short_factor": 2.0}}},
        r"\('yarn' with 'short_factor'\) is not supported",
    ),
    "yarn without a factor": (
        {"fields": {"rope_scaling": {"type": "yarn"}}},
        "factor is None: it must be above 0",
    ),
    "mscale without latents": (
        {"fields": {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}},
        "mscale_all_dim=1.0 is not supported without latent attention",
    ),
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


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": small.HEADS,
    "rms_norm_eps": 1e-6,
}
LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
FAMILY_REFUSED = {
    "epsilon of latents": (
        {"rms_norm_eps": 1e-5},
        "rms_norm_eps=1e-05 is not supported with latent",
    ),
    "heads of keys": ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported with"),
    "scores": ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
    "choice": ({"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
    "every second": ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
    "scale": ({"routed_scaling_factor": None}, "routed_scaling_factor is None"),
    "V2 normalised": (
        {"model_type": "deepseek_v2", "norm_topk_prob": True},
        "norm_topk_prob=True is not supported",
    ),
    "V2's choice": (
        {"model_type": "deepseek_v2", "topk_method": "noaux_tc"},
        "topk_method='noaux_tc' is not supported",
    ),
    "Mixtral's window": (
        {"model_type": "mixtral", "sliding_window": 4096},
        "sliding_window=4096 is not supported",
    ),
    "OLMoE's clipping": ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    "half rotated": (
        {"model_type": "glm4_moe", **dict.fromkeys(LATENT)},
        "partial_rotary_factor=0.5 is not supported",
    ),
    "GLM's biases": (
        {"model_type": "glm4_moe", "attention_bias": True},
        "attention_bias=True is not supported",
    ),
}


@pytest.mark.parametrize("name", FAMILY_REFUSED)
def test_what_a_family_has_and_we_do_not_is_refused_by_name(name):
    change, message = FAMILY_REFUSED[name]
    with pytest.raises(UserError, match=message):
        read_config(small.config("llama", False, 262) | DEEPSEEK | change)


def test_deepseeks_formula_decides_where_transformers_ignores_an_mscale():
    """transformers takes m(1) for cos and sin unless both mscales are given and not 0.
    DeepSeek's own code, with defaults 1 and 0, divides in every case."""
    scaling = {**YARN, "mscale": 0.5}
    fields = small.config("llama", False, 262) | DEEPSEEK | {"rope_scaling": scaling}
    yarn = read_config(fields).yarn
    assert (yarn.mscale, yarn.mscale_all_dim) == (0.5, 0.0)
    np.testing.assert_allclose(yarn.rotary_factor, 0.1 * 0.5 * np.log(4.0) + 1)
    assert yarn.softmax_factor == 1.0
    yarn = read_config(fields | {"rope_scaling": {**scaling, "mscale_all_dim": 0.707}}).yarn
    m = [0.1 * scale * np.log(4.0) + 1 for scale in (0.5, 0.707)]
    np.testing.assert_allclose(yarn.rotary_factor, m[0] / m[1])
    np.testing.assert_allclose(yarn.softmax_factor, m[1] ** 2)
