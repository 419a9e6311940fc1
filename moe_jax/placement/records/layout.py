"""The format of a file of records: a safetensors file whose tensors are the fields of records.

    length uint64 | header JSON, spaces | record 0 | record 1 | ...

A record is its fields one after the other, padded to whole pages, so every record begins at a page.
The safetensors library reads these files. Its own writer neither aligns nor orders tensors. The
header's metadata holds the CRC-32 of each record, null where the record was never written.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.base.errors import UserError, quote
from moe_jax.placement.records.pages import whole_pages

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
}
"""Names of the safetensors format."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PADDING = "padding"
"""Name of the tensor that fills a record's last page. The format allows no unnamed bytes."""
WIDEST = 2**32 - 1
"""The checksum with the most digits."""


class DamagedError(UserError):
    """A file or a record that was read is not what was written. `fault` is the line but its end."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}: {remedy}")
        self.fault = fault


class Field(NamedTuple):
    """One tensor of a record."""

    name: str
    offset: int
    """Bytes from the beginning of the record."""
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.size

    def view(self, memory: memoryview) -> np.ndarray:
        """The tensor in a record's memory, without a copy."""
        return np.frombuffer(memory[self.offset : self.end], self.dtype).reshape(self.shape)


class RecordLayout(NamedTuple):
    """The fields of a record, in their order on disk."""

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> "RecordLayout":
        """Fields with the names, dtypes and shapes of `arrays` (abstract or not)."""
        fields: list[Field] = []
        offset = 0
        for name, array in arrays.items():
            fields.append(Field(name, offset, np.dtype(array.dtype), tuple(array.shape)))
            offset = fields[-1].end
        return cls(tuple(fields))

    @property
    def size(self) -> int:
        """Bytes of a record without its padding."""
        return self.fields[-1].end

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return whole_pages(self.size)


class Header(NamedTuple):
    """The content of a file's header."""

    start: int
    """Offset of the first record."""
    layout: RecordLayout
    checksums: tuple[int | None, ...]
    """CRC-32 of each record without its padding. None: never written."""

    @property
    def end(self) -> int:
        """Size of the file."""
        return self.start + len(self.checksums) * self.layout.stride


def empty_header(layout: RecordLayout, count: int) -> Header:
    """Header of a file of `count` records, none of them written yet.

    It reserves room for the longest checksums, because records are written before it.
    """
    widest = _text(layout, [WIDEST] * count)
    return Header(whole_pages(8 + len(widest)), layout, (None,) * count)


def encode(header: Header) -> bytes:
    """The bytes before the first record."""
    length = header.start - 8
    text = _text(header.layout, header.checksums).ljust(length)  # the format allows spaces here
    return length.to_bytes(8, "little") + text


def _text(layout: RecordLayout, checksums: Sequence[int | None]) -> bytes:
    tensors: dict[str, Any] = {}
    padding = layout.stride - layout.size
    for record in range(len(checksums)):
        start = record * layout.stride
        for field in layout.fields:
            tensors[f"expert-{record:05d}.{field.name}"] = {
                "dtype": NAMES[field.dtype],
                "shape": list(field.shape),
                "data_offsets": [start + field.offset, start + field.end],
            }
        if padding:  # the format allows no empty tensor between others
            tensors[f"expert-{record:05d}.{PADDING}"] = {
                "dtype": "U8",
                "shape": [padding],
                "data_offsets": [start + layout.size, start + layout.stride],
            }
    tensors["__metadata__"] = {"crc32": json.dumps(list(checksums))}
    return json.dumps(tensors).encode()


def read_header(path: Path, remedy: str) -> Header:
    """The header of a finished file. UserError: it is missing, truncated, unfinished or foreign."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length < size else b""
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}; {remedy}") from error
    # A file without a header has a length of 0, because `finish` writes the header last.
    if length == 0 and size >= 8:
        raise DamagedError(f"{path} is incomplete, its writer was interrupted", remedy)
    if not 0 < length == len(text):
        raise DamagedError(f"{path} is truncated, it ends inside its header", remedy)
    try:
        header = _parse(json.loads(text), 8 + length)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is no file of experts", remedy) from error
    if header is None:
        raise DamagedError(
            f"{path} is no file of experts, its records are not equal whole pages", remedy
        )
    if size < header.end:
        first = max(0, size - header.start) // header.layout.stride
        raise DamagedError(
            f"{path} is truncated: it has {size} of {header.end} bytes, so expert {first} and "
            "those after it are damaged",
            remedy,
        )
    return header


def _parse(tensors: dict[str, Any], start: int) -> Header | None:
    """None where the records do not follow each other at whole pages."""
    checksums = tuple(
        None if checksum is None else _natural(checksum, WIDEST)
        for checksum in json.loads(tensors.pop("__metadata__")["crc32"])
    )
    records: list[list[Field]] = [[] for _ in checksums]
    for key, tensor in tensors.items():
        record, name = key.removeprefix("expert-").split(".")
        dtype = np.dtype(np.uint8) if name == PADDING else DTYPES[tensor["dtype"]]
        offset = tensor["data_offsets"][0]
        shape = tuple(_natural(axis) for axis in tensor["shape"])
        records[int(record)].append(Field(name, _natural(offset), dtype, shape))
    first = records[0]
    layout = RecordLayout(tuple(field for field in first if field.name != PADDING))
    alike = all(
        [field._replace(offset=field.offset - index * layout.stride) for field in record] == first
        for index, record in enumerate(records)
    )
    return Header(start, layout, checksums) if alike and start == whole_pages(start) else None


def _natural(number: Any, most: int = 2**62) -> int:
    """A number of a header. ValueError: it is no integer from 0 to `most`."""
    if type(number) is not int or not 0 <= number <= most:
        raise ValueError(f"{quote(number)} is no size")
    return number
