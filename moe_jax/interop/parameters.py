"""Parameters of ours put together from a file's tensors; one table for all formats."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.config import ModelConfig
from moe_jax.model.abstract import abstract_states
from moe_jax.model.parameters import dotted

ATTENTION = {
    "attention_norm.scale": ("attn_norm",),
    "attention.query.weight": ("attn_q",),
    "attention.key.weight": ("attn_k",),
    "attention.value.weight": ("attn_v",),
    "attention.out.weight": ("attn_output",),
    "feed_forward_norm.scale": ("ffn_norm",),
}
"""Our parameter of a block, and the tensors, one below the other, that it is made of, by the names
that llama.cpp gives them."""
QK_NORM = {
    "attention.query_norm.scale": ("attn_q_norm",),
    "attention.key_norm.scale": ("attn_k_norm",),
}
DENSE = {
    "feed_forward.gate_up.weight": ("ffn_gate", "ffn_up"),
    "feed_forward.down.weight": ("ffn_down",),
}
ROUTER = {"moe.router": ("ffn_gate_inp",)}
EXPERT = {"moe.gate_up": ("ffn_gate", "ffn_up"), "moe.down": ("ffn_down",)}


class Tensors(ABC):
    """A file's tensors: `shapes` by name, and what a format has to say about them."""

    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def name(self, part: str, layer: int | None, expert: int | None) -> str:
        """What the file calls a tensor; `layer` counts all blocks, dense ones first."""

    @abstractmethod
    def read(self, name: str, part: str) -> np.ndarray:
        """The tensor in float32. UserError: its type is not supported."""

    def ignored(self, name: str) -> bool:
        """Whether the model is the same without this tensor."""
        return False


class Piece(NamedTuple):
    """`parameter[index]`, made of the file's tensors `names`."""

    parameter: str
    index: tuple[int, ...]
    parts: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    """What each tensor must have in the file: [outputs, inputs] for a matrix."""
    transposed: bool


def read_arrays(tensors: Tensors, config: ModelConfig) -> dict[str, np.ndarray]:
    """Every parameter of Transformer(config) by its dotted name, float32. UserError: a tensor is
    missing, left over, of another shape, of an unsupported type, or not finite.

    Room is made only after all shapes have been found in the file, which bounds it.
    """
    shapes = {name: leaf.shape for name, leaf in _abstract(config)}
    planned = []
    for piece in _pieces(tensors, config, shapes):
        for name in piece.names:
            found = tensors.shapes.get(name)
            if found is None:
                raise UserError(f"tensor {name} is missing")
            if found != piece.shape:
                raise UserError(f"tensor {name} has shape {found}, not {piece.shape}")
        planned.append(piece)
    _require_all_used(tensors, {name for piece in planned for name in piece.names})
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for piece in planned:
        found = [_finite(tensors, *pair) for pair in zip(piece.names, piece.parts, strict=True)]
        whole = np.concatenate(found)
        arrays[piece.parameter][piece.index] = whole.T if piece.transposed else whole
    return arrays


def _pieces(
    tensors: Tensors, config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> Iterator[Piece]:
    def piece(
        parameter: str,
        parts: tuple[str, ...],
        index: tuple[int, ...] = (),
        layer: int | None = None,
    ) -> Piece:
        own = shapes[parameter][len(index) :]
        transposed = layer is not None and len(own) == 2
        wanted = own[::-1] if transposed else own
        wanted = (wanted[0] // len(parts), *wanted[1:])
        expert = index[1] if len(index) > 1 else None
        names = tuple(tensors.name(part, layer, expert) for part in parts)
        return Piece(parameter, index, parts, names, wanted, transposed)

    yield piece("embedding", ("token_embd",))
    yield piece("norm.scale", ("output_norm",))
    if not config.tied_embedding:
        yield piece("head", ("output",))
    common = ATTENTION | (QK_NORM if config.attention.qk_norm == "head" else {})
    for layer in range(config.layers):
        sparse = layer >= config.dense_layers
        blocks, index = ("sparse" if sparse else "dense"), layer - sparse * config.dense_layers
        for name, parts in (common | (ROUTER if sparse else DENSE)).items():
            yield piece(f"{blocks}.blocks.{name}", parts, (index,), layer)
        for expert in range(config.moe.experts if sparse else 0):
            for name, parts in EXPERT.items():
                yield piece(f"{blocks}.blocks.{name}", parts, (index, expert), layer)


def _require_all_used(tensors: Tensors, used: set[str]) -> None:
    """A tensor that we do not know (a bias, an adapter) would change the model."""
    unknown = sorted(name for name in set(tensors.shapes) - used if not tensors.ignored(name))
    if unknown:
        raise UserError(f"tensor {unknown[0]} has no place in a plain model of this kind")


def _finite(tensors: Tensors, name: str, part: str) -> np.ndarray:
    array = tensors.read(name, part)
    if not np.isfinite(array).all():
        raise UserError(f"tensor {name} holds values that are not finite")
    return array


def number(name: str, value: Any, most: float = 1e6) -> Any:
    """A value of a file's settings. UserError unless it is a number above 0 and up to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise UserError(f"{name} is {value!r}: a number from 0 to {most:g} is needed")
    return value


def whole(name: str, value: Any) -> int:
    """The same for a whole number."""
    if number(name, value) != int(value):
        raise UserError(f"{name} is {value!r}: a whole number is needed")
    return int(value)


def as_parameters(config: ModelConfig, arrays: dict[str, np.ndarray]) -> nnx.State:
    """The parameters of Transformer(config) from arrays by dotted name."""
    dtype = jnp.dtype(config.param_dtype)
    abstract, _ = abstract_states(config)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(arrays[dotted(path)], dtype), abstract
    )


def _abstract(config: ModelConfig) -> list[tuple[str, Any]]:
    return [(dotted(path), leaf) for path, leaf in nnx.to_flat_state(abstract_states(config)[0])]
