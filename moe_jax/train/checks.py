"""Checks before a run begins or goes on. They raise UserError before anything is compiled."""

from pathlib import Path

import jax
from moe_kernels.experts_async import misfit
from moe_kernels.launch import async_support, fp8_support, triton_support

from moe_jax.base.console import say
from moe_jax.base.errors import UserError
from moe_jax.base.machine import available_bytes, require_memory, require_space
from moe_jax.base.result import output_folder
from moe_jax.config import ModelConfig, TrainConfig, from_dict, settings_that_must_match
from moe_jax.config.learning import not_trained
from moe_jax.model.attention import check_attention
from moe_jax.model.dtype import compute_dtype
from moe_jax.moe.implementation import implementation, missing_kernels, obstacle
from moe_jax.train.activations import evaluation_bytes, training_bytes
from moe_jax.train.checkpoint import Extra
from moe_jax.train.engine import Engine
from moe_jax.train.engines import engine_kind
from moe_jax.train.logs import check_log
from moe_jax.train.state import abstract_state, tree_bytes
from moe_jax.train.task import Task


def check(engine: Engine, task: Task) -> Path:
    """Checks settings, memory and disk. Returns the run's folder, which it creates if need be.

    UserError: anything that the user can mend, in one line.
    """
    config = task.config
    engine.check()
    check_log(config)
    check_kernels(config)
    check_attention(config.model, config.data.length)
    for part, reason in not_trained(config.model).items():
        say(f"not trained: {part} ({reason})")
    check_memory(config, engine.mesh.size, engine.memory_bytes() + task.memory_bytes())
    out = output_folder(config.out)
    # `keep` checkpoints or as many as there will be, the best one, and the one being written.
    saves = config.last_step // config.checkpoint.every + config.last_step // config.evaluate_every
    checkpoints = (min(config.checkpoint.keep, saves) + 2) * tree_bytes(abstract_state(config))
    needed = engine.disk_bytes(out)
    # One check for each folder: two that pass by themselves may not fit together.
    require_space(out, checkpoints + needed.pop(out, 0))
    for folder, size in needed.items():
        require_space(output_folder(str(folder), "--placement.folder"), size)
    return out


def check_memory(config: TrainConfig, devices: int, state: int) -> None:
    """UserError: `state` bytes on each device do not fit, or the activations beside them do not.

    What activations need at least is said in train.activations.
    """
    require_memory(config.preset, state)
    available = available_bytes()
    training = training_bytes(config, devices)
    evaluation = evaluation_bytes(config, devices)
    needed = max(training, evaluation)
    if available is None or state + needed <= available:
        return
    # More micro-batches make an update smaller, and an evaluation not.
    smaller = config.optim.accumulation < config.batch and state + evaluation <= available
    accumulate = ", or raise --optim.accumulation" if smaller else ""
    raise UserError(
        f"batch={config.batch} of data.length={config.data.length} needs at least "
        f"{needed / 1e9:,.1f} GB for activations on each device, which has "
        f"{(available - state) / 1e9:,.1f} GB for them: lower --batch or --data.length{accumulate}"
    )


def check_kernels(config: TrainConfig) -> None:
    """Checks that the experts' implementation can run.

    One named explicitly is never replaced. FP8 is emulated on a GPU only if xla was named.
    """
    moe = config.model.moe
    named = moe.implementation == "triton"
    if named and (problem := obstacle(triton_support())):
        raise UserError(f"model.moe.implementation triton cannot run: {problem}; use auto or xla")
    if moe.implementation == "triton_async":
        check_async(config.model)
    chosen = implementation(moe.implementation, moe.precision)  # it says where `auto` falls back
    if hint := missing_kernels(moe.implementation):
        say(hint)
    if moe.precision != "fp8":
        return
    on_gpu = moe.implementation == "auto" and jax.default_backend() == "gpu"
    if (named or on_gpu) and (problem := obstacle(fp8_support())):
        raise UserError(
            f"model.moe.precision fp8 cannot run: {problem}; use precision compute, or "
            "implementation xla, which emulates it"
        )
    if chosen == "xla":
        say("FP8 products are emulated in float32 here: their numerics, not their speed")


def check_async(model: ModelConfig) -> None:
    """Raises UserError where the asynchronous products cannot run, here or at these widths."""
    support = async_support()
    problem = support.reason if support.name == "none" else ""
    problem = problem or misfit(compute_dtype(model), model.width, model.moe.expert_hidden)
    if problem:
        raise UserError(
            f"model.moe.implementation triton_async cannot run: {problem}; use auto or triton"
        )


LENGTH = ("steps", "continue_to")
"""Settings that a continued run may change where the learning rate allows it (check_length)."""


def check_same_run(config: TrainConfig, saved: Extra, out: Path) -> None:
    """Raises UserError if a setting that matters differs from the run in `out`.

    `saved` is what the checkpoint holds beside the state.
    """
    old = from_dict(TrainConfig, saved["config"])
    # Budgets may change, but a checkpoint with tiers has its experts in files of their own.
    mine = engine_kind(config).described
    its = engine_kind(old).described
    if mine != its:
        raise UserError(
            f"{out} holds a run {its}, and this one is {mine}: a run goes on as it began, choose "
            "another --out"
        )
    before = settings_that_must_match(old)
    for name, value in settings_that_must_match(config).items():
        if name not in LENGTH and before[name] != value:
            raise UserError(
                f"{out} holds a run with {name}={before[name]}, not {value}: choose another --out"
            )
    check_length(config, old, saved.get("step"), out)


def check_length(config: TrainConfig, old: TrainConfig, step: int | None, out: Path) -> None:
    """Raises UserError if the updates up to `step` would have been others in a run of this length.

    The warm-up is excepted: a run at the peak goes on, though its warm-up was of another length.
    """
    if (config.steps, config.continue_to) == (old.steps, old.continue_to):
        return
    holds = f"{out} holds a run at step {step} of {old.last_step}"
    if step is not None and step > config.last_step:
        raise UserError(
            f"{holds}, beyond the {config.last_step} that are asked for: give the same steps "
            "again, or choose another --out"
        )
    if step is None or not _goes_on(config, old, step):
        raise UserError(
            f"{holds}, whose learning rate follows that length: give --steps {old.steps} "
            "--continue-to N, which warms up and decays once more, or choose another --out"
        )


def _goes_on(config: TrainConfig, old: TrainConfig, step: int) -> bool:
    """Whether the learning rate up to `step` is that of both lengths, or stands at the peak."""
    if config.steps == old.steps and step <= config.steps:
        return True  # what comes after `steps` has not begun
    if config.steps == old.steps and config.continue_to and old.continue_to:
        ends = (config.continue_to, old.continue_to)
        return all(config.optim.is_at_peak(step - config.steps, e - config.steps) for e in ends)
    if config.continue_to or old.continue_to:
        return False
    return all(config.optim.is_at_peak(step, steps) for steps in (config.steps, old.steps))


def check_same_task(mine: str | None, saved: str | None, out: Path) -> None:
    """Raises UserError unless the run in `out` had the same teacher, by Task.fingerprint."""
    if mine == saved:
        return
    if saved is None or mine is None:
        what = "without a teacher" if saved is None else "with one: give --distill.teacher"
    else:
        what = "with another one: the teacher has changed since; restore it"
    raise UserError(f"{out} holds a run {what}, or choose another --out")
