"""Mutated files of others, and mutated command lines: read as they are, or one line."""

import json
import random
from pathlib import Path

from tests.campaign.bench import LIMIT, Bench

NAMES = (
    *("gguf", "command-line", "qwen3_moe", "trace", "npy", "jsonl", "journal", "tokenizer"),
    *("config", "llama"),
)
"""Command lines, and the readers of tests/fuzz/readers.py, which takes seconds to import."""
COUNT = 100
"""Mutants of a trial."""


def trial(bench: Bench, rng: random.Random, place: Path, number: int) -> int:
    """COUNT mutants of one kind, read in one process."""
    name = NAMES[number % len(NAMES)]
    seed = rng.randrange(1 << 30)
    arguments = [name, str(seed), str(COUNT), str(place)]
    script = "tests/campaign/mutants.py"
    program = bench.start(place, arguments, script=script).wait(LIMIT)
    last = program.output().strip().rpartition("\n")[2]
    command = f"python {script} {name} {seed} {COUNT} FOLDER"
    assert program.code == 0, (
        f"{command} ended with {program.code}: {program.error_output()[-800:]}"
    )
    faults = json.loads(last)["faults"]
    assert not faults, f"{len(faults)} kinds of faults ({command}): " + " | ".join(faults[:4])
    return COUNT
