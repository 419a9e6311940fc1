"""Folders whose settings or tensors do not fit are refused in one line."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.base.errors import UserError
from moe_jax.interop.hugging_face import read
from tests.interop import folder as small

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
