"""The tensors of a GGUF file, dequantised."""

import numpy as np

from moe_jax.base.errors import UserError, brief
from moe_jax.interop.assemble import Layout, Tensors
from moe_jax.interop.gguf.header import Header, TensorInfo


class GGUFTensors(Tensors):
    """The tensors of a GGUF file."""

    def __init__(self, header: Header) -> None:
        # In a llama file, rotary embedding turns neighbouring rows of a head. All other
        # architectures, and we, turn its two halves.
        interleaved = header.fields["general.architecture"] == "llama"
        self.layout = Layout("gguf", interleaved)
        self.shapes = {name: info.shape for name, info in header.tensors.items()}
        self._tensors = header.tensors

    def read(self, name: str) -> np.ndarray:
        return dequantised(name, self._tensors[name])


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
