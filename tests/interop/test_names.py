"""The table of names: both directions, and against the gguf library's own table."""

from dataclasses import replace

import gguf
import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import AttentionConfig, MoEConfig
from moe_jax.interop.assemble import shapes_of
from moe_jax.interop.names import BLOCK_PREFIX, Names, Place
from tests.conftest import MLA, SMALL_MODEL

EXPERTS = MoEConfig(experts=3, experts_per_token=2, expert_hidden=14, shared_experts=0)
QK_NORM = AttentionConfig(heads=4, kv_heads=2, head_dim=8, qk_norm="head")
MODELS = {
    "dense": replace(SMALL_MODEL, dense_layers=3),
    "untied": replace(SMALL_MODEL, dense_layers=3, tied_embedding=False),
    "qk-norm": replace(SMALL_MODEL, dense_layers=3, attention=QK_NORM),
    "sparse": replace(SMALL_MODEL, dense_layers=0, moe=EXPERTS),
    "dense, then sparse": replace(SMALL_MODEL, layers=12, moe=EXPERTS, attention=QK_NORM),
    "latent": replace(SMALL_MODEL, attention=MLA, mtp_depth=2),
    "latent, direct queries": replace(SMALL_MODEL, attention=replace(MLA, q_rank=0)),
}
FORMATS = ("gguf", "hugging_face", "mixtral")


def every_tensor(names):
    """(place, name in a file) of all tensors of a model."""
    for parameter, shape in shapes_of(names.config).items():
        for index in names.indices(parameter, shape):
            for part, name in enumerate(names.tensors(parameter, index)):
                yield Place(parameter, index, part), name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_parameter_goes_there_and_back_and_no_name_is_used_twice(format, model):
    names = Names(format, model)
    tensors = list(every_tensor(names))
    for place, name in tensors:
        assert names.place(name) == place
    assert len({name for _, name in tensors}) == len(tensors)
    assert {place.parameter for place, _ in tensors} == set(shapes_of(model))


def test_the_columns_are_those_of_the_gguf_library():
    """Its table maps Hugging Face's names to llama.cpp's. It stacks the experts of a layer before
    it looks their names up."""
    of = gguf.MODEL_ARCH
    # The last one for multi-token prediction alone: its norms have names of their own.
    architectures = (of.QWEN3, of.QWEN3MOE, of.DEEPSEEK2, of.GLM4_MOE)
    tables = [gguf.get_tensor_name_map(architecture, 3) for architecture in architectures]
    for model in MODELS.values():
        for stack, rows in Names("gguf", model).rows.items():
            theirs, ours = ((BLOCK_PREFIX[f] if stack else "") for f in ("hugging_face", "gguf"))
            for row in rows:
                for format in ("hugging_face", "mixtral"):
                    name = theirs.format(layer=1) + row.name(format).removesuffix(".weight")
                    # The library knows this one without its ending.
                    name = name.replace(".{expert}", "").removesuffix("_bias")
                    found = next(filter(None, (table.get_name(name) for table in tables)), None)
                    expected = ours.format(layer=1) + row.gguf.removesuffix(".bias")
                    assert found == expected, row


def test_layers_of_a_file_are_numbered_through_all_stacks():
    three_dense = replace(SMALL_MODEL, layers=12, dense_layers=3, mtp_depth=1)
    down = "sparse.blocks.moe.down"
    ours, theirs = Names("gguf", three_dense), Names("hugging_face", three_dense)
    assert ours.tensors(down, (2,)) == ("blk.5.ffn_down_exps.weight",)
    assert theirs.tensors(down, (2, 7)) == ("model.layers.5.mlp.experts.7.down_proj.weight",)
    shared = theirs.tensors("sparse.blocks.shared_experts.gate_up.weight", (0,))
    assert shared == (
        "model.layers.3.mlp.shared_experts.gate_proj.weight",
        "model.layers.3.mlp.shared_experts.up_proj.weight",
    )
    place = Place("sparse.blocks.shared_experts.gate_up.weight", (0,), 1)
    assert theirs.place(shared[1]) == place
    module = ("mtp.modules.projection.weight", (0,))
    assert theirs.tensors(*module) == ("model.layers.12.eh_proj.weight",)
    assert theirs.place("model.layers.12.eh_proj.weight") == Place(*module, 0)
    bias = theirs.tensors("mtp.modules.block.moe.bias", (0,))
    assert bias == ("model.layers.12.mlp.gate.e_score_correction_bias",)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.ffn_gate_inp.weight",  # a router in a dense block
        "blk.1.ffn_gate.weight",  # a dense feed-forward in a sparse block
        "blk.01.attn_q.weight",
        "blk.1.attn_q.bias",
        "blk.1.attn_q_a.weight",  # latent attention in another model
        "blk.attn_q.weight",
        "blk.#.attn_q.weight",
        "token_embd",
        "",
    ],
)
def test_unknown_tensors_have_no_place(name):
    assert Names("gguf", SMALL_MODEL).place(name) is None


@pytest.mark.parametrize(
    "parameter",
    ["dense.blocks.attention.kv_down.weight", "mtp.norm.scale", "dense.blocks.moe.router"],
)
def test_parameters_without_a_name_are_refused(parameter):
    with pytest.raises(UserError, match=f"parameter {parameter} has no name in gguf files"):
        Names("gguf", SMALL_MODEL).tensors(parameter, (0,))
