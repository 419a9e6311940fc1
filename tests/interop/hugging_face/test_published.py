"""The config.json of published models gives the presets of the same name."""

from dataclasses import asdict

import pytest

from moe_jax.config import YarnConfig
from moe_jax.config.presets import PRESETS
from moe_jax.interop.hugging_face.config import read_config, read_layout
from moe_jax.interop.hugging_face.export import write_config
from moe_jax.interop.hugging_face.families import TRAINING

BOOKKEEPING = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
}
LATENT = {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "ep_size": 1,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "v_head_dim": 128,
}
SCALING = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
PUBLISHED = {
    "deepseek_v3": {
        **LATENT,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rope_scaling": {**SCALING, "mscale": 1.0, "mscale_all_dim": 1.0},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "vocab_size": 129280,
    },
    "deepseek_v2_lite": {
        **LATENT,
        "model_type": "deepseek_v2",
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "rope_scaling": {**SCALING, "mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_group": 1,
        "topk_method": "greedy",
        "vocab_size": 102400,
    },
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "olmoe_1b_7b": {
        "model_type": "olmoe",
        "clip_qkv": None,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "vocab_size": 50304,
    },
}
NOT_COMPARED = ("dense_hidden", "yarn", "mtp_input")
"""dense_hidden where no block is dense, and what presets leave out."""


def architecture(model):
    """Settings that change what is computed, without those above."""
    values = asdict(model)
    for part in ("attention", "moe"):
        own = values.pop(part)
        values |= {f"{part}.{name}": value for name, value in own.items()}
    return {n: v for n, v in values.items() if n not in TRAINING and n not in NOT_COMPARED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_the_presets(name):
    config = read_config(BOOKKEEPING | PUBLISHED[name])
    assert architecture(config) == architecture(PRESETS[name].model)
    if config.dense_layers:
        assert config.dense_hidden == PRESETS[name].model.dense_hidden
    # And there again.
    assert read_config(write_config(config, 0, 1, 4096)) == config
    latent = name.startswith("deepseek")
    assert read_layout(PUBLISHED[name]).interleaved == latent


def test_the_two_yarns_of_deepseek():
    both = [read_config(BOOKKEEPING | PUBLISHED[f"deepseek_{n}"]).yarn for n in ("v3", "v2_lite")]
    assert both[0] == YarnConfig(40, 4096, 32, 1, 1.0, 1.0)
    assert both[1] == YarnConfig(40, 4096, 32, 1, 0.707, 0.707)
    # 0.1 · ln(40) + 1 = 1.3689, and its square.
    assert both[0].softmax_factor == pytest.approx(1.87385, rel=1e-5)
    assert both[0].rotary_factor == both[1].rotary_factor == 1.0


def test_fields_of_smollm2_that_change_nothing():
    fields = {
        "model_type": "llama",
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "mlp_bias": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "vocab_size": 49152,
    }
    assert read_config(BOOKKEEPING | fields).attention.head_dim == 64
