"""A published model, or a model in memory, rewritten file by file as a folder of safetensors.

Never more than one matrix of one layer is in memory. A command that was killed goes on with the
files that are missing. CONVERSION in the folder holds the hash of every file.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.base.errors import UserError, reading, require
from moe_jax.base.files import disk_errors, write_atomically
from moe_jax.base.hashes import digest, digest_file
from moe_jax.base.machine import require_space
from moe_jax.base.paths import read_file
from moe_jax.config import DType, ModelConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop import gguf, hugging_face
from moe_jax.interop.assemble import Piece, Tensors, parts_in_memory, read_piece, require_complete
from moe_jax.interop.gguf.model import open_file
from moe_jax.interop.hugging_face.export import write_config
from moe_jax.interop.hugging_face.folder import CONFIG, MOST_JSON_BYTES, TOKENIZER, read_json
from moe_jax.interop.hugging_face.model import MTP, first_token, open_folder
from moe_jax.interop.hugging_face.write_tokenizer import tokenizer_files
from moe_jax.interop.hugging_face.writer import (
    LENGTH,
    SHARD_BYTES,
    TYPES,
    Shard,
    shards,
    write_index,
    write_json,
    write_settings,
    write_shard,
)

CONVERSION = "conversion.json"
BESIDE = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files of a tokenizer, which are copied as they are."""


@dataclass(frozen=True)
class Source:
    """A model whose parts can be read one after the other."""

    config: ModelConfig
    part: Callable[[Piece], np.ndarray]
    """parameter[index] of a piece of the target."""
    beside: dict[str, bytes]
    """Contents of the tokenizer's files."""
    bos: int
    eos: int
    fingerprint: str
    """Hash of what says that it is the same model."""


def open_source(path: str, *, dtype: DType | None = None, mtp: MTP = "keep") -> Source:
    """The model in a folder of safetensors, on the hub (hf:OWNER/NAME), or in a GGUF file.

    `dtype`: of the files to be written. None: as config.json says, bfloat16 for an FP8 model and
    float32 for a GGUF file. UserError: as hugging_face.load_model and gguf.load.
    """
    if path.endswith(".gguf") or path == gguf.SMOLLM2:
        return _of_gguf(path, dtype)
    folder = hugging_face.find(path)
    with reading(folder):
        return _of_folder(folder, dtype, mtp)


def _of_folder(folder: Path, dtype: DType | None, mtp: MTP) -> Source:
    fields = read_json(folder / CONFIG)
    config, tensors = open_folder(folder, mtp=mtp)
    config = replace(config, param_dtype=dtype or _dtype(fields))
    names = [name for name in BESIDE if (folder / name).is_file()]
    beside = {name: read_file(folder / name, MOST_JSON_BYTES) for name in names}
    sizes = [f"{p.name} {p.stat().st_size}" for p in sorted(folder.glob("*.safetensors"))]
    bos, eos = (first_token(fields, f"{name}_token_id") for name in ("bos", "eos"))
    require(type(eos) is int, f"eos_token_id is {eos!r}: a token is needed")
    bos = eos if bos is None else bos
    mark = digest(json.dumps(fields, sort_keys=True), repr(config), *sizes)
    return Source(config, _parts(tensors, config), beside, bos, eos, mark)


def _of_gguf(path: str, dtype: DType | None) -> Source:
    file = gguf.find(path)
    with reading(file):
        config, tensors, tokenizer = open_file(file)
        config = replace(config, param_dtype=dtype or "float32")
        part = _parts(tensors, config)
    beside = _tokenizer(tokenizer)
    mark = digest(str(file.stat().st_size), repr(config), tokenizer.fingerprint)
    return Source(config, part, beside, tokenizer.bos, tokenizer.eos, mark)


def of_memory(
    config: ModelConfig, parameters: Any, router: Any, tokenizer: Tokenizer, mark: str
) -> Source:
    """A model whose arrays are in memory. `mark` says which one it is."""
    part = parts_in_memory(parameters, router)
    beside = _tokenizer(tokenizer)
    mark = digest(mark, repr(config), tokenizer.fingerprint)
    return Source(config, part, beside, tokenizer.bos, tokenizer.eos, mark)


def _dtype(fields: dict[str, Any]) -> DType:
    if fields.get("quantization_config"):
        return "bfloat16"
    said = fields.get("dtype") or fields.get("torch_dtype")
    return said if isinstance(said, str) and said in TYPES else "float32"  # pyright: ignore


def _parts(tensors: Tensors, config: ModelConfig) -> Callable[[Piece], np.ndarray]:
    """Reads parts from a file whose shapes and names all fit. UserError: they do not."""
    theirs = {(p.parameter, p.index): p for p in require_complete(tensors, config)}
    return lambda piece: read_piece(tensors, theirs[piece.parameter, piece.index])


def convert(
    source: Source,
    target: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    length: int = LENGTH,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes the model to a folder that hugging_face.load_model and transformers load.

    `on_bytes(count)` is called after each file, and once for all that are there already. Files of
    an earlier, killed call with the same source stay if their hash is right. UserError: no family
    can express the model, the folder holds another conversion, or the disk is full.
    """
    values = write_config(source.config, source.bos, source.eos, length)
    planned = shards(source.config, shard_bytes)
    plan = digest(source.fingerprint, *(f"{s.file} {s.bytes}" for s in planned))
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        hashes = _hashes(target, plan)
        missing = [shard for shard in planned if not _is_whole(target, shard, hashes)]
        require_space(target, sum(shard.bytes for shard in missing))
        on_bytes(sum(shard.bytes for shard in planned if shard not in missing))
        for shard in missing:
            hashes[shard.file] = write_shard(target, source.config, shard, source.part)
            write_json(target / CONVERSION, {"plan": plan, "hashes": hashes})
            on_bytes(shard.bytes)
        write_index(target, planned)
        for name, content in source.beside.items():
            write_atomically(target / name, content)
        write_settings(target, values)


def size_of(config: ModelConfig) -> int:
    """Bytes of all tensors of a model in its files."""
    return sum(shard.bytes for shard in shards(config))


def _hashes(target: Path, plan: str) -> dict[str, str]:
    """Hashes of the files that an earlier call wrote."""
    if not (target / CONVERSION).is_file():
        require(
            not (target / CONFIG).exists(), f"{target} holds a model already: choose another folder"
        )
        return {}
    fields = read_json(target / CONVERSION)
    hashes = fields.get("hashes")
    if fields.get("plan") != plan or not isinstance(hashes, dict):
        raise UserError(
            f"{target} holds the conversion of another model, or with other settings: choose "
            "another folder, or remove it"
        )
    return hashes


def _is_whole(target: Path, shard: Shard, hashes: dict[str, str]) -> bool:
    file = target / shard.file
    return file.is_file() and digest_file(file) == hashes.get(shard.file)


def _tokenizer(tokenizer: Tokenizer) -> dict[str, bytes]:
    files = tokenizer_files(tokenizer, LENGTH)
    return {name: json.dumps(c, ensure_ascii=False).encode() for name, c in files.items()}
