"""The table of names: both directions, and against the gguf library's own table."""

from dataclasses import replace

import gguf
import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import AttentionConfig, MoEConfig
from moe_jax.interop.assemble import arrays_by_name
from moe_jax.interop.names import STACKS, Place, indices, place_of, tensor_names
from moe_jax.model.abstract import abstract_states
from tests.conftest import MLA, SMALL_MODEL

EXPERTS = MoEConfig(experts=3, experts_per_token=2, expert_hidden=14, shared_experts=0)
QK_NORM = AttentionConfig(heads=4, kv_heads=2, head_dim=8, qk_norm="head")
MODELS = {
    "dense": replace(SMALL_MODEL, dense_layers=3),
    "untied": replace(SMALL_MODEL, dense_layers=3, tied_embedding=False),
    "qk-norm": replace(SMALL_MODEL, dense_layers=3, attention=QK_NORM),
    "sparse": replace(SMALL_MODEL, dense_layers=0, moe=EXPERTS),
    "dense, then sparse": replace(SMALL_MODEL, layers=12, moe=EXPERTS, attention=QK_NORM),
}
FORMATS = ("gguf", "hugging_face")


def every_tensor(format, model):
    """(place, name in a file) of all tensors of a model."""
    for parameter, leaf in arrays_by_name(abstract_states(model)[0]).items():
        for index in indices(format, parameter, leaf.shape):
            names = tensor_names(format, parameter, index, model.dense_layers)
            for part, name in enumerate(names):
                yield Place(parameter, index, part), name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_parameter_goes_there_and_back_and_no_name_is_used_twice(format, model):
    tensors = list(every_tensor(format, model))
    for place, name in tensors:
        assert place_of(format, name, model.dense_layers) == place
    names = [name for _, name in tensors]
    assert len(set(names)) == len(names)
    parameters = {place.parameter for place, _ in tensors}
    assert parameters == set(arrays_by_name(abstract_states(model)[0]))


@pytest.mark.parametrize("format", FORMATS)
def test_no_row_stands_twice(format):
    for rows in STACKS.values():
        names = [getattr(row, format) for row in rows]
        assert len(set(names)) == len(names)


def test_the_two_columns_are_those_of_the_gguf_library():
    """Its table maps Hugging Face's names to llama.cpp's. It stacks the experts of a layer before
    it looks their names up."""
    architecture = gguf.MODEL_ARCH
    tables = [
        gguf.get_tensor_name_map(of, 3)
        for of in (architecture.QWEN3, architecture.QWEN3MOE, architecture.DEEPSEEK2)
    ]
    for stack, rows in STACKS.items():
        theirs = "model.layers.1." if stack else ""
        ours = "blk.1." if stack else ""
        for row in rows:
            name = theirs + row.hugging_face.replace(".{expert}", "")
            names = {table.get_name(name) for table in tables} - {None}
            assert names == {ours + row.gguf}, row


def test_layers_of_a_file_are_numbered_through_both_stacks():
    down = "sparse.blocks.moe.down"
    assert tensor_names("gguf", down, (2,), 3) == ("blk.5.ffn_down_exps.weight",)
    expected = ("model.layers.5.mlp.experts.7.down_proj.weight",)
    assert tensor_names("hugging_face", down, (2, 7), 3) == expected
    shared = tensor_names("hugging_face", "sparse.blocks.shared_experts.gate_up.weight", (0,), 1)
    assert shared == (
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
    )
    place = Place("sparse.blocks.shared_experts.gate_up.weight", (0,), 1)
    assert place_of("hugging_face", shared[1], 1) == place


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.ffn_gate_inp.weight",  # a router in a dense block
        "blk.1.ffn_gate.weight",  # a dense feed-forward in a sparse block
        "blk.01.attn_q.weight",
        "blk.1.attn_q.bias",
        "blk.attn_q.weight",
        "blk.#.attn_q.weight",
        "token_embd",
        "",
    ],
)
def test_unknown_tensors_have_no_place(name):
    assert place_of("gguf", name, dense_layers=1) is None


@pytest.mark.parametrize(
    "parameter",
    ["dense.blocks.attention.kv_down.weight", "mtp.modules.norm.scale", "dense.blocks.moe.router"],
)
def test_parameters_without_a_name_are_refused(parameter):
    with pytest.raises(UserError, match=f"parameter {parameter} has no name in gguf files"):
        tensor_names("gguf", parameter, (0,), 1)


def test_multi_head_latent_attention_has_no_names_yet():
    model = replace(SMALL_MODEL, attention=MLA)
    with pytest.raises(UserError, match="has no name in hugging_face files"):
        list(every_tensor("hugging_face", model))
