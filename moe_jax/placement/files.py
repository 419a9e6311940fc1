"""Experts on disk: a safetensors file a layer, each expert one contiguous, checksummed record.

Records begin and end at pages, so that a read around the page cache lands where it is wanted, with
no copy after it. They are read with positioned reads and not through a memory map: a page of a map
that cannot be read kills the process (SIGBUS), where a read gives an error that can be told.
"""

import json
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from isal.isal_zlib import crc32
from jaxtyping import Float, Int8

from moe_jax.base.errors import UserError
from moe_jax.base.files import disk_errors, write_atomically
from moe_jax.config import require

Matrices = tuple[Float[np.ndarray, "D twoF"], Float[np.ndarray, "F D"]]
"""One expert: (gate and up, down)."""
Layer = tuple[Float[np.ndarray, "E D twoF"], Float[np.ndarray, "E F D"]]

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "I8": np.dtype(np.int8)}
DTYPES["BF16"] = np.dtype(ml_dtypes.bfloat16)
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PAGE = 4096
"""Alignment of reads that go around the operating system's page cache."""


def write_experts(folder: Path, layers: Iterable[Layer], *, low_bit: bool = False) -> int:
    """Writes folder/layer-NNN.safetensors for each (gate_up, down); returns the number of layers.

    One layer at a time is in memory. Tensors are called expert-NNNNN.down and .gate_up; the files'
    metadata holds the CRC-32 of each expert's record. With `low_bit` the matrices are rounded to
    8-bit integers (`quantise`), each with a .…_scale: a quarter of float32's bytes. UserError: a
    dtype that is not float32, float16 or bfloat16; a disk that fails.
    """
    count = 0
    with disk_errors(folder):
        for index, (gate_up, down) in enumerate(layers):
            kinds = {np.dtype(gate_up.dtype), np.dtype(down.dtype)}
            require(kinds <= NAMES.keys(), f"experts of {kinds} cannot be written: use float32")
            records = [_tensors(gate_up[e], down[e], low_bit) for e in range(len(gate_up))]
            write_atomically(folder / layer_name(index), _serialised(records))
            count += 1
    return count


def layer_name(layer: int) -> str:
    """File of a layer's experts."""
    return f"layer-{layer:03d}.safetensors"


def quantise(
    matrix: Float[np.ndarray, "m n"],
) -> tuple[Int8[np.ndarray, "m n"], Float[np.ndarray, "n"]]:
    """(q, scale) with matrix ≈ q · scale: a scale for each output, max |column| / 127, so that no
    entry is off by more than half of it. A column of zeros has scale 1."""
    matrix = np.asarray(matrix, np.float32)
    scale = np.abs(matrix).max(axis=0) / 127
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale


def _tensors(gate_up: np.ndarray, down: np.ndarray, low_bit: bool) -> dict[str, np.ndarray]:
    """An expert's record, in its order."""
    if not low_bit:
        return {"down": np.ascontiguousarray(down), "gate_up": np.ascontiguousarray(gate_up)}
    (down, down_scale), (gate_up, gate_up_scale) = quantise(down), quantise(gate_up)
    return {
        "down": down, "down_scale": down_scale, "gate_up": gate_up, "gate_up_scale": gate_up_scale,
    }  # fmt: skip


def _serialised(records: list[dict[str, np.ndarray]]) -> bytes:
    """A layer in the safetensors format: 8 bytes of length, a header in JSON, and the tensors.

    The library's own writer neither aligns nor orders records; the format allows spaces after the
    header, and a tensor `.padding` fills the last page of a record.
    """
    header: dict[str, Any] = {}
    content, checksums, position = [], [], 0
    for index, record in enumerate(records):
        body = b"".join(tensor.tobytes() for tensor in record.values())
        for name, tensor in record.items():
            header[f"expert-{index:05d}.{name}"] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
        padding = -len(body) % PAGE
        if padding:
            header[f"expert-{index:05d}.padding"] = {
                "dtype": "U8",
                "shape": [padding],
                "data_offsets": [position, position + padding],
            }
        position += padding
        content.append(body + bytes(padding))
        checksums.append(crc32(body))
    header["__metadata__"] = {"crc32": json.dumps(checksums)}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return b"".join([len(text).to_bytes(8, "little"), text, *content])


class Field(NamedTuple):
    """One tensor of a record."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + int(np.prod(self.shape)) * self.dtype.itemsize

    def view(self, memory: memoryview) -> np.ndarray:
        """The tensor in a record's memory."""
        return np.frombuffer(memory[self.offset : self.end], self.dtype).reshape(self.shape)


class LayerFile(NamedTuple):
    """What a file's header says."""

    start: int
    """Of the first record."""
    stride: int
    """From one record to the next, in whole pages."""
    fields: tuple[tuple[str, Field], ...]
    checksums: tuple[int, ...]


