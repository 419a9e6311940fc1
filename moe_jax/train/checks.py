"""Checks before a run begins or goes on. They raise UserError before anything is compiled."""

from pathlib import Path
from typing import Any

import jax
from moe_kernels.launch import fp8_support, triton_support

from moe_jax.base.console import say
from moe_jax.base.errors import UserError
from moe_jax.base.machine import require_memory, require_space
from moe_jax.base.result import output_folder
from moe_jax.config import TrainConfig, from_dict, settings_that_must_match
from moe_jax.config.learning import not_trained
from moe_jax.model.attention import check_attention
from moe_jax.moe.implementation import implementation
from moe_jax.train.engine import Engine
from moe_jax.train.engines import engine_of
from moe_jax.train.state import abstract_state, tree_bytes
from moe_jax.train.task import Task


def check(engine: Engine, task: Task) -> Path:
    """Checks settings, memory and disk. Returns the run's folder, which it creates if need be.

    UserError: anything that the user can mend, in one line.
    """
    config = task.config
    engine.check()
    check_kernels(config)
    check_attention(config.model, config.data.length)
    for part, reason in not_trained(config.model).items():
        say(f"not trained: {part} ({reason})")
    require_memory(config.preset, engine.memory_bytes() + task.memory_bytes())
    out = output_folder(config.out)
    # `keep` checkpoints, the best one, and the one that is being written.
    checkpoints = (config.checkpoint.keep + 2) * tree_bytes(abstract_state(config))
    needed = engine.disk_bytes(out)
    # One check for each folder: two that pass by themselves may not fit together.
    require_space(out, checkpoints + needed.pop(out, 0))
    for folder, size in needed.items():
        require_space(output_folder(str(folder)), size)
    return out


def check_kernels(config: TrainConfig) -> None:
    """Checks that the experts' implementation can run.

    One named explicitly is never replaced. FP8 is emulated on a GPU only if xla was named.
    """
    moe = config.model.moe
    support = triton_support()
    if moe.implementation == "triton" and support.name == "none":
        raise UserError(
            f"model.moe.implementation triton cannot run: {support.reason}; use auto or xla"
        )
    if moe.precision != "fp8":
        return
    fp8 = fp8_support()
    on_gpu = moe.implementation == "auto" and jax.default_backend() == "gpu"
    if fp8.name == "none" and (moe.implementation == "triton" or on_gpu):
        raise UserError(
            f"model.moe.precision fp8 cannot run: {fp8.reason}; use precision compute, or "
            "implementation xla, which emulates it"
        )
    if implementation(moe.implementation, moe.precision) == "xla":
        say("FP8 products are emulated in float32 here: their numerics, not their speed")


def check_same_run(config: TrainConfig, saved: dict[str, Any], out: Path) -> None:
    """Raises UserError if a setting that matters differs from the run in `out`."""
    old = from_dict(TrainConfig, saved)
    # Budgets may change, but a checkpoint with tiers has its experts in files of their own.
    mine = engine_of(config).described
    its = engine_of(old).described
    if mine != its:
        raise UserError(
            f"{out} holds a run {its}, and this one is {mine}: a run goes on as it began, choose "
            "another --out"
        )
    before = settings_that_must_match(old)
    for name, value in settings_that_must_match(config).items():
        if before[name] != value:
            raise UserError(
                f"{out} holds a run with {name}={before[name]}, not {value}: choose another --out, "
                "or remove that folder to start over"
            )


def check_same_task(mine: str | None, saved: str | None, out: Path) -> None:
    """Raises UserError unless the run in `out` had the same teacher, by Task.fingerprint."""
    if mine == saved:
        return
    if saved is None or mine is None:
        what = "without a teacher" if saved is None else "with one: give --distill.teacher"
    else:
        what = "with another one: the teacher has changed since; restore it"
    raise UserError(f"{out} holds a run {what}, or choose another --out")
