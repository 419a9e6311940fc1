"""The tensors of a folder of safetensors."""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import safe_open

from moe_jax.base.errors import UserError, brief, quote, reading
from moe_jax.interop.assemble import Layout, Tensors
from moe_jax.interop.hugging_face.folder import weight_files

DTYPES = ("F32", "F16", "BF16")
FP8 = "F8_E4M3"
SCALE = "_scale_inv"
"""Ending of the tensor of scales beside one in FP8: value · scale, in spite of its name."""


class Entry(NamedTuple):
    """Where a tensor is."""

    file: str
    dtype: str


class SafeTensors(Tensors):
    """The tensors of all files of a folder. UserError: a file is missing, damaged or elsewhere."""

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        blocks: tuple[int, int] | None = None,
        main_layers: int | None = None,
    ) -> None:
        """`blocks`: rows and columns that share a scale in an FP8 folder. `main_layers`: blocks
        from this number on, which are of multi-token prediction, are ignored."""
        self.layout = layout
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._folder = folder
        self._entries: dict[str, Entry] = {}
        self._opened: tuple[str, Any] = ("", None)
        self._blocks = blocks
        self._main_layers = main_layers
        for file_name in weight_files(folder):
            file = self._file(file_name)
            for name in file.keys():  # noqa: SIM118
                if name in self.shapes:
                    raise UserError(f"tensor {brief(name)} is in two files")
                entry = file.get_slice(name)
                self.shapes[name] = tuple(entry.get_shape())
                self._entries[name] = Entry(file_name, entry.get_dtype())

    def _file(self, file_name: str) -> Any:
        """The opened file. One at a time: what was read of a mapped file stays in memory."""
        if self._opened[0] != file_name:
            self._opened = ("", None)
            with reading(file_name):
                self._opened = (file_name, safe_open(self._folder / file_name, framework="np"))
        return self._opened[1]

    def read(self, name: str) -> np.ndarray:
        file_name, dtype = self._entries[name]
        if dtype == FP8 and self._blocks:
            return self._dequantised(name, file_name, self._blocks)
        if dtype not in DTYPES:
            raise UserError(
                f"tensor {brief(name)} has type {brief(dtype)}: only {', '.join(DTYPES)} are read"
                + (f", and {FP8} with a quantization_config" if dtype == FP8 else "")
            )
        with reading(name):
            return self._file(file_name).get_tensor(name).astype(np.float32)

    def ignored(self, name: str) -> bool:
        # Old files hold the rotary frequencies, which follow from rope_theta. The head of a tied
        # model is its embedding; an untied model uses the tensor, and then nobody asks.
        if name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight":
            return True
        if name.endswith(SCALE) and self._blocks and name.removesuffix(SCALE) in self.shapes:
            return True
        return self._of_mtp(name)

    def holds_layer(self, number: int) -> bool:
        """Whether there is any tensor of a block."""
        prefix = f"model.layers.{number}."
        return any(name.startswith(prefix) for name in self.shapes)

    def without_mtp(self, main_layers: int) -> None:
        """Ignores blocks from this number on."""
        self._main_layers = main_layers

    def _of_mtp(self, name: str) -> bool:
        parts = name.split(".")
        if parts[:2] != ["model", "layers"] or len(parts) < 4 or not parts[2].isdecimal():
            return False
        # Files of multi-token prediction repeat the main model's embedding and head.
        shared = ".".join(parts[3:]) in ("embed_tokens.weight", "shared_head.head.weight")
        beyond = self._main_layers is not None and int(parts[2][:9]) >= self._main_layers
        return beyond or shared

    def _dequantised(self, name: str, file_name: str, blocks: tuple[int, int]) -> np.ndarray:
        """value · scale of its block, as the published FP8 checkpoints keep matrices."""
        shape = self.shapes[name]
        scale_name = f"{name}{SCALE}"
        if len(shape) != 2 or scale_name not in self.shapes:
            raise UserError(f"tensor {brief(name)} is {FP8}, and {brief(scale_name)} is missing")
        wanted = tuple(math.ceil(n / block) for n, block in zip(shape, blocks, strict=True))
        if self.shapes[scale_name] != wanted:
            raise UserError(
                f"tensor {brief(scale_name)} has shape {quote(self.shapes[scale_name])}, "
                f"not {wanted}"
            )
        scale = self.read(scale_name)
        for axis, block in enumerate(blocks):
            scale = np.repeat(scale, block, axis=axis)
        with reading(name):
            values = _bytes_of(self._folder / file_name, name).view(ml_dtypes.float8_e4m3fn)
            # Cut: the last block of an axis may be a part of one.
            return values.reshape(shape).astype(np.float32) * scale[: shape[0], : shape[1]]


def _bytes_of(path: Path, name: str) -> np.ndarray:
    """The bytes of a tensor, uint8, a view of the mapped file.

    The library's NumPy interface knows no FP8. It has compared the header with the file's size.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
    return np.memmap(path, np.uint8, "r", offset=8 + length + begin, shape=(end - begin,))
