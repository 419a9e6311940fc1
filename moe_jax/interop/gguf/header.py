"""The header of a GGUF file, read without trust in it.

The gguf library's own reader loops over whatever length a file claims, so a few bytes can fill the
memory. Here every length is compared with the size of the file before anything is read.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little-endian: magic,
version, number of tensors, number of fields, the fields, one entry a tensor, padding, data. A
string is its length (uint64) and its bytes.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.base.errors import UserError, quote, require

# Types of a field's value (enum gguf_metadata_value_type).
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"} | {
    7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
STRING = 8
ARRAY = 9
MOST_ENTRIES = 4_000_000
"""Strings in one array. The largest vocabularies have 0.3 million tokens and twice the merges."""
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """The bytes of a tensor. `shape` is in NumPy's order, the reverse of the file's."""

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


class _Entry(NamedTuple):
    """A tensor as the header describes it, not checked yet."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    """Bytes from the beginning of the data."""


def read_header(path: Path) -> Header:
    """Everything before the data of the tensors.

    UserError, without the path: the file is truncated, claims a false length, or uses a feature
    that GGUF 2 and 3 do not have. Memory: the metadata, at most about ten times the file's size.
    """
    with path.open("rb") as file:
        require(path.stat().st_size > 0, "the file is empty")  # and mmap refuses it
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _header(_Cursor(data))
    except UnicodeDecodeError as error:
        raise _fault("holds a name that is not UTF-8") from error


def _header(cursor: "_Cursor") -> Header:
    if cursor.take(4) != b"GGUF":
        raise _fault("does not begin with GGUF: it is not a GGUF file")
    version = cursor.number("<u4")
    if version not in (2, 3):
        raise _fault(f"has GGUF version {version}: only 2 and 3 (little-endian) are known")
    tensors = cursor.number("<u8")
    count = cursor.number("<u8")
    # Both counts may be absurd. Each turn of either loop takes bytes, so the end of the file is
    # reached long before the count is.
    fields: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string()
        if name in fields:
            raise _fault(f"has the field {quote(name)} twice")
        fields[name] = cursor.value(cursor.number("<u4"))
    entries = [_entry(cursor) for _ in range(tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise _fault(f"has general.alignment {quote(alignment)}: it must be a power of two")
    begin = -(-cursor.position // alignment) * alignment
    return Header(fields, _tensors(cursor, entries, begin))


def _entry(cursor: "_Cursor") -> _Entry:
    name = cursor.string()
    dimensions = cursor.number("<u4")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise _fault(f"gives tensor {quote(name)} {dimensions} dimensions")
    shape = tuple(cursor.number("<u8") for _ in range(dimensions))[::-1]
    return _Entry(name, shape, kind=cursor.number("<u4"), offset=cursor.number("<u8"))


def _tensors(cursor: "_Cursor", entries: list[_Entry], begin: int) -> dict[str, TensorInfo]:
    """The tensors with their bytes; the data begins at byte `begin`."""
    data = np.frombuffer(cursor.data, np.uint8)
    tensors: dict[str, TensorInfo] = {}
    total = 0
    for entry in entries:
        length = _length(entry)
        start = begin + entry.offset
        total += length
        # The total is bounded, too: otherwise many entries could name the same bytes, and their
        # float32 copies would be many times the file.
        if start + length > len(data) or total > len(data):
            raise _fault(
                f"is truncated, or tensor {quote(entry.name)} of shape {entry.shape} lies beyond it"
            )
        if entry.name in tensors:
            raise _fault(f"has the tensor {quote(entry.name)} twice")
        bytes_ = data[start : start + length]
        tensors[entry.name] = TensorInfo(entry.shape, entry.kind, bytes_)
    return tensors


def _length(entry: _Entry) -> int:
    """Bytes of a tensor. Quantised numbers come in blocks along the last axis."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if entry.kind not in GGMLQuantizationType._value2member_map_:
        raise _fault(f"has tensor {quote(entry.name)} of unknown type {entry.kind}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(entry.kind)]
    length = math.prod(entry.shape) // block * block_bytes
    if length == 0 or entry.shape[-1] % block:
        raise _fault(f"has tensor {quote(entry.name)} of impossible shape {entry.shape}")
    return length


def _fault(reason: str) -> UserError:
    return UserError(f"the file {reason}; fetch it again")


class _Cursor:
    """A position in the file that only moves forward, and never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        begin = self.position
        if size > len(self.data) - begin:
            raise _fault(f"is truncated: {size} bytes wanted at {begin} of {len(self.data)}")
        self.position += size
        return self.data[begin : begin + size]

    def number(self, dtype: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        return self.take(length).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element = self.number("<u4")
            return self.array(element, self.number("<u8"))
        if kind not in SCALARS:
            raise _fault(f"has a field of unknown type {kind}")
        return self.number(SCALARS[kind])

    def array(self, kind: int, length: int) -> Any:
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(length * dtype.itemsize), dtype)
        # Arrays of arrays are legal in the format. No model has them, and they could nest until
        # Python's stack ends.
        if kind != STRING:
            raise _fault(f"has an array of type {kind}: only numbers and strings are known")
        if length > MOST_ENTRIES:
            raise _fault(f"has an array of {length} strings, more than {MOST_ENTRIES}")
        return [self.string() for _ in range(length)]
