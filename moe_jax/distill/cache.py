"""A teacher's outputs, computed once and kept beside the token array.

A token has one next-token distribution for each window length. Kept of it are either K tokens drawn
from it (`sampled`: 2·K bytes for vocabularies up to 65,536, and unbiased), or its K best with the
mass of all others (`top_k`: 4·K + 2 bytes). A cache is a folder of shards, each written whole: a
killed build goes on with the first that is missing.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.base.errors import UserError
from moe_jax.base.files import write_atomically
from moe_jax.config import require
from moe_jax.data.batches import Windows
from moe_jax.data.documents import digest
from moe_jax.data.tokens import TokenArray
from moe_jax.distill.teacher import Teacher, read, require_same_tokens
from moe_jax.model.abstract import graph_of

POSITIONS_AT_ONCE = 64
"""Rows of logits in memory while a window is read out."""
CHECK_BYTES = 16
Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class CacheConfig:
    """What is kept of each distribution."""

    kind: Literal["sampled", "top_k"] = "sampled"
    count: int = 12
    """Tokens kept (K); twelve samples were enough for the published models."""
    temperature: float = 1.0
    seed: int = 0
    """Seed of the samples; each window's depend on it and on the window only."""
    batch: int = 8
    """Windows that the teacher reads at once."""
    shard: int = 1024
    """Windows in one file."""

    def __post_init__(self) -> None:
        for name in ("count", "temperature", "batch", "shard"):
            value = getattr(self, name)
            require(value > 0, f"cache.{name} is {value}: it must be positive")
        require(self.shard % self.batch == 0, f"cache.batch={self.batch} must divide shard")


def row_dtype(config: CacheConfig, vocabulary: int) -> np.dtype:
    """What one position takes on disk."""
    ids = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    parts: list[Any] = [("tokens", ids, (config.count,))]
    if config.kind == "top_k":  # log-probabilities of the K tokens and, last, of all others
        parts.append(("log_p", np.float16, (config.count + 1,)))
    return np.dtype(parts)


class TeacherCache:
    """Random access by window: {"teacher_tokens": int32[L, K]} and, for top_k,
    {"teacher_log_p": float32[L, K]}. UserError on reading a shard that is missing or damaged."""

    def __init__(self, folder: Path, config: CacheConfig, dtype: np.dtype, length: int, count: int):
        self.folder, self.config, self.dtype = folder, config, dtype
        self.length, self._count = length, count
        self._open: dict[int, np.ndarray] = {}

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for each token of the text."""
        return self.dtype.itemsize + CHECK_BYTES / (self.config.shard * self.length)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        shard, row = divmod(index, self.config.shard)
        if shard not in self._open:
            self._open[shard] = self._verified(shard)
        found = self._open[shard][row * self.length : (row + 1) * self.length]
        out: Row = {"teacher_tokens": found["tokens"].astype(np.int32)}
        if self.config.kind == "top_k":
            # float16 is coarse: normalised again, so that the K and the tail add up to 1.
            log_p = found["log_p"].astype(np.float32)
            out["teacher_log_p"] = (log_p - _logsumexp(log_p))[:, :-1]
        return out

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.rows"

    def shards(self) -> range:
        return range(-(-self._count // self.config.shard))

    def windows(self, shard: int) -> range:
        size = self.config.shard
        return range(shard * size, min((shard + 1) * size, self._count))

    def present(self, shard: int) -> bool:
        """Whether the shard's file is there at its full size."""
        path = self.path(shard)
        size = len(self.windows(shard)) * self.length * self.dtype.itemsize
        return path.exists() and path.stat().st_size == size + CHECK_BYTES

    def _verified(self, shard: int) -> np.ndarray:
        path = self.path(shard)
        if self.present(shard):
            data = np.memmap(path, np.uint8, "r")
            rows, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:].tobytes()
            if _check(rows) == check:
                return np.asarray(rows).view(self.dtype)
            raise UserError(f"{path} is damaged: remove it, and the same command builds it again")
        raise UserError(f"{path} is missing: the same command continues the teacher's cache")