class ExpertFiles:
    """The experts that write_experts wrote, opened for reading.

    `direct` reads around the page cache (O_DIRECT, Linux), for measuring the disk itself.
    UserError: a file is missing, truncated or of another form; the message names it.
    """

    def __init__(self, folder: Path, *, direct: bool = False) -> None:
        self.folder, self.direct = folder, direct
        paths = sorted(folder.glob("layer-*.safetensors"))
        require(len(paths) > 0, f"{folder} holds no experts (layer-000.safetensors, …)")
        for index, path in enumerate(paths):
            require(path.name == layer_name(index), f"{folder / layer_name(index)} is missing")
        self.parts = [_read_header(path) for path in paths]
        forms = {(part.stride, part.fields, len(part.checksums)) for part in self.parts}
        require(len(forms) == 1, f"the layers in {folder} are not alike: {sorted(map(str, forms))}")
        self.layers, self.experts = len(paths), len(self.parts[0].checksums)
        self.record_bytes, self.fields = self.parts[0].stride, dict(self.parts[0].fields)
        self.gate_up_shape, self.down_shape = (
            self.fields["gate_up"].shape, self.fields["down"].shape,
        )  # fmt: skip
        self.low_bit = "down_scale" in self.fields
        self.dtype = np.dtype(np.float32) if self.low_bit else self.fields["down"].dtype
        """Of the matrices as they are computed with."""
        self.expert_bytes = max(field.end for field in self.fields.values())
        """Without the padding."""
        self._descriptors = [_open(path, direct) for path in paths]
        self._local = threading.local()

    def read(self, layer: int, expert: int, memory: memoryview | None = None) -> Matrices:
        """One expert, as views of `memory` (page_memory(record_bytes)); without it, of a buffer
        that the same thread's next read overwrites. A low-bit expert is multiplied out.

        UserError: it cannot be read, is truncated, or its checksum does not hold.
        """
        if memory is None:
            if not hasattr(self._local, "memory"):
                self._local.memory = page_memory(self.record_bytes)
            memory = self._local.memory
        assert memory is not None
        self._read_record(layer, expert, memory)
        return self.matrices(memory)

    def matrices(self, memory: memoryview) -> Matrices:
        """(gate_up, down) of a record that is in memory."""
        found = {name: field.view(memory) for name, field in self.fields.items()}
        if self.low_bit:
            return (
                found["gate_up"] * found["gate_up_scale"],
                found["down"] * found["down_scale"],
            )
        return found["gate_up"], found["down"]

    def _read_record(self, layer: int, expert: int, memory: memoryview) -> None:
        part = self.parts[layer]
        who = f"expert {expert} of layer {layer} in {self.folder / layer_name(layer)}"
        try:
            found = self._read_fully(layer, memory, part.start + expert * part.stride)
        except OSError as error:
            raise UserError(f"{who} cannot be read: {error.strerror}") from error
        if found < self.expert_bytes:
            raise UserError(f"{who} is truncated: write the experts anew")
        if crc32(memory[: self.expert_bytes]) != part.checksums[expert]:
            raise UserError(f"{who} is corrupt (its checksum does not hold): write it anew")

    def _read_fully(self, layer: int, memory: memoryview, begin: int) -> int:
        """Bytes read into `memory`: all of it, or what the file has."""
        found = 0
        while found < len(memory):
            # A direct read that comes back short and unaligned has met the end of the file.
            got = os.preadv(self._descriptors[layer], [memory[found:]], begin + found)
            if got == 0 or (self.direct and got % PAGE):
                return found + got
            found += got
        return found

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def page_memory(size: int) -> memoryview:
    """Zeroed memory that begins at a page, as direct reads want it."""
    return memoryview(mmap.mmap(-1, size))


def _open(path: Path, direct: bool) -> int:
    flag = getattr(os, "O_DIRECT", None) if direct else 0
    require(flag is not None, "direct reads need Linux (O_DIRECT)")
    try:
        return os.open(path, os.O_RDONLY | (flag or 0))
    except OSError as error:
        hint = " with O_DIRECT: its file system may not offer it" if direct else ""
        raise UserError(f"{path} cannot be opened{hint}: {error.strerror}") from error


def _read_header(path: Path) -> LayerFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length < size else b""
    if len(text) < length or length == 0:
        raise UserError(f"{path} is truncated: it ends inside its header; write the experts anew")
    try:
        found = _parse(json.loads(text), 8 + length)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is no file of experts: use write_experts") from error
    require(
        found is not None, f"{path} is no file of experts: its records are not equal whole pages"
    )
    assert found is not None
    if size < found.start + len(found.checksums) * found.stride:
        first = max(0, size - found.start) // found.stride
        raise UserError(
            f"{path} is truncated: it has {size} of "
            f"{found.start + len(found.checksums) * found.stride} bytes, so expert {first} and "
            "those after it are damaged; write the experts anew"
        )
    return found


def _parse(header: dict[str, Any], data: int) -> LayerFile | None:
    """None where the records do not follow each other at whole pages."""
    checksums = tuple(int(c) for c in json.loads(header.pop("__metadata__")["crc32"]))
    records: list[dict[str, tuple]] = [{} for _ in checksums]
    for key, tensor in header.items():
        expert, name = key.removeprefix("expert-").split(".")
        dtype = np.dtype(np.uint8) if name == "padding" else DTYPES[tensor["dtype"]]
        records[int(expert)][name] = (tensor["data_offsets"][0], dtype, tuple(tensor["shape"]))
    first = records[0]
    fields = {name: Field(*first[name]) for name in first}
    stride = max(field.end for field in fields.values())
    alike = all(
        {n: (o - index * stride, d, s) for n, (o, d, s) in record.items()} == first
        for index, record in enumerate(records)
    )
    fields.pop("padding", None)
    if not {"down", "gate_up"} <= fields.keys():
        raise KeyError("another kind of file")
    if not alike or data % PAGE or stride % PAGE:
        return None
    return LayerFile(data, stride, tuple(fields.items()), checksums)
