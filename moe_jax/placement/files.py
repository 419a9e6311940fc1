"""Experts on disk: a safetensors file a layer, each expert one contiguous, checksummed record.

Records are read with positioned reads into a buffer and not through a memory map: a page of a map
that cannot be read kills the process (SIGBUS), where a read gives an error that can be told.
"""

import json
import mmap
import os
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from moe_jax.config import require
from moe_jax.errors import UserError
from moe_jax.files import disk_errors, write_atomically

Matrices = tuple[Float[np.ndarray, "D twoF"], Float[np.ndarray, "F D"]]
"""One expert: (gate and up, down)."""

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
DTYPES["BF16"] = np.dtype(ml_dtypes.bfloat16)
PAGE = 4096
"""Alignment of reads that go around the operating system's page cache."""


def write_experts(
    folder: Path,
    layers: Iterable[tuple[Float[np.ndarray, "E D twoF"], Float[np.ndarray, "E F D"]]],
) -> int:
    """Writes folder/layer-NNN.safetensors for each (gate_up, down); returns the number of layers.

    One layer at a time is in memory. Tensors are called expert-NNNNN.gate_up and .down; the files'
    metadata holds the CRC-32 of each expert's record.
    """
    count = 0
    with disk_errors(folder):
        for index, (gate_up, down) in enumerate(layers):
            tensors, checksums = {}, []
            for expert in range(len(gate_up)):
                own = [np.ascontiguousarray(down[expert]), np.ascontiguousarray(gate_up[expert])]
                # safetensors lays tensors of one dtype out by name: down comes before gate_up.
                tensors[f"expert-{expert:05d}.down"] = own[0]
                tensors[f"expert-{expert:05d}.gate_up"] = own[1]
                checksums.append(zlib.crc32(own[1].tobytes(), zlib.crc32(own[0].tobytes())))
            content = save(tensors, {"crc32": json.dumps(checksums)})
            write_atomically(folder / layer_name(index), content)
            count += 1
    return count


def layer_name(layer: int) -> str:
    """File of a layer's experts."""
    return f"layer-{layer:03d}.safetensors"


class Record(NamedTuple):
    """Where an expert lies in its file."""

    start: int
    checksum: int


class ExpertFiles:
    """The experts that write_experts wrote, opened for reading.

    `direct` reads around the page cache (O_DIRECT, Linux), for measuring the disk itself.
    UserError: a file is missing, truncated or of another form; the message names it.
    """

    def __init__(self, folder: Path, *, direct: bool = False) -> None:
        self.folder, self.direct = folder, direct
        paths = sorted(folder.glob("layer-*.safetensors"))
        require(len(paths) > 0, f"{folder} holds no experts (layer-000.safetensors, …)")
        self._descriptors: list[int] = []
        self.records: list[list[Record]] = []
        shapes = []
        for index, path in enumerate(paths):
            require(path.name == layer_name(index), f"{folder / layer_name(index)} is missing")
            records, shape = _read_header(path)
            self.records.append(records)
            shapes.append((len(records), shape))
            self._descriptors.append(_open(path, direct))
        require(len(set(shapes)) == 1, f"the layers in {folder} are not alike: {shapes}")
        self.layers, self.experts = len(paths), shapes[0][0]
        self.gate_up_shape, self.down_shape, self.dtype = shapes[0][1]
        self.expert_bytes = _bytes(self.gate_up_shape, self.dtype) + _bytes(
            self.down_shape, self.dtype
        )
        self._local = threading.local()  # every reading thread has a buffer of its own

    def read(self, layer: int, expert: int) -> Matrices:
        """One expert, in a buffer that the same thread's next read overwrites.

        UserError: it cannot be read, is truncated, or its checksum does not hold.
        """
        record, size = self.records[layer][expert], self.expert_bytes
        begin = record.start // PAGE * PAGE
        end = -(-(record.start + size) // PAGE) * PAGE
        view = memoryview(self._buffer())[: end - begin]
        who = f"expert {expert} of layer {layer} in {self.folder / layer_name(layer)}"
        try:
            found = self._read_fully(layer, view, begin, record.start + size - begin)
        except OSError as error:
            raise UserError(f"{who} cannot be read: {error.strerror}") from error
        inside = record.start - begin
        if found < inside + size:
            raise UserError(f"{who} is truncated: write the experts anew")
        own = view[inside : inside + size]
        if zlib.crc32(own) != record.checksum:
            raise UserError(f"{who} is corrupt (its checksum does not hold): write it anew")
        split = _bytes(self.down_shape, self.dtype)
        down = np.frombuffer(own[:split], self.dtype).reshape(self.down_shape)
        return np.frombuffer(own[split:], self.dtype).reshape(self.gate_up_shape), down

    def _buffer(self) -> mmap.mmap:
        """Page-aligned, as direct reads want it."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = mmap.mmap(-1, -(-self.expert_bytes // PAGE) * PAGE + PAGE)
        return self._local.buffer

    def _read_fully(self, layer: int, view: memoryview, begin: int, needed: int) -> int:
        """Bytes read into `view`: at least `needed`, or what the file has."""
        found = 0
        while found < needed:
            # A direct read that comes back short and unaligned has met the end of the file.
            got = os.preadv(self._descriptors[layer], [view[found:]], begin + found)
            if got == 0 or (self.direct and got % PAGE):
                return found + got
            found += got
        return found

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _open(path: Path, direct: bool) -> int:
    flag = getattr(os, "O_DIRECT", None) if direct else 0
    require(flag is not None, "direct reads need Linux (O_DIRECT)")
    try:
        return os.open(path, os.O_RDONLY | (flag or 0))
    except OSError as error:
        hint = " with O_DIRECT: its file system may not offer it" if direct else ""
        raise UserError(f"{path} cannot be opened{hint}: {error.strerror}") from error


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def _read_header(path: Path) -> tuple[list[Record], tuple]:
    """The records of a layer's file, and (gate_up shape, down shape, dtype) of its experts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length < size else b""
    if len(text) < length or length == 0:
        raise UserError(f"{path} is truncated: it ends inside its header; write the experts anew")
    try:
        header = json.loads(text)
        checksums = json.loads(header.pop("__metadata__")["crc32"])
        pairs = [
            (header[f"expert-{e:05d}.down"], header[f"expert-{e:05d}.gate_up"])
            for e in range(len(checksums))
        ]
        dtype = DTYPES[pairs[0][0]["dtype"]]
        shape = (tuple(pairs[0][1]["shape"]), tuple(pairs[0][0]["shape"]), dtype)
        contiguous = all(d["data_offsets"][1] == g["data_offsets"][0] for d, g in pairs)
        starts = [8 + length + d["data_offsets"][0] for d, _ in pairs]
        ends = [8 + length + g["data_offsets"][1] for _, g in pairs]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is no file of experts: use write_experts") from error
    require(contiguous, f"{path} is no file of experts: its tensors are not in order")
    if size < max(ends):
        first = next(e for e, end in enumerate(ends) if end > size)
        raise UserError(
            f"{path} is truncated: it has {size} of {max(ends)} bytes, so expert {first} and those "
            "after it are damaged; write the experts anew"
        )
    return [Record(s, c) for s, c in zip(starts, checksums, strict=True)], shape
