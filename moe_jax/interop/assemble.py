"""Parameters of ours from the tensors of a file, and tensors from parameters, by names.py."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.base.errors import UserError, brief, quote
from moe_jax.config import ModelConfig
from moe_jax.interop.names import Format, Names, Order
from moe_jax.interop.order import Rotary, ours, rotary_rows, theirs
from moe_jax.model.abstract import abstract_states
from moe_jax.model.parameters import dotted, role_of


class Layout(NamedTuple):
    """How a format keeps the parameters of a model."""

    format: Format = "hugging_face"
    interleaved: bool = False
    """Whether the rows of a rotated pair lie side by side."""


class Tensors(ABC):
    """The tensors of a file."""

    layout: Layout
    shapes: dict[str, tuple[int, ...]]
    """Every tensor's shape by its name in the file."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The tensor in float32. UserError: its type is not supported."""

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
    order: Order
    rotary: Rotary | None
    """The rows of rotated pairs, where they are interleaved."""

    def ours(self, tensors: list[np.ndarray]) -> np.ndarray:
        """parameter[index] from its tensors."""
        parts = [ours(tensor, self.order, self.rotary) for tensor in tensors]
        # Axis -2 has the outputs; vectors are never concatenated and have no such axis.
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)
        return whole.swapaxes(-1, -2) if self.transposed else whole

    def theirs(self, array: np.ndarray) -> list[np.ndarray]:
        """The tensors of parameter[index], the inverse of `ours`."""
        whole = array.swapaxes(-1, -2) if self.transposed else array
        parts = np.split(whole, len(self.names), axis=-2) if len(self.names) > 1 else [whole]
        return [theirs(part, self.order, self.rotary) for part in parts]


def read_arrays(
    tensors: Tensors, config: ModelConfig, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Every parameter of Transformer(config), and every selection bias, by its dotted name.

    Parameters have the type `dtype`, and the biases of a sigmoid gate are float32. UserError: a
    tensor is missing, unknown, of another shape, of an unsupported type, or not finite.
    """
    shapes = shapes_of(config)
    found = require_complete(tensors, config)
    # Memory is allocated only here. All shapes were compared with the file's by now, so a false
    # config cannot ask for more than the file holds.
    arrays = {name: np.empty(shape, dtype_of(name, dtype)) for name, shape in shapes.items()}
    for piece in found:
        arrays[piece.parameter][piece.index] = read_piece(tensors, piece)
    return arrays


def require_complete(tensors: Tensors, config: ModelConfig) -> list[Piece]:
    """The parts of the model. UserError: a tensor is missing, unknown or of another shape."""
    found = []
    for piece in pieces(tensors.layout, config):
        _require_shapes(tensors, piece)
        found.append(piece)
    _require_all_used(tensors, found)
    return found


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters, and of the biases that a sigmoid gate has, by dotted name."""
    parameters, router = _abstract(config)
    leaves = arrays_by_name(parameters)
    if config.moe.gate == "sigmoid":
        leaves |= arrays_by_name(router)
    return {name: leaf.shape for name, leaf in leaves.items()}


# Cached, because abstract_states takes a second for a large model. Nobody here changes the states.
@lru_cache(maxsize=4)
def _abstract(config: ModelConfig) -> tuple[nnx.State, nnx.State]:
    return abstract_states(config)


def dtype_of(name: str, dtype: str) -> jnp.dtype:
    """The type of a parameter where matrices have `dtype`. A selection bias is float32."""
    return jnp.dtype("float32" if role_of(name) == "router_bias" else dtype)


def as_parameters(config: ModelConfig, arrays: Mapping[str, Any]) -> nnx.State:
    """The parameters of Transformer(config) from arrays by dotted name."""
    dtype = jnp.dtype(config.param_dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(arrays[dotted(path)], dtype), _abstract(config)[0]
    )


def as_router(config: ModelConfig, arrays: Mapping[str, Any]) -> nnx.State:
    """The selection biases of Transformer(config): 0 where `arrays` has none."""

    def bias(path: Any, leaf: Any) -> jax.Array:
        array = arrays.get(dotted(path))
        return jnp.zeros(leaf.shape, leaf.dtype) if array is None else jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(bias, _abstract(config)[1])


def arrays_by_name(parameters: Any) -> dict[str, Any]:
    """The leaves of a parameter state by dotted name; the inverse of `as_parameters`."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return {dotted(path): leaf for path, leaf in leaves}


def parts_in_memory(*states: Any) -> Callable[[Piece], np.ndarray]:
    """Gives parameter[index] of a piece, in NumPy. Memory: one stacked parameter on the host."""
    arrays = {name: leaf for state in states for name, leaf in arrays_by_name(state).items()}

    # Whole and not by index: JAX would compile an indexing for each shape. The pieces of one
    # parameter follow each other.
    @lru_cache(maxsize=1)
    def on_host(parameter: str) -> np.ndarray:
        return np.asarray(arrays[parameter])

    return lambda piece: on_host(piece.parameter)[piece.index]


def pieces(layout: Layout, config: ModelConfig) -> Iterator[Piece]:
    """Every part of the parameters that has tensors of its own in a file.

    Lazily, because a false config may claim a million layers: the first that is missing from the
    file ends the reading.
    """
    names = Names(layout.format, config)
    for parameter, shape in shapes_of(config).items():
        axes = names.index_length(parameter)
        own = shape[axes:]
        transposed = axes > 0 and len(own) >= 2
        how = names.order(parameter)
        rotary = None
        if how == "rotary" and layout.interleaved:
            rotary = rotary_rows(parameter, config.attention)
        for index in names.indices(parameter, shape):
            tensors = names.tensors(parameter, index)
            wanted = own
            if transposed:
                wanted = (*shape[axes:-2], shape[-1] // len(tensors), shape[-2])
            yield Piece(
                parameter, index, tensors, wanted, transposed=transposed, order=how, rotary=rotary
            )


def _require_shapes(tensors: Tensors, piece: Piece) -> None:
    for name in piece.names:
        shape = tensors.shapes.get(name)
        if shape is None:
            raise UserError(f"tensor {name} is missing")
        if shape != piece.shape:
            raise UserError(f"tensor {name} has shape {quote(shape)}, not {piece.shape}")


def _require_all_used(tensors: Tensors, found: list[Piece]) -> None:
    """A tensor that we do not know (a bias, an adapter) would change the model."""
    used = {name for piece in found for name in piece.names}
    unknown = sorted(name for name in set(tensors.shapes) - used if not tensors.ignored(name))
    if unknown:
        raise UserError(f"tensor {brief(unknown[0])} has no place in a plain model of this kind")


def read_piece(tensors: Tensors, piece: Piece) -> np.ndarray:
    """parameter[index] in float32. UserError: a tensor is not finite, or its type is unknown."""
    parts = []
    for name in piece.names:
        part = tensors.read(name)
        if not np.isfinite(part).all():
            raise UserError(f"tensor {name} holds values that are not finite")
        parts.append(part)
    return piece.ours(parts)
