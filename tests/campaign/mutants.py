"""Reads mutated files of one format and prints which of them end in anything but one line.

    python tests/campaign/mutants.py FORMAT SEED COUNT FOLDER

The last line printed is JSON: {"faults": [text, …]}. The script is run in a process of its own,
because a reader may end it.
"""

import json
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])

from tests.campaign import mutators

PACKAGE = Path(__file__).parents[2] / "moe_jax"
LONGEST = 700
"""Letters of a message that quotes a foreign value."""
SECONDS = 10
MEMORY = 3 << 30
"""Bytes that reading a small file may allocate."""

Read = Callable[[Path], Any]
Mutate = Callable[[bytes, random.Random], bytes]


class Format(NamedTuple):
    """A kind of input."""

    write: Callable[[Path], dict[Path, Mutate]]
    """Writes a right one into a folder. Returns the files that are mutated, and how."""
    read: Read
    """Reads the folder."""


def _gguf(folder: Path) -> dict[Path, Mutate]:
    from tests.interop.conftest import write

    return {write(folder / "m.gguf", "qwen3"): mutators.mutate_bytes}


def _read_gguf(folder: Path) -> None:
    from moe_jax.distill.teacher import Teacher

    Teacher.from_gguf(str(folder / "m.gguf"))


def _gguf_types(folder: Path) -> dict[Path, Mutate]:
    return dict.fromkeys(_gguf(folder), _other_fields)


def _other_fields(data: bytes, rng: random.Random) -> bytes:
    """The type of a field's value changed, its bytes left, or its key cut by a letter."""
    changed = bytearray(data)
    keys = [b"general.", b"qwen3.", b"tokenizer.ggml."]
    starts = [i for key in keys for i in _finds(data, key)]
    start = rng.choice(starts)
    length = int.from_bytes(data[start - 8 : start], "little")
    kind = start + length
    changed[kind : kind + 4] = rng.choice((*range(14), 255)).to_bytes(4, "little")
    return bytes(changed)


def _finds(data: bytes, word: bytes) -> Iterator[int]:
    start = data.find(word)
    while start >= 0:
        yield start
        start = data.find(word, start + 1)


def _hugging_face(folder: Path) -> dict[Path, Mutate]:
    from tests.interop.folder import write

    write(folder / "model", "qwen3_moe")
    return {
        folder / "model" / "config.json": mutators.mutate_json,
        folder / "model" / "tokenizer.json": mutators.mutate_json,
        folder / "model" / "model.safetensors": mutators.mutate_safetensors,
    }


def _read_hugging_face(folder: Path) -> None:
    from moe_jax.distill.teacher import Teacher

    Teacher.from_folder(str(folder / "model"))


def _trace(folder: Path) -> dict[Path, Mutate]:
    import numpy as np

    from moe_jax.placement.trace import TraceWriter

    path = folder / "ours.trace"
    chosen = np.random.default_rng(0).integers(0, 8, (40, 2, 2))
    with TraceWriter(path, layers=2, experts=8, per_token=2, domains=("a", "b")) as writer:
        writer.append(chosen, "a")
        writer.append(chosen, "b")
    return {path: mutators.mutate_first_line}


def _array(folder: Path) -> dict[Path, Mutate]:
    import numpy as np

    path = folder / "t.npy"
    np.save(path, np.random.default_rng(0).integers(0, 8, (40, 2, 2)).astype(np.int32))
    return {path: lambda data, rng: mutators.mutate_bytes(data, rng, head=130)}


