"""A run's routing on disk: appended while it runs, small, and readable after a kill.

A file is one line of JSON (version, layers, experts, per_token, domains, note) and then blocks:
length and CRC-32 of the payload (uint32 each, little-endian), and the payload, zlib of int16
domain[T] followed by uint8 (E < 256) or uint16 experts[T, layers, K]. E stands for no expert.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moe_jax.base.errors import UserError, quote, reading, require
from moe_jax.base.files import disk_errors
from moe_jax.base.paths import read_file
from moe_jax.interop.fields import Fields
from moe_jax.placement.place import Step

VERSION = 1
BLOCK = struct.Struct("<II")
MOST_BYTES = 1 << 30
"""Of a trace in memory. A million tokens of the largest published models fit."""
MOST_EXPERTS = 1 << 20
"""Experts of all layers together. Policies keep a few numbers for each."""
MOST_HEADER = 1 << 20


@dataclass(frozen=True)
class Trace:
    """The experts that each token used, in the order of the tokens."""

    chosen: Int[np.ndarray, "T layers K"]
    """Experts, best first. The number `experts` stands for no expert."""
    domain: Int[np.ndarray, "T"]
    """Index into `domains`."""
    experts: int
    domains: tuple[str, ...]
    note: str = ""

    def __post_init__(self) -> None:
        require(len(self.chosen) > 0, "the trace has no tokens")
        _check_sizes(self.layers, self.experts, self.chosen.shape[2])
        low = int(self.chosen.min())
        require(low >= 0, f"the trace names expert {low}: experts are numbered from 0")
        highest = int(self.chosen.max())
        require(
            highest <= self.experts,
            f"the trace names expert {highest}, beyond its {self.experts} experts",
        )
        require(
            self.domain.shape == self.chosen.shape[:1],
            f"the trace has {len(self.domain)} domain labels for {len(self.chosen)} tokens",
        )
        outside = (self.domain < 0) | (self.domain >= len(self.domains))
        require(
            not outside.any(),
            f"the trace names domain {self.domain[outside.argmax()]}, but has {len(self.domains)}",
        )

    @property
    def layers(self) -> int:
        return self.chosen.shape[1]

    def part(self, start: int, stop: int | None = None) -> "Trace":
        """Tokens start … stop - 1."""
        chosen = self.chosen[start:stop]
        domain = self.domain[start:stop]
        return Trace(chosen, domain, self.experts, self.domains, self.note)

    def frequency(self) -> Int[np.ndarray, "N"]:
        """Uses of every expert, numbered layer · E + expert."""
        per_layer = [
            np.bincount(self.chosen[:, layer].ravel(), minlength=self.experts + 1)
            for layer in range(self.layers)
        ]
        return np.concatenate([counts[: self.experts] for counts in per_layer])

    def steps(self, batch: int = 1) -> list[Step]:
        """What decoding needs: for each token and layer, the distinct experts.

        With a `batch`, that many equally long stretches of the trace are decoded side by side.
        """
        tokens = len(self.chosen) // batch
        require(tokens > 0, f"the trace has {len(self.chosen)} tokens, fewer than batch={batch}")
        rows = self.chosen[: tokens * batch].reshape(batch, tokens, self.layers, -1)
        steps: list[Step] = []
        for token in range(tokens):
            for layer in range(self.layers):
                distinct = np.unique(rows[:, token, layer])
                steps.append((layer, distinct[distinct < self.experts]))
        return steps


class TraceWriter:
    """Appends tokens to a new trace file. Use it as a context.

    What was appended before a kill can be read. UserError: the file exists, the disk fails, or
    more is appended than read_trace reads.
    """

    def __init__(
        self,
        path: Path,
        *,
        layers: int,
        experts: int,
        per_token: int,
        domains: Sequence[str] = ("text",),
        note: str = "",
    ) -> None:
        require(not path.exists(), f"{path} exists: a trace is never overwritten, remove it first")
        _check_sizes(layers, experts, per_token)
        _check_domains(domains)
        self.path = path
        self.shape = (layers, per_token)
        self.experts = experts
        self.domains = tuple(domains)
        header = _Header(layers, experts, per_token, self.domains, note)
        self._dtype = header.dtype
        self._token_bytes = header.token_bytes
        self._left = MOST_BYTES
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
            line = json.dumps({"version": VERSION, **header._asdict()})
            self._file.write(line.encode() + b"\n")

    def append(self, chosen: Int[np.ndarray, "T layers K"], domain: str | None = None) -> None:
        """Adds tokens that all belong to `domain` (without one, to the first)."""
        chosen = np.asarray(chosen)
        require(
            chosen.shape[1:] == self.shape,
            f"a trace of (layers, K) = {self.shape} cannot hold tokens of {chosen.shape[1:]}",
        )
        low, high = (int(chosen.min()), int(chosen.max())) if chosen.size else (0, 0)
        require(
            low >= 0 and high <= self.experts,
            f"experts {low} … {high} are not in 0 … {self.experts}",
        )
        domain = domain or self.domains[0]
        require(domain in self.domains, f"unknown domain '{domain}': use one of {self.domains}")
        self._left -= len(chosen) * self._token_bytes
        require(
            self._left >= 0,
            f"a trace holds up to {MOST_BYTES >> 20} MiB of routing: begin another file",
        )
        labels = np.full(len(chosen), self.domains.index(domain), "<i2")
        payload = zlib.compress(labels.tobytes() + chosen.astype(self._dtype).tobytes(), 6)
        with disk_errors(self.path.parent):
            self._file.write(BLOCK.pack(len(payload), zlib.crc32(payload)) + payload)
            self._file.flush()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._file.close()


def read_trace(path: Path) -> Trace:
    """The trace in a file, up to the last whole block (a killed run leaves part of one).

    Every number of the file is compared with a bound before memory is allocated for it.

    UserError: no such file, not a trace, a block whose checksum does not hold, or routing that
    would take more than MOST_BYTES.
    """
    with reading(path, "record it again"):
        line, _, body = read_file(path, MOST_BYTES).partition(b"\n")
        header = _header(line)
        chosen: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for number, payload in enumerate(_blocks(body)):
            tokens, rest = divmod(len(payload), header.token_bytes)
            require(rest == 0, f"block {number} does not hold whole tokens")
            labels.append(np.frombuffer(payload, "<i2", tokens))
            numbers = np.frombuffer(payload, header.dtype, offset=2 * tokens)
            chosen.append(numbers.reshape(tokens, header.layers, header.per_token))
        require(len(chosen) > 0, "holds no tokens: its run ended before the first was written")
        tokens = np.concatenate(chosen)
        domain = np.concatenate(labels)
        return Trace(tokens, domain, header.experts, header.domains, header.note)


class _Header(NamedTuple):
    """The first line of a file."""

    layers: int
    experts: int
    per_token: int
    domains: tuple[str, ...]
    note: str

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.experts < 256 else "<u2")

    @property
    def token_bytes(self) -> int:
        return 2 + self.layers * self.per_token * self.dtype.itemsize


def _header(line: bytes) -> _Header:
    """UserError: the line is no header of a trace, or its numbers are beyond the bounds."""
    problem = "is not a routing trace: its first line is no header"
    require(len(line) <= MOST_HEADER, problem)
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(problem) from error
    require(isinstance(values, dict), problem)
    fields = Fields(values)
    version = fields.integer("version")
    require(version == VERSION, f"is a trace of version {version}, not {VERSION}")
    header = _Header(
        layers=fields.integer("layers"),
        experts=fields.integer("experts"),
        per_token=fields.integer("per_token"),
        domains=tuple(fields.texts("domains")),
        note=fields.text("note", ""),
    )
    _check_sizes(header.layers, header.experts, header.per_token)
    _check_domains(header.domains)
    return header


def _check_sizes(layers: int, experts: int, per_token: int) -> None:
    require(0 < experts < 2**16, f"a trace holds up to 65535 experts, not {experts}")
    require(
        0 < layers * experts <= MOST_EXPERTS,
        f"a trace holds up to {MOST_EXPERTS} experts in all layers, not {layers} times {experts}",
    )
    require(0 < per_token <= experts, f"a token goes to 1 … {experts} experts, not {per_token}")


def _check_domains(domains: Sequence[str]) -> None:
    distinct = len(set(domains)) == len(domains)
    require(distinct and 0 < len(domains) <= 2**15, f"domains {quote(domains)} are not distinct")


def _blocks(body: bytes) -> Iterator[bytes]:
    position = 0
    number = 0
    left = MOST_BYTES
    while position + BLOCK.size <= len(body):
        length, checksum = BLOCK.unpack_from(body, position)
        payload = body[position + BLOCK.size : position + BLOCK.size + length]
        if len(payload) < length:
            return  # a killed run leaves part of its last block
        if zlib.crc32(payload) != checksum:
            raise UserError(f"block {number} is damaged (its checksum does not hold)")
        content = _unpacked(payload, left)
        yield content
        left -= len(content)
        position += BLOCK.size + length
        number += 1


def _unpacked(payload: bytes, most: int) -> bytes:
    """zlib's content, of at most `most` bytes: a thousand times the payload is possible."""
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(payload, most + 1)
    require(
        len(content) <= most,
        f"holds more than {MOST_BYTES >> 20} MiB of routing: record fewer tokens",
    )
    require(unpacker.eof, "a block ends too early")
    return content
