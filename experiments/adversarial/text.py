"""The text of the adversarial experiment: documents of three domains, cut into windows."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.adversarial.settings import BATCH, DOCUMENT, LENGTH, WINDOWS
from moe_jax.objectives.base import Batch
from moe_jax.study.domains import DOMAINS, LIMIT, write_corpus

SHARES = {"code": 0.5, "prose": 0.3, "tables": 0.2}
"""The mixture of real domains."""
FIFTHS = {"teacher": (0, 2), "seed": (4,), "stretch": (4,), "pool": (1, 3)}
"""The fifths of each role. A document belongs to the fifth `index mod 5`."""


class Text:
    """Documents of the real domains. The held-out ones are from other files.

    Both are domains.write_corpus's, written into `folder` unless they are there.
    """

    def __init__(self, folder: Path) -> None:
        write_corpus(folder)
        self._train = {d: _documents(folder / "corpus" / d) for d in DOMAINS}
        held_out = folder / "held-out"
        self._held_out = {d: _cut((held_out / f"{d}.txt").read_bytes()) for d in DOMAINS}

    def draw(self, role: str, count: int, seed: int) -> tuple[list[bytes], np.ndarray]:
        """(documents in the mixture SHARES, the number of each one's domain).

        `role` is teacher, seed, pool or stretch. The first three share no document and are alike,
        because every fifth document goes to a role. A stretch is a seed of the filter that comes
        from the first fifth of each domain's text.
        """
        rng = np.random.default_rng([seed, len(role)])
        until = 0.2 if role == "stretch" else 1.0
        documents: list[bytes] = []
        domains: list[int] = []
        for index, name in enumerate(DOMAINS):
            part = self._train[name][: int(until * len(self._train[name]))]
            part = [d for i, d in enumerate(part) if i % 5 in FIFTHS[role]]
            wanted = min(round(SHARES[name] * count), len(part))
            documents += [part[i] for i in rng.permutation(len(part))[:wanted]]
            domains += [index] * wanted
        return documents, np.array(domains)

    def held_out(self, count: int) -> dict[str, np.ndarray]:
        """The windows of the first `count` documents of each domain."""
        return {d: windows_of(self._held_out[d][:count]) for d in DOMAINS}


def _documents(folder: Path) -> list[bytes]:
    texts = (path.read_bytes() for path in sorted(folder.glob("*.txt")))
    return _cut(b"\n".join(texts)[:LIMIT])


def _cut(data: bytes) -> list[bytes]:
    return [data[i : i + DOCUMENT] for i in range(0, len(data) - DOCUMENT + 1, DOCUMENT)]


def windows_of(documents: Sequence[bytes]) -> np.ndarray:
    """uint8[documents · WINDOWS, LENGTH + 1]. Neighbours share a byte: a target, then an input."""
    data = np.frombuffer(b"".join(documents), np.uint8).reshape(len(documents), DOCUMENT)
    starts = range(0, LENGTH * WINDOWS, LENGTH)
    parts = [data[:, start : start + LENGTH + 1] for start in starts]
    return np.stack(parts, axis=1).reshape(-1, LENGTH + 1)


def shuffled_batches(rows: np.ndarray, seed: int, count: int = BATCH) -> Iterator[np.ndarray]:
    """Endless batches of `count` rows, every row once an epoch. Batches cross epochs."""
    rng = np.random.default_rng(seed)
    queue = np.zeros(0, int)
    while True:
        while len(queue) < count:
            queue = np.concatenate([queue, rng.permutation(len(rows))])
        yield rows[queue[:count]]
        queue = queue[count:]


def batch_of(windows: np.ndarray) -> Batch:
    """Windows int[B, LENGTH + 1] as a batch in which each is one document."""
    tokens = jnp.asarray(windows, jnp.int32)
    return {"tokens": tokens, "segments": jnp.ones_like(tokens)}
