"""Names of parameters: ours, llama.cpp's (GGUF files) and Hugging Face's, for both directions.

    names = Names("hugging_face", config)                      # config.dense_layers == 1
    names.tensors("sparse.blocks.moe.gate_up", (0, 3))
        == ("model.layers.1.mlp.experts.3.gate_proj.weight",
            "model.layers.1.mlp.experts.3.up_proj.weight")
    names.place("model.layers.1.mlp.experts.3.up_proj.weight")
        == Place("sparse.blocks.moe.gate_up", (0, 3), part=1)

We stack the dense blocks and the sparse blocks, each from layer 0. Files number all blocks in one
sequence, the dense ones first. Modules of multi-token prediction follow as further blocks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from moe_jax.base.errors import UserError
from moe_jax.config import ModelConfig

Format = Literal["gguf", "hugging_face", "mixtral"]
"""mixtral: Hugging Face's, with the names of Mixtral where they are others."""
Order = Literal["", "rotary", "halves"]
"""How rows or columns of a file differ from ours (interop/order.py)."""


class Row(NamedTuple):
    """One tensor of a file, and the parameter of ours that holds it."""

    parameter: str
    """Dotted path. Several rows with one path are concatenated along the outputs, in order."""
    gguf: str
    hugging_face: str
    mixtral: str = ""
    """Empty: as hugging_face."""
    order: Order = ""

    def name(self, format: Format) -> str:
        """The name in a format, with its ending: every tensor but a bias is a weight."""
        name = getattr(self, format) or self.hugging_face
        return name if name.endswith("bias") else f"{name}.weight"


