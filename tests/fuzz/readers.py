"""Every reader of foreign files, with a small file of its own and ways to damage it.

    for failure in failures("gguf", folder, seed=0, count=1000): ...

A mutated file must be read, or refused in one short line, without much memory. An error that our
own code raised by accident (a missing key, a wrong type) is a failure even if the reader turns it
into a line, because then something was used before it was checked.
"""

import importlib.util
import io
import json
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import moe_jax
from moe_jax.base.errors import UserError
from moe_jax.commands.sweep import find_experiment
from moe_jax.config import TrainConfig, from_dict
from moe_jax.data.tokenizer import Tokenizer, make_tokenizer
from moe_jax.interop import gguf, hugging_face
from moe_jax.interop.gguf.header import read_header
from moe_jax.placement.public_traces import open_trace
from moe_jax.placement.trace import BLOCK, TraceWriter
from moe_jax.study.sweep.command import parse_sweep
from moe_jax.study.sweep.journal import load_study, open_journal, stored_identity
from moe_jax.study.sweep.trials import completed, running
from tests.fuzz.mutate import LONG, ODD, damaged, deep, gguf_file, retyped

MOST_CHARACTERS = 400
"""Of an error line, without the folder of the file."""
MOST_BYTES = 40_000_000
"""Python's and NumPy's memory of a read. The files themselves are far smaller."""
SWEEP = parse_sweep(["train", "--search", "seed=int:0..9"], find_experiment)
ACCIDENTS = (
    TypeError, AttributeError, LookupError, AssertionError, NameError, ArithmeticError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A way to make a file, to damage it by its types, and to read it."""

    write: Callable[[Path], Path]
    """Writes a sound file into a folder, and returns what `read` is given."""
    read: Callable[[Path], Any]
    retype: Callable[[Path, Random], None]
    """Replaces a value inside of the file, whose checksums and lengths stay right."""
    reach: int = 3000
    """Bytes at the beginning that get most of the damage."""


def trial(reader: Reader, path: Path, random: Random) -> str | None:
    """Damages what is at `path`, reads it and mends it. The text of a failure, or None."""
    files = [path] if path.is_file() else [p for p in sorted(path.iterdir()) if p.is_file()]
    whole = {file: file.read_bytes() for file in files}
    try:
        if random.random() < 0.5:
            file = random.choice(files)
            file.write_bytes(damaged(whole[file], random, reader.reach))
        else:
            reader.retype(path, random)
        return failure(reader.read, path)
    finally:
        for file, data in whole.items():
            file.write_bytes(data)


def failure(read: Callable[[Path], Any], path: Path) -> str | None:
    """How reading this file breaks its promise, or None."""
    tracemalloc.start()
    try:
        read(path)
        problem = None
    except UserError as error:
        problem = _problem(error, path)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return problem or (f"{peak} bytes of memory" if peak > MOST_BYTES else None)


def _problem(error: UserError, path: Path) -> str | None:
    line = str(error).replace(str(path), "FILE")
    if not line.isprintable() or len(line) > MOST_CHARACTERS:
        return f"a line of {len(line)} characters: {line[:200]!r}"
    cause: BaseException | None = error
    while isinstance(cause, UserError):
        cause = cause.__cause__
    if isinstance(cause, ACCIDENTS) and "is damaged (" in line and _is_ours(cause):
        return f"used before it was checked: {type(cause).__name__}: {line[:200]}"
    return None


def _is_ours(error: BaseException) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    package = str(Path(str(moe_jax.__file__ or moe_jax.__path__[0])).parent)
    return frame is not None and package in frame.tb_frame.f_code.co_filename


def failures(name: str, folder: Path, *, seed: int, count: int) -> Iterator[str]:
    """The failures among `count` mutations of the file of READERS[name]."""
    reader = READERS[name]
    path = reader.write(folder)
    assert failure(reader.read, path) is None
    reader.read(path)  # the sound file is read, and not refused
    for number in range(count):
        problem = trial(reader, path, Random(f"{name}-{seed}-{number}"))
        if problem:
            yield f"{name}, seed {seed}, mutation {number}: {problem}"


def _write_gguf(folder: Path) -> Path:
    from tests.interop import conftest

    return conftest.write(folder / "small.gguf")


def _retype_gguf(path: Path, random: Random) -> None:
    header = read_header(path)
    fields = dict(header.fields)
    name = random.choice(list(fields))
    arrays = [np.arange(3), np.array([0.5, np.nan]), np.array([True]), np.zeros(0, int)]
    # A scalar becomes an array at least as often as another scalar.
    fields[name] = random.choice([random.choice(ODD[1:33]), random.choice(arrays), LONG, ["a"]])
    if random.random() < 0.1:
        del fields[name]
    path.write_bytes(gguf_file(fields, header.tensors))


def _write_folder(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from tests.interop import folder as small

        small.write(folder / kind, kind, shards=2)
        return folder / kind

    return write


def _retype_folder(path: Path, random: Random) -> None:
    file = random.choice([*path.glob("*.json"), path / "config.json", *path.glob("*.safetensors")])
    if file.suffix == ".json":
        _retype_json(file, random)
        return
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(retyped(json.loads(data[8:end]), random)).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[end:])


def _retype_json(path: Path, random: Random) -> None:
    path.write_text(json.dumps(retyped(json.loads(path.read_text()), random)))


def _write_trace(folder: Path) -> Path:
    random = np.random.default_rng(0)
    path = folder / "small.trace"
    with TraceWriter(path, layers=3, experts=9, per_token=2, domains=("a", "b")) as writer:
        for domain in ("a", "b", "a"):
            writer.append(random.integers(0, 10, (7, 3, 2)), domain)
    return path


def _retype_trace(path: Path, random: Random) -> None:
    line, _, body = path.read_bytes().partition(b"\n")
    if random.random() < 0.6:
        line = json.dumps(retyped(json.loads(line), random)).encode()
    else:
        content = random.choice(
            [b"", b"\0", random.randbytes(56), b"\xff" * 56, b"\x01\x02" * 28, bytes(56 * 9)]
        )
        body += _block(zlib.compress(content) if random.random() < 0.8 else content)
    path.write_bytes(line + b"\n" + body)


def _block(payload: bytes) -> bytes:
    return BLOCK.pack(len(payload), zlib.crc32(payload)) + payload


def _write_array(folder: Path) -> Path:
    path = folder / "small.npy"
    np.save(path, np.random.default_rng(0).integers(0, 9, (30, 3, 2)).astype(np.int16))
    return path


def _retype_array(path: Path, random: Random) -> None:
    if random.random() < 0.5:
        odd = random.choice(
            [
                np.zeros((3, 2)),
                np.array(["a"]),
                np.zeros((4, 3, 2), "M8[s]"),
                np.zeros((2, 2, 2), "?"),
            ]
            + [
                np.full((2, 2, 2), n, t)
                for n, t in ((2**63, "u8"), (-(2**63), "i8"), (70_000, "i4"))
            ]
            + [np.zeros((0, 3, 2), int), np.array(5), np.zeros((2, 2, 2), [("a", "i4")])]
        )
        np.save(path, odd)
        return
    stream = io.BytesIO()
    fields = {"descr": "<i2", "fortran_order": False, "shape": (30, 3, 2)}
    fields[random.choice(list(fields))] = random.choice([*ODD, (2**40, 3, 2), (2**63, 2, 2), "|O"])
    text = f"{fields}\n".encode("utf-8", "surrogatepass")[: 2**16 - 1]
    stream.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(360))
    path.write_bytes(stream.getvalue())


def _write_lines(folder: Path) -> Path:
    random = np.random.default_rng(0)
    records = [
        {"step": step, "block": "decoder", "layer": layer, "top_indices": chosen}
        for step in range(3)
        for layer, chosen in enumerate(random.integers(0, 9, (3, 10, 2)).tolist())
    ]
    path = folder / "small.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _retype_lines(path: Path, random: Random) -> None:
    lines = path.read_text().splitlines()
    number = random.randrange(len(lines))
    lines[number] = json.dumps(retyped(json.loads(lines[number]), random))
    if random.random() < 0.03:
        lines[number] = "[" * 100_000
    path.write_text("\n".join(lines) + "\n")


def _write_parquet(folder: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    chosen = np.random.default_rng(0).integers(0, 9, (300, 3, 2))
    out = folder / "parquet"
    out.mkdir()
    for layer in range(3):
        column = pyarrow.array(chosen[:, layer].tolist(), pyarrow.list_(pyarrow.int16()))
        parquet.write_table(pyarrow.table({"indices": column}), out / f"layer_0{layer}.parquet")
    return out


def _retype_parquet(path: Path, random: Random) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = retyped(random.choice(([[1, 2], [3, 4]], [5, 6], ["a"])), random)
    try:
        table = pyarrow.table({random.choice(("indices", "indices", "other")): rows})
        parquet.write_table(table, path / f"layer_0{random.randrange(3)}.parquet")
    except (TypeError, ValueError, OverflowError, NotImplementedError, UnicodeError):
        pass  # a value that no column holds


def _write_tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(make_tokenizer("bpe:270", ["the thin hen"] * 4, lambda line: None).to_json())
    return path


def _write_config(folder: Path) -> Path:
    import dataclasses

    path = folder / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(TrainConfig())))
    return path


def _read_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_json(path.read_bytes().decode(errors="replace"))


def _read_config(path: Path) -> TrainConfig:
    try:
        saved = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return TrainConfig()
    return from_dict(TrainConfig, saved)


def _write_journal(folder: Path) -> Path:
    """Two trials of a sweep: one finished, one begun."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / "journal.log"
    study = load_study(open_journal(path), SWEEP, path)
    study.set_user_attr("sweep", SWEEP.identity)
    for folder_name in ("trial-0000", "trial-0001"):
        trial = study.ask({"seed": optuna.distributions.IntDistribution(0, 9)})
        trial.set_user_attr("folder", folder_name)
    study.tell(0, 1.5)
    # Optuna's names of workers and its times differ from run to run, and so would the mutations.
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}-[0-9]+", "worker", path.read_text())
    path.write_text(re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+", "2026-01-02T03:04:05.678901", text))
    return path


def _read_journal(path: Path) -> None:
    study = load_study(open_journal(path), SWEEP, path)
    stored_identity(study, SWEEP.identity)
    completed(study, SWEEP)
    running(study)


READERS = {
    "gguf": Reader(_write_gguf, gguf.read, _retype_gguf, reach=7000),
    "llama": Reader(_write_folder("llama"), hugging_face.read, _retype_folder, reach=1500),
    "qwen3_moe": Reader(_write_folder("qwen3_moe"), hugging_face.read, _retype_folder, reach=1500),
    "trace": Reader(_write_trace, open_trace, _retype_trace),
    "npy": Reader(_write_array, open_trace, _retype_array, reach=128),
    "jsonl": Reader(_write_lines, open_trace, _retype_lines),
    "tokenizer": Reader(_write_tokenizer, _read_tokenizer, _retype_json),
    "journal": Reader(_write_journal, _read_journal, _retype_lines, reach=10_000),
    "config": Reader(_write_config, _read_config, _retype_json),
}
if importlib.util.find_spec("pyarrow") is not None:
    READERS["parquet"] = Reader(_write_parquet, open_trace, _retype_parquet, reach=100_000)
__all__ = ["READERS", "Reader", "deep", "failure", "failures", "trial"]
