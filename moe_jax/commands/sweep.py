"""Which settings of an experiment are best? A hyper-parameter search over any of its fields.

python experiments/sweep.py train --search model.moe.experts=8,16 \\
    --search optim.learning-rate=log:1e-4..1e-2 --trials 20 --steps 100

Fields that depend on each other are searched together, each choice with a value for each of them:
--search model.moe.gate+model.moe.bias-rate=softmax+0,sigmoid+0.001

Every trial is a run of the experiment with its own folder DIR/trial-NNNN. Options that are not the
sweep's own go to every trial. The same command continues a sweep up to its number of trials.
No settings run twice, and a sweep ends when it has tried every combination. More
workers are more such commands with the same --out.
"""

import importlib.util
import json

from moe_jax.base.errors import UserError
from moe_jax.base.files import write_atomically
from moe_jax.config import require
from moe_jax.config.presets import PRESETS
from moe_jax.study.sweep.command import Experiment, parse_sweep
from moe_jax.study.sweep.report import best_command, plot, summarise, write_table
from moe_jax.study.sweep.trials import completed, finished, open_study
from moe_jax.study.sweep.worker import work

EXPERIMENTS = {"train": Experiment(("-m", "moe_jax", "train"), PRESETS)}


def main(argv: list[str]) -> None:
    """Reads the command line, runs trials, reports."""
    sweep = parse_sweep(argv, EXPERIMENTS, __doc__)
    require(
        importlib.util.find_spec("optuna") is not None,
        "a sweep needs Optuna, which is not installed: pip install 'moe_jax[sweep]'",
    )
    if sweep.size is not None and sweep.size < sweep.config.trials:
        print(f"the search has {sweep.size} combinations, so the sweep has no more trials")
    study = open_study(sweep)
    work(study, sweep)
    # Another worker may have finished the last trial after this one wrote its table.
    write_table(study, sweep)
    if not completed(study):
        error = finished(study)[0].user_attrs["error"]
        raise UserError(f"none of the {sweep.trials} trials gave a value; the first: {error}")
    plot(study, sweep)
    result = summarise(study, sweep)
    write_atomically(sweep.out / "result.json", json.dumps(result, indent=1) + "\n")
    print(result["verdict"], best_command(study, sweep), f"results: {sweep.out}", sep="\n")
