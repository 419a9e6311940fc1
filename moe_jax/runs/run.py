"""A training run as a user starts it: teacher, training, report."""

from pathlib import Path

from moe_jax.base.files import disk_errors, only_process
from moe_jax.config import TrainConfig
from moe_jax.runs.report import write_report
from moe_jax.runs.teacher import with_teacher
from moe_jax.train.loop import check, train


def run_training(config: TrainConfig) -> Path:
    """Runs `config` to its last step and writes the report; returns the run's folder.

    Raises UserError for anything the person at the keyboard can mend, before compiling.
    """
    config, teacher = with_teacher(config)
    out = check(config, teacher)
    with only_process(out):
        summary = train(config, out, teacher)
        with disk_errors(out):
            write_report(summary)
    return out
