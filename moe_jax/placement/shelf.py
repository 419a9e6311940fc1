"""The tier below the device while a model is trained: rows of experts in host memory and on disk.

An expert has a row of each kind (parameters, optimizer moments, gradient). A file holds the rows of
one kind and layer, by the expert's number, each padded to whole pages. Rows are read and written
by position, adjacent ones in one system call, and every read is checked against the row's CRC-32.
A row that was never written reads as zeros.
"""

import json
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from moe_jax.base.errors import UserError
from moe_jax.base.files import write_atomically
from moe_jax.config import require
from moe_jax.placement.files import PAGE

Parts = list[UInt8[np.ndarray, "n bytes"]]
"""n rows of one kind, part by part: a row is its parts one after the other."""

INDEX = "index.json"
BOUNCE = 4 * 2**20
"""Bytes that a direct read or write moves at once, where a row is not longer."""
VECTORS = 1000
"""Buffers that one system call takes (IOV_MAX is 1024)."""
AGAIN = "the same command continues from the last complete checkpoint"


@dataclass
class Moved:
    """Bytes of rows since the shelf was made."""

    disk_read: int = 0
    disk_written: int = 0
    host_read: int = 0
    host_written: int = 0


class Shelf:
    """Rows of `layers` · `experts` experts in `folder`; `kinds` gives the bytes of a row's parts.

    What `keep` names stays in host memory instead, its copy on disk being stale until it leaves.
    `direct` goes around the page cache (O_DIRECT, Linux). One thread may read while another writes
    other rows. UserError: a file cannot be made, or a row is damaged or cannot be moved.
    """

    def __init__(
        self,
        folder: Path,
        layers: int,
        experts: int,
        kinds: Mapping[str, tuple[int, ...]],
        *,
        direct: bool = False,
        read_only: bool = False,
    ) -> None:
        self._read_only = read_only
        self.folder, self.layers, self.experts, self.direct = folder, layers, experts, direct
        self.kinds = dict(kinds)
        self.row_bytes = {kind: sum(sizes) for kind, sizes in self.kinds.items()}
        self.stride = {kind: -(-size // PAGE) * PAGE for kind, size in self.row_bytes.items()}
        self.checksum = {kind: np.zeros((layers, experts), np.uint32) for kind in self.kinds}
        self.written = {kind: np.zeros((layers, experts), bool) for kind in self.kinds}
        self.moved, self._counting = Moved(), threading.Lock()
        self._host: dict[int, dict[str, np.ndarray]] = {}
        self._local = threading.local()
        self._padding = np.zeros(PAGE, np.uint8)
        self._descriptors: dict[tuple[str, int], int] = {}
        with _writing(folder):
            if not read_only:
                folder.mkdir(parents=True, exist_ok=True)
            for kind in self.kinds:
                for layer in range(layers):
                    self._descriptors[kind, layer] = self._open(kind, layer)

    @classmethod
    def opened(cls, folder: Path) -> "Shelf":
        """The shelf that `finish` completed in `folder`, to be read. UserError: there is none."""
        try:
            index = json.loads((folder / INDEX).read_text())
            kinds = {kind: tuple(sizes) for kind, sizes in index["kinds"].items()}
            shelf = cls(folder, index["layers"], index["experts"], kinds, read_only=True)
            for kind in kinds:
                shelf.checksum[kind][:] = index["crc32"][kind]
                shelf.written[kind][:] = index["written"][kind]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no complete shelf of experts: {error}") from error
        return shelf

    def path(self, kind: str, layer: int) -> Path:
        """The file of a kind of row of a layer."""
        return self.folder / f"layer-{layer:03d}.{kind}"

    def read(self, kind: str, layer: int, experts: Int[np.ndarray, "n"], parts: Parts) -> None:
        """Fills `parts` with the rows of `experts` (ascending)."""
        for slots in self._runs(kind, layer, experts):
            first = int(experts[slots.start])
            held = self._host.get(layer * self.experts + first)
            if held is not None:
                self._from_host(held[kind], parts, slots.start)
            elif not self.written[kind][layer, first]:
                for part in parts:
                    part[slots] = 0
            else:
                self._from_disk(kind, layer, experts, parts, slots)

    def write(self, kind: str, layer: int, experts: Int[np.ndarray, "n"], parts: Parts) -> None:
        """Stores the rows of `experts` (ascending)."""
        for index, expert in enumerate(experts):
            self.checksum[kind][layer, expert] = _checksum(parts, index)
        self.written[kind][layer, experts] = True
        for slots in self._runs(kind, layer, experts):
            held = self._host.get(layer * self.experts + int(experts[slots.start]))
            if held is not None:
                self._to_host(held[kind], parts, slots.start)
            else:
                self._to_disk(kind, layer, experts, parts, slots)

    def keep(self, ids: Int[np.ndarray, "n"]) -> None:
        """From now on exactly the experts layer · E + expert in `ids` are in host memory; nothing
        else may use the shelf meanwhile."""
        wanted = set(ids.tolist())
        for leaves in sorted(self._host.keys() - wanted):
            layer, expert = divmod(leaves, self.experts)
            held, at = self._host.pop(leaves), np.array([expert])
            for kind, row in held.items():
                if self.written[kind][layer, expert]:
                    self._to_disk(kind, layer, at, [row[None]], slice(0, 1))
        for enters in sorted(wanted - self._host.keys()):
            layer, expert = divmod(enters, self.experts)
            rows = {kind: np.zeros(size, np.uint8) for kind, size in self.row_bytes.items()}
            for kind, row in rows.items():
                self.read(kind, layer, np.array([expert]), [row[None]])
            self._host[enters] = rows

    def finish(self) -> None:
        """Flushes every file and completes the shelf with its index, for `opened`."""
        require(not self._host, "a shelf with rows in host memory cannot be completed")
        index = {
            "layers": self.layers,
            "experts": self.experts,
            "kinds": self.kinds,
            "crc32": {kind: table.tolist() for kind, table in self.checksum.items()},
            "written": {kind: table.tolist() for kind, table in self.written.items()},
        }
        with _writing(self.folder):
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            write_atomically(self.folder / INDEX, json.dumps(index))

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def remove(self) -> None:
        """Deletes the files, and the folder if nothing else is in it."""
        for kind in self.kinds:
            for layer in range(self.layers):
                self.path(kind, layer).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _open(self, kind: str, layer: int) -> int:
        flag = getattr(os, "O_DIRECT", None) if self.direct else 0
        require(flag is not None, "placement.direct needs Linux (O_DIRECT)")
        path = self.path(kind, layer)
        try:
            mode = os.O_RDONLY if self._read_only else os.O_RDWR | os.O_CREAT
            descriptor = os.open(path, mode | (flag or 0), 0o644)
        except OSError as error:
            hint = " with placement.direct (O_DIRECT)" if self.direct else ""
            raise UserError(f"{path} cannot be opened{hint}: {error.strerror}") from error
        if not self._read_only:
            os.truncate(descriptor, self.experts * self.stride[kind])
        return descriptor

    def _runs(self, kind: str, layer: int, experts: np.ndarray) -> Iterator[slice]:
        """Slots of `experts` that one call can move: adjacent rows on disk, or one row in host
        memory."""
        most = VECTORS // (len(self.kinds[kind]) + 1)
        if self.direct:
            most = min(most, max(1, BOUNCE // self.stride[kind]))
        written, begin = self.written[kind][layer], 0
        inside = [layer * self.experts + int(e) in self._host for e in experts]
        for end in range(1, len(experts) + 1):
            if (
                end < len(experts)
                and end - begin < most
                and experts[end] == experts[end - 1] + 1
                and written[experts[end]] == written[experts[begin]]
                and not inside[begin]
                and not inside[end]
            ):
                continue
            yield slice(begin, end)
            begin = end

    def _from_host(self, row: np.ndarray, parts: Parts, slot: int) -> None:
        begin = 0
        for part in parts:
            part[slot] = row[begin : begin + part.shape[1]]
            begin += part.shape[1]
        with self._counting:
            self.moved.host_read += begin

    def _to_host(self, row: np.ndarray, parts: Parts, slot: int) -> None:
        np.concatenate([part[slot] for part in parts], out=row)
        with self._counting:
            self.moved.host_written += row.size

    def _from_disk(
        self, kind: str, layer: int, experts: np.ndarray, parts: Parts, slots: slice
    ) -> None:
        stride, first = self.stride[kind], int(experts[slots.start])
        size = (slots.stop - slots.start) * stride
        if self.direct:
            bounce = self._bounce(size)
            found = self._fully(os.preadv, kind, layer, [bounce], first, size)
            _scatter(bounce, stride, parts, slots)
        else:
            skipped = np.empty(PAGE, np.uint8)
            vectors = _vectors(parts, slots, skipped[: stride - self.row_bytes[kind]])
            found = self._fully(os.preadv, kind, layer, vectors, first, size)
        for slot in range(slots.start, slots.stop):
            own = found - (slot - slots.start) * stride
            if own < self.row_bytes[kind]:
                raise UserError(f"{self._who(kind, layer, experts[slot])} is truncated: {AGAIN}")
            if _checksum(parts, slot) != self.checksum[kind][layer, experts[slot]]:
                raise UserError(
                    f"{self._who(kind, layer, experts[slot])} is corrupt (its checksum does not "
                    f"hold): {AGAIN}"
                )
        with self._counting:
            self.moved.disk_read += size

    def _to_disk(
        self, kind: str, layer: int, experts: np.ndarray, parts: Parts, slots: slice
    ) -> None:
        stride, first = self.stride[kind], int(experts[slots.start])
        size = (slots.stop - slots.start) * stride
        if self.direct:
            vectors = [self._bounce(size)]
            _gather(vectors[0], stride, parts, slots)
        else:
            vectors = _vectors(parts, slots, self._padding[: stride - self.row_bytes[kind]])
        if self._fully(os.pwritev, kind, layer, vectors, first, size) < size:
            raise UserError(
                f"{self._who(kind, layer, first)} was written in part: is the disk "
                f"full? Mend that, then {AGAIN}"
            )
        with self._counting:
            self.moved.disk_written += size

    def _fully(
        self,
        move: Callable[..., int],
        kind: str,
        layer: int,
        vectors: list[np.ndarray],
        first: int,
        size: int,
    ) -> int:
        """Bytes moved by os.preadv or os.pwritev from row `first` on: `size`, or up to the end of
        the file."""
        done, start = 0, first * self.stride[kind]
        left = [vector.data.cast("B") for vector in vectors if len(vector)]
        try:
            while done < size:
                step = move(self._descriptors[kind, layer], left, start + done)
                done += step
                if step == 0 or (self.direct and step % PAGE):
                    break
                while left and step >= len(left[0]):
                    step -= len(left.pop(0))
                if step:
                    left[0] = left[0][step:]
        except OSError as error:
            what = "read" if move is os.preadv else "written"
            raise UserError(
                f"{self._who(kind, layer, first)} cannot be {what}: {error.strerror}; mend that, "
                f"then {AGAIN}"
            ) from error
        return done

    def _who(self, kind: str, layer: int, expert: int) -> str:
        return f"expert {expert} of layer {layer} in {self.path(kind, layer)}"

    def _bounce(self, size: int) -> np.ndarray:
        """This thread's page-aligned buffer."""
        held = getattr(self._local, "buffer", None)
        if held is None or len(held) < size:
            largest = max(BOUNCE, size, *self.stride.values())
            held = self._local.buffer = np.frombuffer(mmap.mmap(-1, largest), np.uint8)
        return held[:size]


def as_parts(arrays: list[np.ndarray]) -> Parts:
    """Rows [n, …] of any dtype as bytes [n, bytes]; views."""
    return [array.reshape(len(array), -1).view(np.uint8) for array in arrays]


def _checksum(parts: Parts, slot: int) -> int:
    found = 0
    for part in parts:
        found = zlib.crc32(part[slot].data, found)
    return found


def _vectors(parts: Parts, slots: slice, padding: np.ndarray) -> list[np.ndarray]:
    return [
        piece
        for slot in range(slots.start, slots.stop)
        for piece in (*(part[slot] for part in parts), padding)
    ]


def _scatter(bounce: np.ndarray, stride: int, parts: Parts, slots: slice) -> None:
    rows, begin = bounce.reshape(-1, stride), 0
    for part in parts:
        part[slots] = rows[:, begin : begin + part.shape[1]]
        begin += part.shape[1]


def _gather(bounce: np.ndarray, stride: int, parts: Parts, slots: slice) -> None:
    rows, begin = bounce.reshape(-1, stride), 0
    for part in parts:
        rows[:, begin : begin + part.shape[1]] = part[slots]
        begin += part.shape[1]
    rows[:, begin:] = 0


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """OSErrors of making or flushing files as one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write in {folder}: {error.strerror}; mend that, then {AGAIN}"
        ) from error