# The columns stay aligned, because this is a table to look things up in.
# fmt: off
MODEL = (
    Row("embedding",                        "token_embd",       "model.embed_tokens"),
    Row("norm.scale",                       "output_norm",      "model.norm"),
    Row("head",                             "output",           "lm_head"),
)
BLOCK = (
    Row("attention_norm.scale",             "attn_norm",        "input_layernorm"),
    Row("attention.out.weight",             "attn_output",      "self_attn.o_proj"),
    Row("feed_forward_norm.scale",          "ffn_norm",         "post_attention_layernorm"),
)
GROUPED_QUERY = (
    Row("attention.query.weight",           "attn_q",           "self_attn.q_proj", order="rotary"),
    Row("attention.key.weight",             "attn_k",           "self_attn.k_proj", order="rotary"),
    Row("attention.value.weight",           "attn_v",           "self_attn.v_proj"),
    Row("attention.query_norm.scale",       "attn_q_norm",      "self_attn.q_norm"),
    Row("attention.key_norm.scale",         "attn_k_norm",      "self_attn.k_norm"),
)
LATENT = (
    Row("attention.query_down.weight",      "attn_q_a",         "self_attn.q_a_proj"),
    Row("attention.query_norm.scale",       "attn_q_a_norm",    "self_attn.q_a_layernorm"),
    Row("attention.query_up.weight",        "attn_q_b",         "self_attn.q_b_proj",
        order="rotary"),
    Row("attention.kv_down.weight",         "attn_kv_a_mqa",    "self_attn.kv_a_proj_with_mqa",
        order="rotary"),
    Row("attention.kv_norm.scale",          "attn_kv_a_norm",   "self_attn.kv_a_layernorm"),
    Row("attention.kv_up.weight",           "attn_kv_b",        "self_attn.kv_b_proj"),
)
# Latent attention that does not compress its queries.
DIRECT = (
    Row("attention.query_up.weight",        "attn_q",           "self_attn.q_proj", order="rotary"),
    *LATENT[3:],
)
DENSE = (
    Row("feed_forward.gate_up.weight",      "ffn_gate",         "mlp.gate_proj"),
    Row("feed_forward.gate_up.weight",      "ffn_up",           "mlp.up_proj"),
    Row("feed_forward.down.weight",         "ffn_down",         "mlp.down_proj"),
)
# A GGUF file stacks the experts of a layer in one tensor, as we do. Hugging Face's files have one
# tensor for each expert.
SPARSE = (
    Row("moe.router",                       "ffn_gate_inp",     "mlp.gate",
        "block_sparse_moe.gate"),
    Row("moe.bias",                         "exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
    Row("moe.gate_up",                      "ffn_gate_exps",    "mlp.experts.{expert}.gate_proj",
        "block_sparse_moe.experts.{expert}.w1"),
    Row("moe.gate_up",                      "ffn_up_exps",      "mlp.experts.{expert}.up_proj",
        "block_sparse_moe.experts.{expert}.w3"),
    Row("moe.down",                         "ffn_down_exps",    "mlp.experts.{expert}.down_proj",
        "block_sparse_moe.experts.{expert}.w2"),
    Row("shared_experts.gate_up.weight",    "ffn_gate_shexp",   "mlp.shared_experts.gate_proj"),
    Row("shared_experts.gate_up.weight",    "ffn_up_shexp",     "mlp.shared_experts.up_proj"),
    Row("shared_experts.down.weight",       "ffn_down_shexp",   "mlp.shared_experts.down_proj"),
)
# A module of multi-token prediction, besides its block.
MODULE = (
    Row("embedding_norm.scale",             "nextn.enorm",      "enorm"),
    Row("hidden_norm.scale",                "nextn.hnorm",      "hnorm"),
    Row("projection.weight",                "nextn.eh_proj",    "eh_proj", order="halves"),
    Row("norm.scale",                       "nextn.shared_head_norm", "shared_head.norm"),
)
# fmt: on

STACKS = {"dense": "dense.blocks.", "sparse": "sparse.blocks.", "mtp": "mtp.modules."}
"""Beginning of the dotted path of a stacked parameter."""
BLOCK_PREFIX = {"gguf": "blk.{layer}.", "hugging_face": "model.layers.{layer}."}
NUMBER = r"(?<=\.)(?:0|[1-9]\d{0,8})(?=\.)"
"""A layer or an expert inside of a name. "blk.01." is no name of any file."""


class Place(NamedTuple):
    """The part of a parameter that one tensor of a file holds."""

    parameter: str
    index: tuple[int, ...]
    """Layer in its stack, and expert where the file has a tensor for each."""
    part: int
    """Position among the tensors that are concatenated to parameter[index]."""


@dataclass(frozen=True)
class Names:
    """The names of one model's parameters in one format."""

    format: Format
    config: ModelConfig

    def tensors(self, parameter: str, index: tuple[int, ...]) -> tuple[str, ...]:
        """The tensors of a file whose concatenation is parameter[index].

        `index` has `index_length` numbers. UserError: the format has no name for the parameter.
        """
        stack, _ = _split(parameter)
        numbers = dict(zip(("layer", "expert"), index, strict=False))
        if stack:
            numbers["layer"] += self._first_layer[stack]
        return tuple(template.format(**numbers) for template in self._templates(parameter))

    def place(self, name: str) -> Place | None:
        """The inverse of `tensors`: what a tensor of a file holds; None for an unknown name."""
        numbers = [int(number) for number in re.findall(NUMBER, name)]
        stack = ""
        if numbers:
            stack = max(
                (s for s, first in self._first_layer.items() if numbers[0] >= first),
                key=lambda s: self._first_layer[s],
            )
            numbers[0] -= self._first_layer[stack]
        template = re.sub(NUMBER, "#", name)
        match = self._rows_by_template[stack].get(template)
        # A name that has a "#" of its own lacks a number.
        if match is None or template.count("#") != len(numbers):
            return None
        parameter, part = match
        return Place(parameter, tuple(numbers), part)

    def indices(self, parameter: str, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Every index of a parameter of this shape for which a file has tensors of its own."""
        return np.ndindex(shape[: self.index_length(parameter)])

    def index_length(self, parameter: str) -> int:
        """Leading axes that files do not have: 0 outside of blocks, 1 for layers, 2 for layers and
        experts. UserError: the format has no name for the parameter."""
        template = self._templates(parameter)[0]
        return template.count("{layer}") + template.count("{expert}")

    def order(self, parameter: str) -> Order:
        """How the file's rows or columns differ from the parameter's."""
        return self._rows(parameter)[0].order

    @cached_property
    def rows(self) -> dict[str, tuple[Row, ...]]:
        """The rows of the parameters outside of the blocks (""), and of each stack."""
        attention = GROUPED_QUERY
        if self.config.attention.kind == "mla":
            attention = LATENT if self.config.attention.q_rank else DIRECT
        dense = BLOCK + attention + DENSE
        sparse = BLOCK + attention + SPARSE
        # The block of a module is as the main model's last one.
        inner = sparse if self.config.moe_layers else dense
        block = tuple(row._replace(parameter=f"block.{row.parameter}") for row in inner)
        return {"": MODEL, "dense": dense, "sparse": sparse, "mtp": MODULE + block}

    @cached_property
    def _first_layer(self) -> dict[str, int]:
        # Without blocks of a kind, two stacks begin at one number: the later one has it.
        first = {"dense": 0} if self.config.dense_layers else {}
        if self.config.moe_layers:
            first["sparse"] = self.config.dense_layers
        return first | {"mtp": self.config.layers}

    def _templates(self, parameter: str) -> list[str]:
        stack, _ = _split(parameter)
        return [self._template(stack, row) for row in self._rows(parameter)]

    def _rows(self, parameter: str) -> list[Row]:
        stack, path = _split(parameter)
        rows = [row for row in self.rows[stack] if row.parameter == path]
        if not rows:
            raise UserError(f"parameter {parameter} has no name in {self.format} files")
        return rows

    def _template(self, stack: str, row: Row) -> str:
        prefix = BLOCK_PREFIX["gguf" if self.format == "gguf" else "hugging_face"] if stack else ""
        return prefix + row.name(self.format)

    @cached_property
    def _rows_by_template(self) -> dict[str, dict[str, tuple[str, int]]]:
        """By stack: names with "#" for numbers -> (our parameter, position among those of it)."""
        by_stack: dict[str, dict[str, tuple[str, int]]] = {}
        for stack, rows in self.rows.items():
            by_stack[stack] = {}
            for row in rows:
                name = self._template(stack, row).format(layer="#", expert="#")
                same = [other for other in rows if other.parameter == row.parameter]
                parameter = STACKS.get(stack, "") + row.parameter
                by_stack[stack][name] = (parameter, same.index(row))
        return by_stack


def _split(parameter: str) -> tuple[str, str]:
    """(stack, path inside of a block). The stack is empty for a parameter outside of blocks."""
    for stack, beginning in STACKS.items():
        if parameter.startswith(beginning):
            return stack, parameter.removeprefix(beginning)
    return "", parameter
