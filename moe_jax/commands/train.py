"""Trains a mixture-of-experts language model, and continues a run that was interrupted.

    python experiments/train.py [PRESET] [--out DIR] [--seed N] [--steps N] [--FIELD VALUE …]

Without arguments it trains the preset `tiny` on the text of Python's own standard library. `--help`
lists every field. `--quick` stands for a run of under a minute. `--distill.teacher` names a teacher
to learn from: smollm2, a GGUF file, a folder of safetensors, or a run's folder. The same command
continues a killed run, and its results are bit for bit those of an uninterrupted one.
"""

import hashlib
import sys
from dataclasses import replace

from moe_jax.base.process import leave, named
from moe_jax.base.provenance import call_of
from moe_jax.cli import command_line, parse
from moe_jax.config import ParallelConfig, ProcessesConfig, TrainConfig
from moe_jax.config.presets import PRESETS
from moe_jax.runs.run import run_training
from moe_jax.train.loop import DivergedError

QUICK = ("--steps", "40", "--evaluate-every", "40", "--checkpoint.every", "20")

DESCRIPTION = f"""Trains a mixture-of-experts language model, and continues a run that was stopped.

--quick stands for {" ".join(QUICK)}: a run of under a minute. Other options prevail over these."""


def with_quick(argv: list[str]) -> list[str]:
    """Replaces --quick by the options in QUICK, before all other options so that those prevail."""
    rest = [word for word in argv if word != "--quick"]
    if rest == argv:
        return argv
    # The preset, if there is one, must stay the first word.
    named = 1 if rest and not rest[0].startswith("-") else 0
    return [*rest[:named], *QUICK, *rest[named:]]


def default_out(config: TrainConfig) -> str:
    """runs/PRESET-HASH: one folder for each set of settings."""
    # A longer run is the same run, and so is one on other devices, and any run at a constant
    # learning rate.
    own = {"parallel": ParallelConfig(), "processes": ProcessesConfig()}
    same = replace(config, continue_to=0, log="none", profile=0, **own)
    if config.optim.schedule == "constant":
        same = replace(same, steps=PRESETS[config.preset].steps)
    command = command_line(same, PRESETS[config.preset])
    return f"runs/{config.preset}-{hashlib.sha256(command.encode()).hexdigest()[:8]}"


def read_command(argv: list[str]) -> TrainConfig:
    """The settings of a run, with its folder. Errors as in cli.parse."""
    prog = call_of("train")
    config = parse(with_quick(argv), PRESETS, description=DESCRIPTION, prog=prog)
    return config if config.out else replace(config, out=default_out(config))


def main(argv: list[str]) -> None:
    """Parses, trains, reports."""
    config = read_command(argv)
    try:
        run_training(config)
    except DivergedError as stop:
        print(named(f"error: {stop}"), file=sys.stderr)
        leave(1)
