"""Which settings of an experiment are best? A hyper-parameter search over any of its fields.

    python experiments/sweep.py train --search model.moe.experts=8,16 \\
        --search optim.learning-rate=log:1e-4..1e-2 --trials 20 --steps 100
    python experiments/sweep.py experiments/schedules.py --search devices=2,4,8 --objective NAME

EXPERIMENT is train, or the path of an experiment's script. Fields that depend on each other are
searched together, each choice with a value for each of them:
--search model.moe.gate+model.moe.bias-rate=softmax+0,sigmoid+0.001

Every trial is a run of the experiment with its own folder DIR/trial-NNNN. Options that are not the
sweep's own go to every trial. The same command continues a sweep up to its number of trials.
No settings run twice, and a sweep ends when it has tried every combination. More workers are more
such commands with the same --out, or with the same --storage on any machine.
"""

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

from moe_jax.base.errors import UserError, reading
from moe_jax.base.files import write_atomically
from moe_jax.base.provenance import call_of
from moe_jax.base.signals import STOPPING
from moe_jax.config import require
from moe_jax.config.presets import PRESETS
from moe_jax.study.sweep.command import Experiment, Sweep, parse_sweep
from moe_jax.study.sweep.figures import plot
from moe_jax.study.sweep.locks import database_errors
from moe_jax.study.sweep.report import best_commands, summarise, write_table
from moe_jax.study.sweep.storage import Shared, open_shared
from moe_jax.study.sweep.trials import completed, finished
from moe_jax.study.sweep.worker import work

# -P: Python files in the folder that the sweep was started from do not hide modules.
TRAIN = ("-P", "-m", "moe_jax", "train")
EXPERIMENTS = {"train": Experiment(TRAIN, call_of("train"), PRESETS["tiny"], PRESETS)}
"""By the names that the command line takes."""
PORT = 8080


def find_experiment(name: str) -> Experiment:
    """An experiment by its name or by the path of its script. UserError: there is none."""
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    script = Path(name)
    require(
        script.suffix == ".py" and script.is_file(),
        f"unknown experiment '{name}': start with one of {', '.join(EXPERIMENTS)}, or with the "
        "path of an experiment's script",
    )
    spec = importlib.util.spec_from_file_location("swept", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with reading(script, "an experiment is imported to see its settings"):
        spec.loader.exec_module(module)
    require(hasattr(module, "Settings"), f"{script} has no class Settings: it is no experiment")
    return Experiment((str(script.resolve()),), f"python {script}", module.Settings())


def main(argv: list[str]) -> None:
    """Reads the command line, runs trials, reports."""
    sweep = parse_sweep(argv, find_experiment, __doc__)
    require(
        importlib.util.find_spec("optuna") is not None,
        "a sweep needs Optuna, which is not installed: pip install 'moe_jax[sweep]'",
    )
    with database_errors(sweep.config.storage):
        if sweep.config.dashboard:
            show_dashboard(sweep)
        else:
            run(sweep)


def run(sweep: Sweep) -> None:
    """Runs trials up to the sweep's number, and reports."""
    wanted = sweep.config.trials
    if sweep.size is not None and wanted is not None and sweep.size < wanted:
        print(f"the search has {sweep.size} combinations, so the sweep has no more trials")
    shared = open_shared(sweep)
    work(shared, sweep)
    report(shared, sweep)


def report(shared: Shared, sweep: Sweep) -> None:
    """Writes the files of the sweep, and prints its verdict and the best command lines."""
    study = shared.study
    # Another worker may have finished the last trial after this one wrote its table.
    write_table(study, sweep)
    if not completed(study, sweep):
        error = finished(study)[0].user_attrs["error"]
        raise UserError(f"none of the {sweep.trials} trials gave a value; the first: {error}")
    plot(study, sweep)
    result: dict[str, Any] = summarise(study, sweep)
    write_atomically(sweep.out / "result.json", json.dumps(result, indent=1) + "\n")
    print(result["verdict"], *best_commands(study, sweep), f"results: {sweep.out}", sep="\n")


def show_dashboard(sweep: Sweep) -> None:
    """Serves Optuna's dashboard of the sweep until Ctrl-C. UserError: it is not installed."""
    require(
        importlib.util.find_spec("optuna_dashboard") is not None,
        "--dashboard needs optuna-dashboard, which is not installed: pip install optuna-dashboard",
    )
    from optuna_dashboard import run_server

    storage = open_shared(sweep).storage
    print(f"the sweep {sweep.out} is at http://localhost:{PORT} until Ctrl-C", flush=True)
    for number in STOPPING:
        # The server swallows what our handlers raise, and it has nothing to save.
        signal.signal(number, signal.SIG_DFL)
    run_server(storage, host="localhost", port=PORT)
