"""What is written is what is read, bit for bit, for every family and type."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moe_jax.base.errors import UserError
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from moe_jax.config import fields as flat_fields
from moe_jax.data.tokenizer import make_tokenizer
from moe_jax.interop.assemble import arrays_by_name, dtype_of, shapes_of
from moe_jax.interop.hugging_face import load, load_model, save
from moe_jax.interop.hugging_face.export import canonical, family_for
from moe_jax.interop.hugging_face.families import DEFAULTED, FAMILIES, TRAINING
from moe_jax.model.abstract import abstract_states
from moe_jax.model.parameters import dotted

TOKENIZER = make_tokenizer("bytes", [])
GQA = AttentionConfig(heads=4, kv_heads=2, head_dim=6)
MLA = AttentionConfig(kind="mla", heads=3, q_rank=10, kv_rank=12, nope_dim=8, rope_dim=4, v_dim=6)
SOFTMAX = MoEConfig(
    experts=6, experts_per_token=2, expert_hidden=14, shared_experts=0, gate="softmax", bias_rate=0
)
SIGMOID = MoEConfig(
    experts=6, experts_per_token=2, expert_hidden=14, groups=3, groups_per_token=2, scale=2.5
)
BASE = ModelConfig(
    vocabulary=TOKENIZER.vocabulary, width=24, layers=3, dense_hidden=20, attention=GQA, moe=SOFTMAX
)
YARN = YarnConfig(factor=8.0, original_length=32)
LATENT = replace(YARN, mscale=0.707, mscale_all_dim=0.707)
MODELS = {
    "llama": replace(BASE, dense_layers=3, rope_base=5000.0, norm_epsilon=1e-5),
    "qwen3": replace(BASE, dense_layers=3, attention=replace(GQA, qk_norm="head"), yarn=YARN),
    "mixtral": replace(BASE, dense_layers=0, tied_embedding=False),
    "qwen3_moe": replace(BASE, attention=replace(GQA, qk_norm="head")),
    "olmoe": replace(
        BASE,
        dense_layers=0,
        attention=replace(GQA, qk_norm="full", kv_heads=4),
        moe=replace(SOFTMAX, normalise=False),
    ),
    "deepseek": replace(BASE, moe=replace(SOFTMAX, shared_experts=2)),
    "glm4_moe": replace(BASE, moe=SIGMOID, mtp_depth=1, mtp_input="normed"),
    "deepseek_v2": replace(
        BASE,
        yarn=LATENT,
        attention=replace(MLA, q_rank=0),
        moe=replace(
            SOFTMAX, shared_experts=2, normalise=False, scale=4.0, groups=3, groups_per_token=2
        ),
    ),
    "deepseek_v3": replace(
        BASE, attention=MLA, moe=SIGMOID, mtp_depth=2, mtp_input="normed", yarn=LATENT
    ),
}
DTYPES = ("float32", "bfloat16", "float16")


def random_states(config, seed):
    """Parameters and biases whose values, bits and signs differ everywhere."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        dtype = dtype_of(dotted(path), config.param_dtype)
        return jnp.asarray(rng.normal(size=leaf.shape).astype(dtype))  # NumPy compiles nothing

    parameters, router = abstract_states(config)
    parameters = jax.tree_util.tree_map_with_path(draw, parameters)
    if config.moe.gate == "softmax":
        return parameters, jax.tree.map(
            lambda leaf: jnp.asarray(np.zeros(leaf.shape, np.float32)), router
        )
    return parameters, jax.tree_util.tree_map_with_path(draw, router)


def architecture(config):
    """All settings that change what a model computes."""
    values = flat_fields(canonical(config))
    return {name: value for name, value in values.items() if name not in TRAINING}


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),  # a smaller failing case would tell no more
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(DTYPES), st.integers(0, 99), st.booleans())
def test_load_of_save_is_the_same_bit_for_bit(tmp_path_factory, family, dtype, seed, one_file):
    there_and_back(tmp_path_factory.mktemp(family), family, dtype, seed, one_file)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MODELS)
def test_load_of_save_for_every_family_and_type(tmp_path, family, dtype):
    there_and_back(tmp_path, family, dtype, 0, one_file=False)


def there_and_back(folder, family, dtype, seed, one_file):
    config = replace(MODELS[family], param_dtype=dtype)
    parameters, router = random_states(config, seed)
    size = 1 << 30 if one_file else 3000
    save(folder, config, parameters, router, TOKENIZER, shard_bytes=size)
    assert (folder / "model.safetensors").exists() == one_file
    loaded = load_model(folder, param_dtype=dtype)
    assert architecture(loaded.config) == architecture(config)
    for before, after in ((parameters, loaded.parameters), (router, loaded.router)):
        before = arrays_by_name(before)
        after = arrays_by_name(after)
        assert before.keys() == after.keys()
        for name, array in before.items():
            assert array.dtype == after[name].dtype
            assert np.asarray(array).tobytes() == np.asarray(after[name]).tobytes(), name


