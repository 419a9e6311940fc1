"""A model of ours as a folder that transformers loads."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.base.errors import require
from moe_jax.base.files import appearing, disk_errors, sync, write_atomically
from moe_jax.base.hashes import hasher
from moe_jax.base.paths import user_path
from moe_jax.config import ModelConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop.assemble import Piece, dtype_of, parts_in_memory, pieces
from moe_jax.interop.hugging_face.export import write_config, write_layout
from moe_jax.interop.hugging_face.folder import CONFIG, INDEX, SINGLE_FILE
from moe_jax.interop.hugging_face.write_tokenizer import tokenizer_files

SHARD_BYTES = 4 << 30
"""A file of a folder holds at most this much, unless one tensor is larger."""
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Names of the safetensors format."""
LENGTH = 4096
"""max_position_embeddings where nobody says it. Nothing that is computed depends on it."""


class Shard(NamedTuple):
    """A file of a folder, and what it holds."""

    file: str
    pieces: tuple[Piece, ...]
    bytes: int


def save(
    folder: str | Path,
    config: ModelConfig,
    parameters: Any,
    router: Any,
    tokenizer: Tokenizer,
    *,
    length: int = LENGTH,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json, generation_config.json, the tokenizer, and the parameters in safetensors.

    Tensors have the type config.param_dtype. `length` is the context that config.json names.
    UserError: no published family computes what this model does (the line names the settings),
    the folder has a model already, or the disk is full. Memory: one stacked parameter on the host.
    """
    target = new_folder(folder)
    values = write_config(config, tokenizer.bos, tokenizer.eos, length)
    with disk_errors(target):
        write_tensors(target, config, parts_in_memory(parameters, router), shard_bytes)
        for name, content in tokenizer_files(tokenizer, length).items():
            write_json(target / name, content)
        write_settings(target, values)


def new_folder(folder: str | Path) -> Path:
    """The folder that an argument names. UserError: it has a model already."""
    target = user_path(folder)
    require(
        not (target / CONFIG).exists(),
        f"{target} has a {CONFIG} already: choose another folder, or remove it",
    )
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    return target


def write_settings(target: Path, values: dict[str, Any]) -> None:
    """generation_config.json and config.json, which is last: with it, the folder is whole."""
    tokens = {name: values[name] for name in ("bos_token_id", "eos_token_id")}
    write_json(target / "generation_config.json", {"_from_model_config": True, **tokens})
    write_json(target / CONFIG, values)


def write_tensors(
    target: Path,
    config: ModelConfig,
    part: Callable[[Piece], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The shards and their index. `part` gives parameter[index] of a piece."""
    planned = shards(config, shard_bytes)
    for shard in planned:
        write_shard(target, config, shard, part)
    write_index(target, planned)


def write_shard(
    target: Path, config: ModelConfig, shard: Shard, part: Callable[[Piece], np.ndarray]
) -> str:
    """One file, whole or absent. Returns its hash (base.hashes). Memory: one piece.

    The library's own writer needs all tensors of a file at once, and copies them.
    """
    content = hasher()
    with appearing(target / shard.file) as unfinished:
        with unfinished.open("wb") as file:
            for data in _contents(config, shard, part):
                file.write(data)
                content.update(data)
        sync(unfinished)
    return content.hexdigest()


def _contents(
    config: ModelConfig, shard: Shard, part: Callable[[Piece], np.ndarray]
) -> Iterator[bytes | memoryview]:
    """The header and then every tensor of a file of safetensors."""
    yield _header(config, shard)
    for piece in shard.pieces:
        dtype = dtype_of(piece.parameter, config.param_dtype)
        for tensor in piece.theirs(part(piece)):
            whole = np.ascontiguousarray(tensor.astype(dtype, copy=False))
            # As bytes, because bfloat16 is no type that a buffer can have.
            yield whole.reshape(-1).view(np.uint8).data


def _header(config: ModelConfig, shard: Shard) -> bytes:
    # transformers refuses files without a format.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in shard.pieces:
        dtype = dtype_of(piece.parameter, config.param_dtype)
        for name in piece.names:
            begin = end
            end += math.prod(piece.shape) * dtype.itemsize
            entries[name] = {
                "dtype": TYPES[dtype.name],
                "shape": list(piece.shape),
                "data_offsets": [begin, end],
            }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned in a mapped file
    return struct.pack("<Q", len(text)) + text


def write_index(target: Path, planned: list[Shard]) -> None:
    """Which file has which tensor. A model of one file needs none."""
    if len(planned) == 1:
        return
    places = {name: shard.file for shard in planned for p in shard.pieces for name in p.names}
    total = sum(shard.bytes for shard in planned)
    write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def shards(config: ModelConfig, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """The files of a model, in the order in which they are written."""
    groups: list[list[Piece]] = []
    sizes: list[int] = []
    for piece, size in _sizes(config):
        if not groups or sizes[-1] + size > shard_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(piece)
        sizes[-1] += size
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = [SINGLE_FILE] if count == 1 else names
    return [
        Shard(name, tuple(group), size)
        for name, group, size in zip(names, groups, sizes, strict=True)
    ]


def _sizes(config: ModelConfig) -> Iterator[tuple[Piece, int]]:
    for piece in pieces(write_layout(config), config):
        width = dtype_of(piece.parameter, config.param_dtype).itemsize
        yield piece, math.prod(piece.shape) * len(piece.names) * width


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file as transformers writes it."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