def _megatron(folder: Path) -> dict[Path, Mutate]:
    path = folder / "t.jsonl"
    lines = [
        {
            "step": step,
            "block": "decoder",
            "layer": layer,
            "top_indices": [[0, 1], [2, 3], [1, 4]],
        }
        for step in range(4)
        for layer in (1, 2)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {path: mutators.mutate_lines}


def _read_trace(folder: Path) -> None:
    from moe_jax.placement.public_traces import open_trace

    trace = open_trace(next(p for p in folder.iterdir() if p.is_file()))
    trace.frequency()
    trace.steps()


def _journal(folder: Path) -> dict[Path, Mutate]:
    import optuna

    study = _open_sweep(folder)
    for value in (1.0, 2.0):
        distributions = {"model.width": optuna.distributions.CategoricalDistribution(("20", "24"))}
        study.tell(study.ask(distributions), value)
    return {folder / "sweep" / "journal.log": mutators.mutate_lines}


def _open_sweep(folder: Path) -> Any:
    from experiments.sweep import EXPERIMENTS
    from moe_jax.study.sweep.command import parse_sweep
    from moe_jax.study.sweep.trials import open_study

    words = ["train", "--search", "model.width=20,24", "--out", str(folder / "sweep")]
    return open_study(parse_sweep(words, EXPERIMENTS))


def _read_journal(folder: Path) -> None:
    from moe_jax.study.sweep.trials import completed, finished

    study = _open_sweep(folder)
    finished(study)
    completed(study)


def _metrics(folder: Path) -> dict[Path, Mutate]:
    path = folder / "metrics.jsonl"
    lines = [{"step": step, "loss": 5.0 - step / 10} for step in range(1, 9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {path: mutators.mutate_lines}


def _read_metrics(folder: Path) -> None:
    from moe_jax.train.metrics import MetricsFile

    MetricsFile(folder / "metrics.jsonl", resume_after=6).close()


def _words(folder: Path) -> dict[Path, Mutate]:
    path = folder / "words.json"
    words = ["tiny", "--model.moe.experts", "8", "--steps", "20", "--optim.learning-rate", "0.01"]
    path.write_text(json.dumps(words))
    return {path: _other_words}


def _other_words(data: bytes, rng: random.Random) -> bytes:
    """Options of train.py with odd values, names with a letter changed, words left out."""
    from moe_jax.cli import types
    from moe_jax.config import TrainConfig

    words = json.loads(data)
    names = sorted(types(TrainConfig))
    # A command line holds no NUL, and of surrogates those alone that stand for bytes.
    odd = [str(v) for v in mutators.VALUES if v not in ("\0", "\ud800")] + ["\udce9"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(names).replace("_", "-")
        match rng.randrange(6):
            case 0:
                name = name[: rng.randrange(len(name))] + rng.choice("ax.-=²") + name
                words += [f"--{name}", "1"]
            case 1:
                words += [f"--{name}={rng.choice(odd)}"]
            case 2:
                del words[rng.randrange(len(words) + 1) :]
            case 3:
                words.insert(rng.randrange(len(words) + 1), rng.choice(odd))
            case _:
                words += [f"--{name}", rng.choice(odd)]
    return json.dumps(words).encode()


def _read_words(folder: Path) -> None:
    from experiments.train import default_out, with_quick
    from moe_jax.cli import parse
    from moe_jax.config.presets import PRESETS

    words = json.loads((folder / "words.json").read_bytes())
    words = [word for word in words if word not in ("-h", "--help")]
    default_out(parse(with_quick(words), PRESETS))


FORMATS = {
    "gguf": Format(_gguf, _read_gguf),
    "gguf-types": Format(_gguf_types, _read_gguf),
    "hugging-face": Format(_hugging_face, _read_hugging_face),
    "trace": Format(_trace, _read_trace),
    "npy": Format(_array, _read_trace),
    "megatron": Format(_megatron, _read_trace),
    "journal": Format(_journal, _read_journal),
    "metrics": Format(_metrics, _read_metrics),
    "command-line": Format(_words, _read_words),
}


def fault_of(read: Read, folder: Path) -> str | None:
    """What reading did besides succeeding or raising a UserError of one short line."""
    from moe_jax.base.errors import UserError

    signal.alarm(SECONDS)
    try:
        read(folder)
    except UserError as error:
        return wrong_message(str(error))
    except BaseException as error:  # noqa: BLE001 (a campaign reports every kind)
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).is_relative_to(PACKAGE)]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "outside moe_jax"
        return f"{type(error).__name__} at {place}: {str(error)[:120]}"
    finally:
        signal.alarm(0)
    return None


def wrong_message(message: str) -> str | None:
    """Why a message is not one line that a terminal can show."""
    try:
        message.encode()
    except UnicodeEncodeError:
        return f"a message that is no UTF-8: {message[:120]!r}"
    if not message.isprintable():
        return f"a message with control letters: {message[:120]!r}"
    if len(message) > LONGEST:
        return f"a message of {len(message)} letters: {message[:120]}…"
    return None


def main(name: str, seed: int, count: int, folder: Path) -> list[str]:
    """Reads `count` mutants. Returns the distinct faults, each with its number of mutants."""
    chosen = FORMATS[name]
    folder.mkdir(parents=True, exist_ok=True)
    files = chosen.write(folder)
    right = {path: path.read_bytes() for path in files}
    limit_memory()
    found: dict[str, int] = {}
    for number in range(count):
        rng = random.Random(f"{name} {seed} {number}")
        for path, data in right.items():
            path.write_bytes(data)
        path = rng.choice(list(files))
        path.write_bytes(files[path](right[path], rng))
        fault = fault_of(chosen.read, folder)
        if fault:
            found[fault] = found.get(fault, 0) + 1
    return [f"{number} x {text}" for text, number in found.items()]


def limit_memory() -> None:
    """Allocations beyond MEMORY fail from now on."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"reading took more than {SECONDS} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _too_slow)
    faults = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]) / "mutants")
    print("\n" + json.dumps({"faults": faults}))