@pytest.mark.parametrize("family", MODELS)
def test_each_model_is_written_as_its_family(tmp_path, family):
    config = MODELS[family]
    assert family_for(config).model_type == family
    save(tmp_path, config, *random_states(config, 0), TOKENIZER, shard_bytes=3000)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == family
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = {}
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            names |= dict.fromkeys(opened.keys(), file)
    assert names == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(
        np.prod(shape) * 4 for shape in shapes_of(config).values()
    )


def test_every_family_has_a_model_here_and_every_setting_its_place():
    """A new setting of ours must be expressed, implied, or known to change no computation."""
    assert set(MODELS) == set(FAMILIES)
    by_rule = {
        *("attention.kind", "attention.kv_heads", "attention.head_dim", "attention.qk_norm"),
        *("attention.q_rank", "dense_layers", "rope_base", "moe.shared_experts", "moe.gate"),
    }
    by_rule |= {name for name in flat_fields(BASE) if name.startswith("yarn.")}
    for family in FAMILIES.values():
        known = {setting.ours for setting in family.settings} | set(family.implied)
        known |= by_rule | set(DEFAULTED) | TRAINING
        unknown = set(flat_fields(BASE)) - known
        # What a kind of attention or of block does not use.
        unknown = {n for n in unknown if not n.startswith(("attention.", "moe."))}
        assert unknown <= {"dense_hidden"}, family.model_type


REFUSED = {
    "rule": (
        replace(
            BASE, moe=replace(SIGMOID, rule="hash", bias_rate=0.0, groups=1, groups_per_token=1)
        ),
        "moe.rule=hash",
    ),
    "capacity": (replace(BASE, moe=replace(SIGMOID, capacity_factor=2.0)), "capacity_factor=2.0"),
    "epsilon": (replace(MODELS["deepseek_v3"], norm_epsilon=1e-5), "norm_epsilon=1e-05"),
    "mtp of the report": (
        replace(MODELS["deepseek_v3"], mtp_input="residual"),
        r"mtp_input=residual \(mtp_depth=0, or --mtp drop of convert\.py, leaves",
    ),
    "full norm, dense": (
        replace(MODELS["llama"], attention=replace(GQA, qk_norm="full")),
        "attention.qk_norm=full",
    ),
    "score of groups": (
        replace(MODELS["deepseek_v3"], moe=replace(SIGMOID, group_score="max")),
        "moe.group_score=max",
    ),
    "no shared experts": (
        replace(MODELS["deepseek_v3"], moe=replace(SIGMOID, shared_experts=0)),
        "moe.shared_experts=0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_family_has_is_refused_by_name(tmp_path, name):
    config, field = REFUSED[name]
    with pytest.raises(UserError, match=field) as caught:
        save(tmp_path / "out", config, {}, {}, TOKENIZER)
    assert "no published family computes this model" in str(caught.value)
    assert not list((tmp_path / "out").glob("*.json"))


def test_settings_without_effect_are_no_obstacle():
    rounding = replace(SIGMOID, rule="token_rounding", groups=3, groups_per_token=3)
    assert family_for(replace(BASE, moe=rounding)).model_type == "glm4_moe"
    node = replace(SIGMOID, group_score="node", experts_per_token=4)  # the best 4 / 2, as top2
    assert family_for(replace(BASE, moe=node)).model_type == "glm4_moe"
    dense = replace(BASE, dense_layers=3, moe=replace(SIGMOID, capacity_factor=2.0))
    assert family_for(dense).model_type == "llama"


def test_biases_are_not_lost_in_silence(tmp_path):
    config = MODELS["deepseek_v3"]
    parameters, router = random_states(config, 0)
    save(tmp_path, config, parameters, router, TOKENIZER)
    with pytest.raises(UserError, match=r"selection biases .* use load_model"):
        load(tmp_path)
    dropped = load_model(tmp_path, mtp="drop")
    assert dropped.config.mtp_depth == 0
    assert "mtp.modules.projection.weight" not in arrays_by_name(dropped.parameters)
    with pytest.raises(UserError, match=r"has a config\.json already"):
        save(tmp_path, config, parameters, router, TOKENIZER)


def test_a_full_disk_leaves_no_config(tmp_path, monkeypatch):
    config = MODELS["llama"]
    states = random_states(config, 0)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_jax.interop.hugging_face.writer.sync", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "out", config, *states, TOKENIZER)
    assert list((tmp_path / "out").iterdir()) == []