def build_cache(
    parent: Path,
    teacher: Teacher,
    array: TokenArray,
    length: int,
    config: CacheConfig,
    say: Callable[[str], None] = print,
) -> TeacherCache:
    """The teacher's outputs on every window of `array` (data.batches.Windows of this length).

    They lie in parent/teacher-HASH; the hash is of everything that decides them: the teacher, the
    tokens and their order, the length, what is kept, and the seed. Parts that exist are kept.
    UserError: the array's tokenizer is not the teacher's, or K exceeds the vocabulary.
    """
    require_same_tokens(array.tokenizer, teacher.tokenizer)
    vocabulary = teacher.tokenizer.vocabulary
    require(config.count < vocabulary, f"cache.count={config.count} exceeds the vocabulary")
    content = hashlib.blake2b(array.tokens.tobytes(), digest_size=16)
    kept = (config.kind, config.count, config.temperature, config.seed, config.shard, length)
    name = digest(teacher.fingerprint(), content.hexdigest(), repr(kept))
    count = (len(array.tokens) - length - 1) // length + 1
    require(
        count > 0, f"the text has {len(array.tokens)} tokens, fewer than one window of {length}"
    )
    folder = parent / f"teacher-{name}"
    cache = TeacherCache(folder, config, row_dtype(config, vocabulary), length, count)
    missing = [shard for shard in cache.shards() if not cache.present(shard)]
    if missing:
        tokens = sum(len(cache.windows(shard)) for shard in missing) * length
        say(f"the teacher reads {tokens} tokens: {cache.bytes_per_token:.1f} bytes each are kept")
    windows, outputs = Windows(array, length, 0, count), make_outputs(teacher, config, vocabulary)
    for done, shard in enumerate(missing):
        rows = np.concatenate(list(_rows(cache, shard, windows, outputs)))
        data = rows.view(np.uint8).reshape(-1)
        write_atomically(cache.path(shard), data.tobytes() + _check(data))
        say(f"teacher: {done + 1} of {len(missing)} parts")
    return cache


def make_outputs(
    teacher: Teacher, config: CacheConfig, vocabulary: int
) -> Callable[[Array, Array, Array], dict[str, Array]]:
    """(tokens, segments: [B, L], window numbers [B]) -> what is kept, [B, L, ...] each."""
    fixed = {"graph": graph_of(teacher.model), "config": config, "vocabulary": vocabulary}
    return partial(_outputs, teacher.parameters, teacher.router, **fixed)


@partial(jax.jit, static_argnames=("graph", "config", "vocabulary"))
def _outputs(
    parameters: Any,
    router: Any,
    tokens: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    index: Int[Array, "B"],
    *,
    graph: nnx.GraphDef,
    config: CacheConfig,
    vocabulary: int,
) -> dict[str, Array]:
    of = read(nnx.merge(graph, parameters, router), tokens, segments)
    table, key = of.table[:vocabulary], jax.random.key(config.seed)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), tokens.shape[1]))
    keep = {"sampled": _sample, "top_k": _best}[config.kind]

    def one(inputs: tuple[Array, Array]) -> dict[str, Array]:
        hidden, key = inputs
        logits = jnp.einsum("d,vd->v", hidden, table, preferred_element_type=jnp.float32)
        return keep(key, jax.nn.log_softmax(logits / config.temperature), count=config.count)

    flat = lax.map(one, (of.hidden, keys(index).reshape(-1)), batch_size=POSITIONS_AT_ONCE)
    return jax.tree.map(lambda leaf: leaf.reshape(*tokens.shape, -1), flat)


def _sample(key: Array, log_p: Float[Array, "V"], *, count: int) -> dict[str, Int[Array, "K"]]:
    """K independent draws, by inversion: one cumulative sum serves all of them."""
    below = jnp.cumsum(jnp.exp(log_p))
    heights = jax.random.uniform(key, (count,)) * below[-1]
    found = jnp.searchsorted(below, heights, side="right")
    return {"tokens": jnp.minimum(found, len(log_p) - 1)}


def _best(key: Array, log_p: Float[Array, "V"], *, count: int) -> dict[str, Array]:
    best, tokens = lax.top_k(log_p, count)
    others = jax.nn.logsumexp(log_p.at[tokens].set(-jnp.inf))
    log_p = jnp.concatenate([best, others[None]])
    return {"tokens": tokens, "log_p": jnp.maximum(log_p, -60_000.0)}  # within float16


def _rows(
    cache: TeacherCache, shard: int, windows: Windows, outputs: Callable[..., dict[str, Array]]
) -> Iterator[np.ndarray]:
    """A shard's positions, a batch of windows after another; the last one is filled up."""
    numbers, batch = list(cache.windows(shard)), cache.config.batch
    for begin in range(0, len(numbers), batch):
        own = numbers[begin : begin + batch]
        index = np.array(own + [own[-1]] * (batch - len(own)))
        read = [windows[i] for i in index]
        inputs = (np.stack([w[k][: cache.length] for w in read]) for k in ("tokens", "segments"))
        found = outputs(*inputs, index)
        rows = np.zeros((batch, cache.length), cache.dtype)
        for name, values in found.items():
            rows[name] = np.asarray(values)
        yield rows[: len(own)].reshape(-1)


def _check(data: np.ndarray) -> bytes:
    return hashlib.blake2b(data.tobytes(), digest_size=CHECK_BYTES).digest()


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))
