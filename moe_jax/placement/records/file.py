"""One file of records: read and written by position, adjacent records in one system call.

Positioned reads are used and not a memory map. A page of a map that cannot be read kills the
process (SIGBUS), and a failed read is an error that names the expert.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32
from jaxtyping import Int, UInt8

from moe_jax.base.errors import UserError
from moe_jax.config import require
from moe_jax.placement.records.layout import (
    DamagedError,
    Header,
    RecordLayout,
    empty_header,
    encode,
    read_header,
)
from moe_jax.placement.records.pages import PAGE, ThreadBuffer, page_memory
from moe_jax.placement.threads import AccessGuard

Parts = list[UInt8[np.ndarray, "n bytes"]]
"""n records as bytes, one array for each field, in the order of the layout."""

DIRECT_BYTES = 4 * 2**20
"""Bytes that a direct read or write moves at once, unless a record is longer."""
VECTORS = 1000
"""Buffers of one system call. Linux takes IOV_MAX = 1024."""
_BUFFER = ThreadBuffer(DIRECT_BYTES)
"""Of each thread, shared by all files: a record's fields go from here to where they are wanted."""
RESUME = "the same command continues from the last complete checkpoint"
"""Remedy for a damaged record of a training run."""


class RecordFile:
    """The records of one layer's experts, of one kind.

    A record that was never written reads as zeros. `direct` goes around the page cache (O_DIRECT,
    Linux). `remedy` ends every error message. Threads may use one file together, but a record must
    not be written while another thread reads or writes it (AssertionError).
    UserError: the file cannot be opened, or a record cannot be moved. DamagedError: what was read
    is not what was written.
    """

    def __init__(
        self, path: Path, layer: int, header: Header, flags: int, *, direct: bool, remedy: str
    ) -> None:
        self.path = path
        self.layer = layer
        self.layout = header.layout
        self.count = len(header.checksums)
        self.start = header.start
        self.stride = header.layout.stride
        self.written = np.array([checksum is not None for checksum in header.checksums])
        self.checksums = np.array([checksum or 0 for checksum in header.checksums], np.uint32)
        self.direct = direct
        self.remedy = remedy
        self._size = header.layout.size
        self._guard = AccessGuard(str(path), self.count)
        self._padding = np.zeros(self.stride - self._size, np.uint8)
        self._descriptor = self._open(flags)

    @classmethod
    def create(
        cls,
        path: Path,
        layer: int,
        layout: RecordLayout,
        count: int,
        *,
        direct: bool = False,
        remedy: str = RESUME,
    ) -> "RecordFile":
        """A new file for `count` records. `open` refuses it before `finish`."""
        header = empty_header(layout, count)
        # A link that somebody planted under this name is an error, and is not followed.
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        file = cls(path, layer, header, flags, direct=direct, remedy=remedy)
        os.truncate(file._descriptor, header.end)  # sparse: unwritten records take no room
        return file

    @classmethod
    def open(
        cls, path: Path, layer: int, *, direct: bool = False, remedy: str = RESUME
    ) -> "RecordFile":
        """A finished file, to be read."""
        header = read_header(path, remedy)
        return cls(path, layer, header, os.O_RDONLY, direct=direct, remedy=remedy)

    def read(self, records: Int[np.ndarray, "n"], parts: Parts) -> None:
        """Fills `parts` with `records` (ascending), without a copy unless `direct`."""
        with self._guard.shared(records):
            for run in self._runs(records):
                first = int(records[run.start])
                own = [part[run] for part in parts]
                if not self.written[first]:
                    for part in own:
                        part[:] = 0
                elif self.direct:
                    memory = _BUFFER.get(len(own[0]) * self.stride)
                    self.read_adjacent(first, memory)
                    _scatter(memory, self.stride, own)
                else:
                    self._read_scattered(first, own)

    def read_adjacent(self, first: int, memory: memoryview) -> None:
        """Reads the written records from `first` on straight into `memory`, whole strides.

        A direct read wants page_memory.
        """
        length = self._move(os.preadv, first, [memory])
        for index in range(len(memory) // self.stride):
            begin = index * self.stride
            self._verify(first + index, length - begin, [memory[begin : begin + self._size]])

    def write(self, records: Int[np.ndarray, "n"], parts: Parts) -> None:
        """Stores `records` (ascending)."""
        with self._guard.exclusive(records):
            for index, record in enumerate(records):
                self.checksums[record] = _checksum(part[index].data for part in parts)
            self.written[records] = True
            for run in self._runs(records):
                self._write_adjacent(int(records[run.start]), [part[run] for part in parts])

    def finish(self) -> None:
        """Flushes the records, then writes the header that makes the file readable."""
        checksums = tuple(
            int(checksum) if written else None
            for checksum, written in zip(self.checksums, self.written, strict=True)
        )
        memory = page_memory(self.start)  # a direct write needs it aligned
        memory[:] = encode(Header(self.start, self.layout, checksums))
        try:
            # The header follows the records to the disk: a crash leaves no header for bad records.
            os.fsync(self._descriptor)
            if self._move_all(os.pwritev, 0, [memory]) < self.start:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be finished: {error.strerror}; mend that, then {self.remedy}"
            ) from error

    def close(self) -> None:
        """Nothing can be read or written afterwards."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _open(self, flags: int) -> int:
        direct = getattr(os, "O_DIRECT", None) if self.direct else 0
        require(direct is not None, f"{self.path}: direct reads and writes need Linux (O_DIRECT)")
        try:
            return os.open(self.path, flags | (direct or 0), 0o644)
        except OSError as error:
            hint = " with O_DIRECT (its file system may not offer it)" if self.direct else ""
            raise UserError(f"{self.path} cannot be opened{hint}: {error.strerror}") from error

    def _runs(self, records: np.ndarray) -> Iterator[slice]:
        """Slices of `records` that one system call can move: adjacent, all written or none."""
        most = VECTORS // (len(self.layout.fields) + 1)
        if self.direct:
            most = min(most, max(1, DIRECT_BYTES // self.stride))
        written = self.written[records]
        breaks = (np.diff(records) != 1) | (written[1:] != written[:-1])
        begin = 0
        for end in [*(np.flatnonzero(breaks) + 1).tolist(), len(records)]:
            for start in range(begin, end, most):
                yield slice(start, min(start + most, end))
            begin = end

    def _read_scattered(self, first: int, parts: Parts) -> None:
        # A read must go somewhere with the padding between records: all of it to one place.
        skipped = np.empty_like(self._padding)
        length = self._move(os.preadv, first, _vectors(parts, skipped))
        for index in range(len(parts[0])):
            own = length - index * self.stride
            self._verify(first + index, own, (part[index].data for part in parts))

    def _write_adjacent(self, first: int, parts: Parts) -> None:
        size = len(parts[0]) * self.stride
        if self.direct:
            memory = _BUFFER.get(size)
            _gather(memory, self.stride, parts)
            vectors = [memory]
        else:
            vectors = _vectors(parts, self._padding)
        if self._move(os.pwritev, first, vectors) < size:
            raise UserError(
                f"{self._name(first)} was written in part: is the disk full? Mend that, then "
                f"{self.remedy}"
            )

    def _verify(self, record: int, length: int, pieces: Iterable[memoryview]) -> None:
        """Checks a record of which `length` bytes were read."""
        if length < self._size:
            raise DamagedError(f"{self._name(record)} is truncated", self.remedy)
        if _checksum(pieces) != self.checksums[record]:
            raise DamagedError(
                f"{self._name(record)} is corrupt (its checksum does not hold)", self.remedy
            )

    def _move(self, call: Callable[..., int], first: int, vectors: list[memoryview]) -> int:
        """Bytes moved by os.preadv or os.pwritev from record `first` on."""
        try:
            return self._move_all(call, self.start + first * self.stride, vectors)
        except OSError as error:
            verb = "read" if call is os.preadv else "written"
            raise UserError(
                f"{self._name(first)} cannot be {verb}: {error.strerror}; mend that, then "
                f"{self.remedy}"
            ) from error

    def _move_all(self, call: Callable[..., int], begin: int, vectors: list[memoryview]) -> int:
        """Repeats `call` until all `vectors` are moved, or the file ends or the disk is full."""
        size = sum(map(len, vectors))
        left = [vector for vector in vectors if len(vector)]
        moved = 0
        while moved < size:
            step = call(self._descriptor, left, begin + moved)
            moved += step
            # A direct read that comes back short and unaligned has met the end of the file. Asking
            # for the rest at an unaligned position would be refused with EINVAL.
            if step == 0 or (self.direct and step % PAGE):
                break
            while left and step >= len(left[0]):
                step -= len(left.pop(0))
            if step:
                left[0] = left[0][step:]
        return moved

    def _name(self, record: int) -> str:
        return f"expert {record} of layer {self.layer} in {self.path}"


def as_parts(arrays: Iterable[np.ndarray]) -> Parts:
    """Views of arrays [n, …] of any dtype as bytes [n, bytes]. The arrays must be contiguous."""
    return [array.reshape(len(array), -1).view(np.uint8) for array in arrays]


def _checksum(pieces: Iterable[memoryview]) -> int:
    """CRC-32 of the pieces as if they lay one after the other."""
    checksum = 0
    for piece in pieces:
        checksum = crc32(piece, checksum)
    return checksum


def _vectors(parts: Parts, padding: np.ndarray) -> list[memoryview]:
    return [
        piece.data
        for index in range(len(parts[0]))
        for piece in (*(part[index] for part in parts), padding)
    ]


def _scatter(memory: memoryview, stride: int, parts: Parts) -> None:
    rows = np.frombuffer(memory, np.uint8).reshape(-1, stride)
    begin = 0
    for part in parts:
        part[:] = rows[:, begin : begin + part.shape[1]]
        begin += part.shape[1]


def _gather(memory: memoryview, stride: int, parts: Parts) -> None:
    rows = np.frombuffer(memory, np.uint8).reshape(-1, stride)
    begin = 0
    for part in parts:
        rows[:, begin : begin + part.shape[1]] = part
        begin += part.shape[1]
    rows[:, begin:] = 0  # the buffer still holds what it moved last
