"""Names of parameters: ours, llama.cpp's (GGUF files) and Hugging Face's, for both directions.

    tensor_names("hugging_face", "sparse.blocks.moe.gate_up", (0, 3), dense_layers=1)
        == ("model.layers.1.mlp.experts.3.gate_proj.weight",
            "model.layers.1.mlp.experts.3.up_proj.weight")
    place_of("hugging_face", "model.layers.1.mlp.experts.3.up_proj.weight", dense_layers=1)
        == Place("sparse.blocks.moe.gate_up", (0, 3), part=1)

We stack the dense blocks and the sparse blocks, each from layer 0. Files number all blocks in one
sequence, the dense ones first.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from moe_jax.base.errors import UserError

Format = Literal["gguf", "hugging_face"]


class Row(NamedTuple):
    """One tensor of a file, and the parameter of ours that holds it."""

    parameter: str
    """Dotted path. Several rows with one path are concatenated along the outputs, in order."""
    gguf: str
    hugging_face: str


# The columns stay aligned, because this is a table to look things up in.
# fmt: off
MODEL = (
    Row("embedding",                        "token_embd",       "model.embed_tokens"),
    Row("norm.scale",                       "output_norm",      "model.norm"),
    Row("head",                             "output",           "lm_head"),
)
BLOCK = (
    Row("attention_norm.scale",             "attn_norm",        "input_layernorm"),
    Row("attention.query.weight",           "attn_q",           "self_attn.q_proj"),
    Row("attention.key.weight",             "attn_k",           "self_attn.k_proj"),
    Row("attention.value.weight",           "attn_v",           "self_attn.v_proj"),
    Row("attention.out.weight",             "attn_output",      "self_attn.o_proj"),
    Row("attention.query_norm.scale",       "attn_q_norm",      "self_attn.q_norm"),
    Row("attention.key_norm.scale",         "attn_k_norm",      "self_attn.k_norm"),
    Row("feed_forward_norm.scale",          "ffn_norm",         "post_attention_layernorm"),
)
DENSE = (
    Row("feed_forward.gate_up.weight",      "ffn_gate",         "mlp.gate_proj"),
    Row("feed_forward.gate_up.weight",      "ffn_up",           "mlp.up_proj"),
    Row("feed_forward.down.weight",         "ffn_down",         "mlp.down_proj"),
)
# A GGUF file stacks the experts of a layer in one tensor, as we do. Hugging Face's files have one
# tensor for each expert.
SPARSE = (
    Row("moe.router",                       "ffn_gate_inp",     "mlp.gate"),
    Row("moe.gate_up",                      "ffn_gate_exps",    "mlp.experts.{expert}.gate_proj"),
    Row("moe.gate_up",                      "ffn_up_exps",      "mlp.experts.{expert}.up_proj"),
    Row("moe.down",                         "ffn_down_exps",    "mlp.experts.{expert}.down_proj"),
    Row("shared_experts.gate_up.weight",    "ffn_gate_shexp",   "mlp.shared_experts.gate_proj"),
    Row("shared_experts.gate_up.weight",    "ffn_up_shexp",     "mlp.shared_experts.up_proj"),
    Row("shared_experts.down.weight",       "ffn_down_shexp",   "mlp.shared_experts.down_proj"),
)
# fmt: on

STACKS = {"": MODEL, "dense": BLOCK + DENSE, "sparse": BLOCK + SPARSE}
"""The rows of the parameters outside of the blocks, and of each stack of blocks."""
BLOCK_PREFIX: dict[Format, str] = {"gguf": "blk.{layer}.", "hugging_face": "model.layers.{layer}."}
BLOCKS = ".blocks."
"""Lies between the name of a stack and the path inside of a block."""
NUMBER = r"(?<=\.)(?:0|[1-9]\d*)(?=\.)"
"""A layer or an expert inside of a name. "blk.01." is no name of any file."""


class Place(NamedTuple):
    """The part of a parameter that one tensor of a file holds."""

    parameter: str
    index: tuple[int, ...]
    """Layer in its stack, and expert where the file has a tensor for each."""
    part: int
    """Position among the tensors that are concatenated to parameter[index]."""


def tensor_names(
    format: Format, parameter: str, index: tuple[int, ...], dense_layers: int
) -> tuple[str, ...]:
    """The tensors of a file whose concatenation is parameter[index].

    `index` has `index_length` numbers. UserError: the format has no name for the parameter.
    """
    stack, _, _ = parameter.rpartition(BLOCKS)
    numbers = dict(zip(("layer", "expert"), index, strict=False))
    if stack == "sparse":
        numbers["layer"] += dense_layers
    return tuple(template.format(**numbers) for template in _templates(format, parameter))


def place_of(format: Format, name: str, dense_layers: int) -> Place | None:
    """The inverse of `tensor_names`: what a tensor of a file holds; None for an unknown name."""
    numbers = [int(number) for number in re.findall(NUMBER, name)]
    stack = ""
    if numbers:
        stack = "dense" if numbers[0] < dense_layers else "sparse"
    if stack == "sparse":
        numbers[0] -= dense_layers
    template = re.sub(NUMBER, "#", name)
    match = _rows_by_template(format, stack).get(template)
    # A name that has a "#" of its own lacks a number.
    if match is None or template.count("#") != len(numbers):
        return None
    parameter, part = match
    return Place(parameter, tuple(numbers), part)


def indices(format: Format, parameter: str, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every index of a parameter of this shape for which a file has tensors of its own."""
    return np.ndindex(shape[: index_length(format, parameter)])


def index_length(format: Format, parameter: str) -> int:
    """Leading axes that files do not have: 0 outside of blocks, 1 for layers, 2 for layers and
    experts. UserError: the format has no name for the parameter."""
    template = _templates(format, parameter)[0]
    return template.count("{layer}") + template.count("{expert}")


def _templates(format: Format, parameter: str) -> list[str]:
    stack, _, path = parameter.rpartition(BLOCKS)
    rows = [row for row in STACKS.get(stack, ()) if row.parameter == path]
    if not rows:
        raise UserError(f"parameter {parameter} has no name in {format} files")
    return [_template(format, stack, row) for row in rows]


def _template(format: Format, stack: str, row: Row) -> str:
    prefix = BLOCK_PREFIX[format] if stack else ""
    return f"{prefix}{getattr(row, format)}.weight"


@cache
def _rows_by_template(format: Format, stack: str) -> dict[str, tuple[str, int]]:
    """Names with "#" for numbers -> (our parameter, position among the tensors of that one)."""
    rows = STACKS[stack]
    by_template: dict[str, tuple[str, int]] = {}
    for row in rows:
        name = _template(format, stack, row).format(layer="#", expert="#")
        parameter = f"{stack}{BLOCKS}{row.parameter}" if stack else row.parameter
        same = [other for other in rows if other.parameter == row.parameter]
        by_template[name] = (parameter, same.index(row))
    return by_template
