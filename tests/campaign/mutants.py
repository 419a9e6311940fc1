"""Reads mutated input of one kind and prints what ends in anything but one line.

    python tests/campaign/mutants.py KIND SEED COUNT FOLDER

The last line printed is JSON: {"faults": [text, …]}. The script is run in a process of its own,
because a reader may end it. Files of others are those of `tests.fuzz.readers`.
"""

import json
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])

LONGEST = 400
"""Letters of a message that quotes a foreign value."""
SECONDS = 120
MEMORY = 3 << 30
"""Bytes that reading a small file may allocate."""
NASTY = (
    *(
        "",
        "-1",
        "0",
        "1",
        "0.5",
        "1e400",
        "nan",
        "-inf",
        "9" * 30,
        "²",
        "1_0",
        " 1",
        "0x10",
        "None",
    ),
    *("true", "a", "é", "\udce9", "two\nlines", "\x1b[31m", "x" * 20_000, "[1]", "--", "-", "="),
    *("bpe:-3", "bpe:²", "files:", "files:[", "hf:a/b", "../..", "~", "/dev/null", "1kB", "-5GB"),
)
"""Values on a command line. It holds no NUL, and surrogates stand for bytes that are no UTF-8."""


def foreign_files(name: str, seed: int, count: int, folder: Path) -> Iterator[str]:
    """Failures of a reader of foreign files."""
    from tests.fuzz.readers import failures

    yield from failures(name, folder, seed=seed, count=count)


def command_lines(seed: int, count: int) -> Iterator[str]:
    """Failures of the command lines of training, sweeps and decoding."""
    readers = (read_train, read_sweep, read_complete)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        read = rng.choice(readers)
        words = mutated_words(rng)
        problem = fault_of(read, words)
        if problem:
            yield f"{read.__name__} {words!r:.300}: {problem}"


def mutated_words(rng: random.Random) -> list[str]:
    """Options with odd values, names with letters changed, words left out, doubled or put in."""
    from moe_jax.cli import types
    from moe_jax.config import TrainConfig

    names = [name.replace("_", "-") for name in sorted(types(TrainConfig))]
    words = [*rng.choice((["tiny"], [], ["small"])), "--steps", "20", "--model.moe.experts", "8"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice((*names, "search", "trials", "run", "text", "tokens"))
        match rng.randrange(6):
            case 0:
                name = name[: rng.randrange(len(name))] + rng.choice("ax.-=²") + name
                words += [f"--{name}", "1"]
            case 1:
                words += [f"--{name}={rng.choice(NASTY)}"]
            case 2:
                del words[rng.randrange(len(words) + 1) :]
            case 3:
                words.insert(rng.randrange(len(words) + 1), rng.choice(NASTY))
            case _:
                words += [f"--{name}", rng.choice(NASTY)]
    return [word for word in words if word not in ("-h", "--help")]


def read_train(words: list[str]) -> None:
    from moe_jax.cli import parse
    from moe_jax.commands.train import default_out, with_quick
    from moe_jax.config.presets import PRESETS

    default_out(parse(with_quick(words), PRESETS))


def read_sweep(words: list[str]) -> None:
    from moe_jax.commands.sweep import find_experiment
    from moe_jax.study.sweep.command import parse_sweep

    assert parse_sweep(["train", *words, "--search", "seed=1,2"], find_experiment).out


def read_complete(words: list[str]) -> None:
    from moe_jax.cli import parse_settings
    from moe_jax.commands.complete import Settings

    parse_settings(Settings(), words)


def fault_of(read: Callable[[list[str]], None], words: list[str]) -> str | None:
    """What reading did besides succeeding or raising a UserError of one short line."""
    from moe_jax.base.errors import UserError

    try:
        read(words)
    except UserError as error:
        message = str(error)
        if not message.isprintable() or len(message) > LONGEST:
            return f"a line of {len(message)} letters: {message[:150]!r}"
    except BaseException as error:  # noqa: BLE001 (a campaign reports every kind)
        return f"{type(error).__name__}: {str(error)[:150]!r}"
    return None


def faults_of(name: str, seed: int, count: int, folder: Path) -> list[str]:
    """The failures among `count` mutants of a kind."""
    folder.mkdir(parents=True, exist_ok=True)
    limit_memory()
    if name == "command-line":
        return list(command_lines(seed, count))
    return list(foreign_files(name, seed, count, folder))


def limit_memory() -> None:
    """Allocations beyond MEMORY fail from now on."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"reading took more than {SECONDS} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    faults = faults_of(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    print("\n" + json.dumps({"faults": faults}))
