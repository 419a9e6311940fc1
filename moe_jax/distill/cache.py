"""A teacher's outputs, computed once and stored in a folder beside the token array.

A token has one next-token distribution for each window length. Stored of it are either K tokens
drawn from it (`sampled`: 2·K bytes for vocabularies up to 65,536, and unbiased), or its K most
likely tokens and the mass of all others (`top_k`: 4·K + 2 bytes). A cache is a folder of shards.
Each shard is written atomically, so a killed build continues with the first that is missing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.base.files import write_atomically
from moe_jax.base.hashes import BYTES, digest, hasher
from moe_jax.base.paths import readable
from moe_jax.config import require
from moe_jax.data.batches import Windows
from moe_jax.data.tokens import TokenArray
from moe_jax.distill.teacher import Teacher, require_same_tokens
from moe_jax.distill.teacher_outputs import CacheConfig, make_outputs

_readable = partial(
    readable,
    kind="the teacher's cache",
    remedy="mend the disk, or name another folder with --data.cache",
)
Row = dict[str, np.ndarray]


def position_dtype(config: CacheConfig, vocabulary: int) -> np.dtype:
    """The record of one position on disk."""
    ids = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    parts: list[Any] = [("tokens", ids, (config.count,))]
    if config.kind == "top_k":  # log-probabilities of the K tokens and, last, of all others
        parts.append(("log_p", np.float16, (config.count + 1,)))
    return np.dtype(parts)


class TeacherCache:
    """Random access by window: {"teacher_tokens": int32[L, K]} and, for top_k,
    {"teacher_log_p": float32[L, K]}.

    A shard is the records of its windows' positions, in order, and a checksum of them (blake2b).
    It is verified before its first use, and computed again if it is damaged. No file stays open.
    UserError: a shard cannot be read, or not be written.
    """

    def __init__(
        self,
        folder: Path,
        config: CacheConfig,
        *,
        dtype: np.dtype,
        length: int,
        count: int,
        compute: Callable[["TeacherCache", int], np.ndarray],
        say: Callable[[str], None] = print,
    ) -> None:
        """`dtype` of a position, `length` of a window (L), and the `count` of windows. `compute`
        gives the records of a shard."""
        self.folder = folder
        self.config = config
        self.dtype = dtype
        self.length = length
        self._count = count
        self._compute = compute
        self._say = say
        self._verified = np.zeros(len(self.shards()), bool)

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for each token of the text."""
        return self.dtype.itemsize + BYTES / (self.config.shard * self.length)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        shard, row = divmod(index, self.config.shard)
        if not self._verified[shard]:
            self._verify(shard)
        stored = self._read(shard, row * self.length, self.length)
        out: Row = {"teacher_tokens": stored["tokens"].astype(np.int32)}
        if self.config.kind == "top_k":
            # float16 is coarse. Normalised again, the K probabilities and the tail add up to 1.
            log_p = stored["log_p"].astype(np.float32)
            out["teacher_log_p"] = (log_p - _logsumexp(log_p))[:, :-1]
        return out

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.rows"

    def shards(self) -> range:
        return range(-(-self._count // self.config.shard))

    def windows(self, shard: int) -> range:
        """Numbers of the windows in a shard. The last shard may have fewer."""
        size = self.config.shard
        return range(shard * size, min((shard + 1) * size, self._count))

    def is_complete(self, shard: int) -> bool:
        """Whether the shard's file exists and has its full size."""
        path = self.path(shard)
        size = len(self.windows(shard)) * self.length * self.dtype.itemsize
        return path.exists() and path.stat().st_size == size + BYTES

    def write(self, shard: int) -> None:
        """Computes a shard and stores it."""
        data = self._compute(self, shard).view(np.uint8).reshape(-1)
        write_atomically(self.path(shard), data.tobytes() + _checksum(data))

    def _verify(self, shard: int) -> None:
        """Makes sure that a shard is what was written."""
        if not self._is_intact(shard):
            self._say(f"{self.path(shard)} is damaged: the teacher reads its text again")
            self.write(shard)
            require(
                self._is_intact(shard),
                f"{self.path(shard)} does not read back as written: check the disk, or name "
                "another folder with --data.cache",
            )
        self._verified[shard] = True

    def _is_intact(self, shard: int) -> bool:
        if not self.is_complete(shard):
            return False
        with _readable(self.path(shard)) as path:
            data = np.fromfile(path, np.uint8)
        return _checksum(data[:-BYTES]) == data[-BYTES:].tobytes()

    def _read(self, shard: int, begin: int, count: int) -> np.ndarray:
        """`count` records of a shard, from record `begin` on."""
        # Opened each time. A shard that stays open or mapped costs a file descriptor, and a
        # process has about a thousand.
        with _readable(self.path(shard)) as path:
            return np.fromfile(path, self.dtype, count, offset=begin * self.dtype.itemsize)


def build_cache(
    parent: Path,
    teacher: Teacher,
    array: TokenArray,
    length: int,
    config: CacheConfig,
    say: Callable[[str], None] = print,
) -> TeacherCache:
    """The teacher's outputs on every window of `array` (data.batches.Windows of this length).

    They are in parent/teacher-HASH. The hash is of everything that decides them: the teacher, the
    tokens and their order, the length, the stored part, and the seed. Complete shards are not
    computed again. The cache keeps the teacher, for shards that are damaged later. UserError: the
    array's tokenizer is not the teacher's, K is not below the vocabulary, or the text has no whole
    window.
    """
    require_same_tokens(array.tokenizer, teacher.tokenizer)
    vocabulary = teacher.tokenizer.vocabulary
    require(config.count < vocabulary, f"cache.count={config.count} exceeds the vocabulary")
    count = (len(array.tokens) - length - 1) // length + 1
    require(
        count > 0, f"the text has {len(array.tokens)} tokens, fewer than one window of {length}"
    )
    folder = parent / f"teacher-{_name(teacher, array, length, config)}"
    dtype = position_dtype(config, vocabulary)
    outputs = make_outputs(teacher, config, vocabulary)
    compute = partial(_records, windows=Windows(array, length, 0, count), outputs=outputs)
    cache = TeacherCache(
        folder, config, dtype=dtype, length=length, count=count, compute=compute, say=say
    )
    missing = [shard for shard in cache.shards() if not cache.is_complete(shard)]
    if missing:
        tokens = sum(len(cache.windows(shard)) for shard in missing) * length
        say(f"the teacher reads {tokens} tokens: {cache.bytes_per_token:.1f} bytes each are stored")
    for done, shard in enumerate(missing):
        cache.write(shard)
        say(f"teacher: {done + 1} of {len(missing)} shards")
    return cache


def _name(teacher: Teacher, array: TokenArray, length: int, config: CacheConfig) -> str:
    content = _checksum(array.tokens).hex()
    # Without config.batch, which changes the speed only.
    stored = (config.kind, config.count, config.temperature, config.seed, config.shard, length)
    return digest(teacher.fingerprint(), content, repr(stored))


def _records(
    cache: TeacherCache,
    shard: int,
    windows: Windows,
    outputs: Callable[..., dict[str, jax.Array]],
) -> np.ndarray:
    """The records of a shard's positions."""
    return np.concatenate(list(_rows(cache, shard, windows, outputs)))


def _rows(
    cache: TeacherCache,
    shard: int,
    windows: Windows,
    outputs: Callable[..., dict[str, jax.Array]],
) -> Iterator[np.ndarray]:
    """The records of a shard's positions, one batch of windows after another."""
    numbers = list(cache.windows(shard))
    batch = cache.config.batch
    for begin in range(0, len(numbers), batch):
        own = numbers[begin : begin + batch]
        # The last batch is filled up with copies of its last window, so that one shape is compiled.
        index = np.array(own + [own[-1]] * (batch - len(own)))
        inputs = [windows[i] for i in index]
        # A window has a token more, which is only a target.
        tokens = np.stack([window["tokens"][: cache.length] for window in inputs])
        segments = np.stack([window["segments"][: cache.length] for window in inputs])
        rows = np.zeros((batch, cache.length), cache.dtype)
        for name, values in outputs(tokens, segments, index).items():
            rows[name] = np.asarray(values)
        yield rows[: len(own)].reshape(-1)


def _checksum(data: np.ndarray) -> bytes:
    # The array itself and not its bytes: those would be a copy of a text larger than memory.
    state = hasher()
    state.update(data.data)
    return state.digest()


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))
