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

import numpy as np
from jaxtyping import Int

from moe_jax.base.errors import UserError
from moe_jax.base.files import disk_errors
from moe_jax.config import require
from moe_jax.placement.place import Step

VERSION = 1
BLOCK = struct.Struct("<II")


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
        highest = int(self.chosen.max())
        require(
            highest <= self.experts,
            f"the trace names expert {highest}, beyond its {self.experts} experts",
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

    What was appended before a kill can be read. UserError: the file exists, or the disk fails.
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
        require(0 < experts < 2**16, f"a trace holds up to 65535 experts, not {experts}")
        require(len(set(domains)) == len(domains) > 0, f"domains {list(domains)} are not distinct")
        self.path = path
        self.shape = (layers, per_token)
        self.experts = experts
        self.domains = tuple(domains)
        self._dtype = np.dtype(np.uint8 if experts < 256 else "<u2")
        header = {
            "version": VERSION,
            "layers": layers,
            "experts": experts,
            "per_token": per_token,
            "domains": list(domains),
            "note": note,
        }
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
            self._file.write(json.dumps(header).encode() + b"\n")

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

    UserError: no such file, not a trace, or a block whose checksum does not hold.
    """
    try:
        header, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the trace {path}: {error.strerror}") from error
    try:
        fields = json.loads(header)
        shape = (fields["layers"], fields["per_token"])
        experts = int(fields["experts"])
        domains = tuple(fields["domains"])
        require(fields["version"] == VERSION, f"{path} is a trace of version {fields['version']}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a routing trace: its first line is no header") from error
    dtype = np.dtype(np.uint8 if experts < 256 else "<u2")
    chosen: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for payload in _blocks(path, body):
        tokens = len(payload) // (2 + shape[0] * shape[1] * dtype.itemsize)
        labels.append(np.frombuffer(payload, "<i2", tokens))
        chosen.append(np.frombuffer(payload, dtype, offset=2 * tokens).reshape(tokens, *shape))
    require(len(chosen) > 0, f"{path} holds no tokens: its run ended before the first was written")
    tokens = np.concatenate(chosen)
    return Trace(tokens, np.concatenate(labels), experts, domains, fields.get("note", ""))


def _blocks(path: Path, body: bytes) -> Iterator[bytes]:
    position = 0
    number = 0
    while position + BLOCK.size <= len(body):
        length, checksum = BLOCK.unpack_from(body, position)
        payload = body[position + BLOCK.size : position + BLOCK.size + length]
        if len(payload) < length:
            return  # a killed run leaves part of its last block
        if zlib.crc32(payload) != checksum:
            raise UserError(f"{path}: block {number} is damaged (its checksum does not hold)")
        yield zlib.decompress(payload)
        position += BLOCK.size + length
        number += 1
