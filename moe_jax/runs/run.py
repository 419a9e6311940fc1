"""A training run as a user starts it: teacher, training, report."""

from pathlib import Path

from moe_jax.base.files import disk_errors, only_process
from moe_jax.config import TrainConfig
from moe_jax.runs.report import write_report
from moe_jax.runs.teacher import task_of
from moe_jax.train.checks import check
from moe_jax.train.engines import engine_of
from moe_jax.train.loop import train


def run_training(config: TrainConfig) -> Path:
    """Runs `config` to its last step and writes the report. Returns the run's folder.

    UserError: anything that the user can mend. It is raised before compiling.
    """
    # The task first, because a teacher's tokenizer decides the vocabulary that the engine needs.
    task = task_of(config)
    engine = engine_of(task.config)
    out = check(engine, task)
    with only_process(out):
        summary = train(task, engine, out)
        with disk_errors(out):
            write_report(summary)
    return out
