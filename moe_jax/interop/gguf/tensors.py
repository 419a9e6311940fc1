"""The tensors of a GGUF file, dequantised."""

import numpy as np

from moe_jax.base.errors import UserError, brief
from moe_jax.config import ModelConfig
from moe_jax.interop.assemble import Tensors
from moe_jax.interop.gguf.header import Header, TensorInfo

INTERLEAVED = ("attention.query.weight", "attention.key.weight")
"""Parameters whose rows a llama file has in another order: there, rotary embedding turns
neighbouring rows of a head. All other architectures, and we, turn its two halves."""


class GGUFTensors(Tensors):
    """The tensors of a GGUF file."""

    format = "gguf"

    def __init__(self, header: Header, config: ModelConfig) -> None:
        self.shapes = {name: info.shape for name, info in header.tensors.items()}
        self._tensors = header.tensors
        self._head_dim = config.attention.head_dim
        self._interleaved = header.fields["general.architecture"] == "llama"

    def read(self, name: str, parameter: str) -> np.ndarray:
        array = dequantised(name, self._tensors[name])
        if self._interleaved and parameter.endswith(INTERLEAVED):
            # The file's rows 0, 1, 2, 3, ... of a head are our rows 0, half, 1, half + 1, ...
            pairs = array.reshape(-1, self._head_dim // 2, 2, array.shape[-1])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array


def dequantised(name: str, info: TensorInfo) -> np.ndarray:
    """A tensor in float32. UserError: its type is not supported."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    kind = GGMLQuantizationType(info.kind)
    # The library wants these two by their dtype, and all others (bfloat16, too) as bytes.
    floats = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    try:
        if kind in floats:
            array = info.data.view(floats[kind]).reshape(info.shape)
        else:
            array = info.data.reshape(quant_shape_to_byte_shape(info.shape, kind))
        return dequantize(array, kind)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"tensor {brief(name)} of type {kind.name} cannot be read: {brief(error)}"
        ) from error
