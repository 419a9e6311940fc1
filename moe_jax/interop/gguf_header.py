"""The header of a GGUF file, read without believing it.

The gguf library's own reader loops over whatever length a file claims, so that a few bytes can
fill the memory. Here every length is held against the file's size before anything is read.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.base.errors import UserError

SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"} | {
    7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
STRING, ARRAY = 8, 9
MOST_ENTRIES = 4_000_000
"""Strings in one array: the largest vocabularies have 0.3 million tokens and twice the merges."""
MOST_DIMENSIONS = 4


class MalformedError(UserError):
    """The file is not what it says."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is NumPy's order, the reverse of the file's."""

    shape: tuple[int, ...]
    kind: int
    """GGMLQuantizationType."""
    data: np.ndarray
    """uint8, a view of the mapped file."""


@dataclass(frozen=True)
class Header:
    """Metadata (numbers, strings, lists of strings, NumPy arrays) and tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Everything before the tensors' data. MalformedError: the file is truncated, lies about a
    length, or uses what GGUF 2 and 3 do not have. Memory: that of the metadata, at most some ten
    times the file."""
    with path.open("rb") as file:
        size = path.stat().st_size
        if size == 0:
            raise MalformedError(f"{path}: the file is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data)
    try:
        return _header(cursor)
    except UnicodeDecodeError as error:
        raise cursor.fault("holds a name that is not UTF-8") from error


def _header(cursor: "_Cursor") -> Header:
    if cursor.take(4) != b"GGUF":
        raise cursor.fault("does not begin with GGUF: it is not a GGUF file")
    version, tensors, entries = cursor.number("<u4"), cursor.number("<u8"), cursor.number("<u8")
    if version not in (2, 3):
        raise cursor.fault(f"has GGUF version {version}: only 2 and 3 (little-endian) are known")
    fields: dict[str, Any] = {}
    for _ in range(entries):
        name = cursor.string()
        if name in fields:
            raise cursor.fault(f"has the field {name!r} twice")
        fields[name] = cursor.value(cursor.number("<u4"))
    infos = [_tensor_info(cursor) for _ in range(tensors)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fault(f"has general.alignment={alignment!r}: it must be a power of two")
    start = -(-cursor.at // alignment) * alignment
    return Header(fields, _placed(cursor, infos, start))


def _tensor_info(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.string(), cursor.number("<u4")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise cursor.fault(f"gives tensor {name!r} {dimensions} dimensions")
    shape = tuple(cursor.number("<u8") for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("<u4"), cursor.number("<u8")


def _placed(
    cursor: "_Cursor", infos: list[tuple[str, tuple[int, ...], int, int]], start: int
) -> dict[str, TensorInfo]:
    """The tensors with their bytes; together they may not exceed the file, so that none is given
    out twice."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    whole = np.frombuffer(cursor.data, np.uint8)
    placed: dict[str, TensorInfo] = {}
    total = 0
    for name, shape, kind, offset in infos:
        if kind not in GGMLQuantizationType._value2member_map_:
            raise cursor.fault(f"has tensor {name!r} of unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        length = math.prod(shape) // block * block_bytes
        total += length
        if length == 0 or shape[-1] % block:
            raise cursor.fault(f"has tensor {name!r} of impossible shape {shape}")
        if start + offset + length > len(whole) or total > len(whole):
            raise cursor.fault(f"is truncated, or tensor {name!r} of shape {shape} lies beyond it")
        if name in placed:
            raise cursor.fault(f"has the tensor {name!r} twice")
        begin = start + offset
        placed[name] = TensorInfo(shape, kind, whole[begin : begin + length])
    return placed


class _Cursor:
    """A place in the file that only moves forward, and never beyond the end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def fault(self, what: str) -> MalformedError:
        return MalformedError(f"{self.path} {what}; fetch the file again")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.fault(f"is truncated: {size} bytes wanted at {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, dtype: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        return self.take(length).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.number("<u4"), self.number("<u8"))
        if kind not in SCALARS:
            raise self.fault(f"has a field of unknown type {kind}")
        return self.number(SCALARS[kind])

    def array(self, kind: int, length: int) -> Any:
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(length * dtype.itemsize), dtype)
        if kind != STRING:
            raise self.fault(f"has an array of type {kind}: only numbers and strings are known")
        if length > MOST_ENTRIES:
            raise self.fault(f"has an array of {length} strings, more than {MOST_ENTRIES}")
        return [self.string() for _ in range(length)]
