"""Trains a mixture-of-experts language model, and continues a run that was interrupted.

    python experiments/train.py [PRESET] [--out DIR] [--seed N] [--steps N] [--FIELD VALUE …]

Without arguments: the preset `tiny` on the text of Python's own standard library. `--help` lists
every field. The same command continues a killed run; the results are bit for bit those of an
uninterrupted one.
"""

import hashlib
import sys
from dataclasses import replace

from moe_jax.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from moe_jax.cli import command_line, parse, program
from moe_jax.config import TrainConfig
from moe_jax.presets import PRESETS
from moe_jax.train.loop import DivergedError, train


def default_out(config: TrainConfig) -> str:
    """runs/PRESET-HASH: one folder for each set of settings."""
    command = command_line(config, PRESETS[config.preset])
    return f"runs/{config.preset}-{hashlib.sha256(command.encode()).hexdigest()[:8]}"


def main(argv: list[str]) -> None:
    """Parses, trains, reports."""
    config = parse(argv, PRESETS, description=(__doc__ or "").splitlines()[0])
    if not config.out:
        config = replace(config, out=default_out(config))
    try:
        train(config)
    except DivergedError as stop:
        print(f"error: {stop}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    program(main)
