"""Parameters of ours, assembled from the tensors of a file by the table in names.py."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.base.errors import UserError, brief, quote
from moe_jax.config import ModelConfig
from moe_jax.interop.names import Format, index_length, indices, tensor_names
from moe_jax.model.abstract import abstract_states
from moe_jax.model.parameters import dotted


class Tensors(ABC):
    """The tensors of a file."""

    format: Format
    shapes: dict[str, tuple[int, ...]]
    """Every tensor's shape by its name in the file."""

    @abstractmethod
    def read(self, name: str, parameter: str) -> np.ndarray:
        """The tensor in float32, in the row order of our `parameter`. UserError: its type is not
        supported."""

    def ignored(self, name: str) -> bool:
        """Whether the model is the same without this tensor."""
        return False


class Piece(NamedTuple):
    """parameter[index], which is the concatenation of some tensors."""

    parameter: str
    index: tuple[int, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    """Of each tensor in the file."""
    transposed: bool
    """Matrices of blocks are [inputs, outputs] here and [outputs, inputs] in files."""


def read_arrays(tensors: Tensors, config: ModelConfig) -> dict[str, np.ndarray]:
    """Every parameter of Transformer(config) by its dotted name, float32.

    UserError: a tensor is missing, unknown, of another shape, of an unsupported type, or not
    finite.
    """
    abstract = arrays_by_name(abstract_states(config)[0])
    shapes = {name: leaf.shape for name, leaf in abstract.items()}
    pieces = []
    for piece in _pieces(tensors.format, shapes, config.dense_layers):
        _require_shapes(tensors, piece)
        pieces.append(piece)
    _require_all_used(tensors, pieces)
    # Memory is allocated only here. All shapes were compared with the file's by now, so a false
    # config cannot ask for more than the file holds.
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for piece in pieces:
        arrays[piece.parameter][piece.index] = _read(tensors, piece)
    return arrays


def as_parameters(config: ModelConfig, arrays: dict[str, Any]) -> nnx.State:
    """The parameters of Transformer(config) from arrays by dotted name."""
    dtype = jnp.dtype(config.param_dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(arrays[dotted(path)], dtype), abstract_states(config)[0]
    )


def arrays_by_name(parameters: Any) -> dict[str, Any]:
    """The leaves of a parameter state by dotted name; the inverse of `as_parameters`."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return {dotted(path): leaf for path, leaf in leaves}


def _pieces(
    format: Format, shapes: dict[str, tuple[int, ...]], dense_layers: int
) -> Iterator[Piece]:
    """Lazily, because a false config may claim a million layers: the first that is missing from
    the file ends the reading."""
    for parameter, shape in shapes.items():
        axes = index_length(format, parameter)
        own = shape[axes:]
        transposed = axes > 0 and len(shape) - axes >= 2
        for index in indices(format, parameter, shape):
            names = tensor_names(format, parameter, index, dense_layers)
            wanted = own
            if transposed:
                wanted = (*shape[axes:-2], shape[-1] // len(names), shape[-2])
            yield Piece(parameter, index, names, wanted, transposed)


def _require_shapes(tensors: Tensors, piece: Piece) -> None:
    for name in piece.names:
        shape = tensors.shapes.get(name)
        if shape is None:
            raise UserError(f"tensor {name} is missing")
        if shape != piece.shape:
            raise UserError(f"tensor {name} has shape {quote(shape)}, not {piece.shape}")


def _require_all_used(tensors: Tensors, pieces: list[Piece]) -> None:
    """A tensor that we do not know (a bias, an adapter) would change the model."""
    used = {name for piece in pieces for name in piece.names}
    unknown = sorted(name for name in set(tensors.shapes) - used if not tensors.ignored(name))
    if unknown:
        raise UserError(f"tensor {brief(unknown[0])} has no place in a plain model of this kind")


def _read(tensors: Tensors, piece: Piece) -> np.ndarray:
    parts = [tensors.read(name, piece.parameter) for name in piece.names]
    for name, part in zip(piece.names, parts, strict=True):
        if not np.isfinite(part).all():
            raise UserError(f"tensor {name} holds values that are not finite")
    # Axis -2 has the outputs; vectors are never concatenated and have no such axis.
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)
    return whole.swapaxes(-1, -2) if piece.transposed else whole
