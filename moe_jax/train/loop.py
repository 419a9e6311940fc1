"""A training run from its config to its last step, continuing what is there."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from moe_kernels.launch import fp8_support, triton_support

from moe_jax.base.console import say
from moe_jax.base.errors import UserError
from moe_jax.base.files import disk_errors
from moe_jax.base.machine import gemm_rate, require_memory, require_space
from moe_jax.base.result import output_folder
from moe_jax.config import TrainConfig, from_dict, settings_that_must_match
from moe_jax.data.batches import train_batches
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokens import TokenData, prepare
from moe_jax.distill.teacher import Teacher
from moe_jax.model.count import train_flops_per_token
from moe_jax.moe.layer import implementation
from moe_jax.objectives.next_token import Batch, losses
from moe_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from moe_jax.train import teacher as teaching
from moe_jax.train.checkpoint import VALIDATION, Checkpoints
from moe_jax.train.engines.tiered.engine import (
    check_tiers,
    device_bytes,
    open_experts,
    sampling_state,
    save_experts,
    shelf_bytes,
)
from moe_jax.train.engines.tiered.step import TieredStep
from moe_jax.train.engines.tiered.store import TieredExperts
from moe_jax.train.engines.tiered.trunk import init_trunk
from moe_jax.train.evaluate import make_evaluator
from moe_jax.train.metrics import MetricsFile, describe
from moe_jax.train.progress import Display, Speedometer
from moe_jax.train.step import (
    Metrics,
    TrainState,
    init_state,
    make_step,
    state_bytes,
)
from moe_jax.train.teacher import (
    Lesson,
    identity,
    require_same_teacher,
    teacher_bytes,
)


class DivergedError(Exception):
    """Too many non-finite updates in a row; the last good checkpoint is kept."""


@dataclass(frozen=True)
class RunSummary:
    """What a run ends with, beside its files."""

    config: TrainConfig
    out: Path
    data: TokenData
    state: TrainState
    compile_seconds: float
    gemm_rate: float
    """FLOP/s of a plain GEMM on all devices, measured when the run started."""
    flops_per_token: float


def check(config: TrainConfig, teacher: Teacher | None) -> Path:
    """The run's folder, made if need be. UserError for anything that the person at the keyboard
    can mend, before compiling."""
    tiered, size = config.placement.tiered, state_bytes(config)
    if tiered:
        check_tiers(config)
    else:
        check_devices(config)
    check_kernels(config)
    held = device_bytes(config) if tiered else size + teacher_bytes(teacher)
    require_memory(config.preset, held)
    out = output_folder(config.out)
    copies = config.checkpoint.keep + 2
    elsewhere = Path(config.placement.folder) if tiered and config.placement.folder else out
    shelf = shelf_bytes(config) if tiered else 0
    require_space(out, copies * size + (shelf if elsewhere == out else 0))
    if elsewhere != out:
        require_space(output_folder(str(elsewhere)), shelf)
    return out


def train(config: TrainConfig, out: Path, teacher: Teacher | None) -> RunSummary:
    """Runs `config`, which `check` has passed, to its last step. The caller holds the folder
    (only_process)."""
    checkpoints = Checkpoints(out, config.checkpoint)
    try:
        saved = checkpoints.peek(say)
        fingerprint = identity(teacher)
        if saved is not None:
            require_same_teacher(fingerprint, saved[1].get("teacher"), out)
            check_same_run(config, saved[1]["config"], out)
        data = prepare_data(config, saved and saved[1], teacher and teacher.tokenizer)
        say(describe_data(data))
        lesson = teacher and teaching.prepare(config, teacher, fingerprint or "", data)
        mesh = make_mesh(1 if config.placement.tiered else None)
        with jax.set_mesh(mesh):
            run = start(config, out, data, mesh, checkpoints, lesson)
            with closing(run):
                with disk_errors(out):
                    run_steps(run)
                    checkpoints.wait()
                return run.summary()
    finally:
        checkpoints.close()


def check_kernels(config: TrainConfig) -> None:
    """An implementation asked for by name must be able to run, and FP8 is not emulated unasked
    where there is a GPU."""
    moe, support = config.model.moe, triton_support()
    if moe.implementation == "triton" and support.name == "none":
        raise UserError(
            f"model.moe.implementation triton cannot run: {support.reason}; use auto or xla"
        )
    if moe.precision != "fp8":
        return
    fp8, asked = fp8_support(), moe.implementation
    on_gpu = asked == "auto" and jax.default_backend() == "gpu"
    if fp8.name == "none" and (asked == "triton" or on_gpu):
        raise UserError(
            f"model.moe.precision fp8 cannot run: {fp8.reason}; use precision compute, or "
            "implementation xla, which emulates it"
        )
    if implementation(moe.implementation, moe.precision) == "xla":
        say("FP8 products are emulated in float32 here: their numerics, not their speed")


def check_devices(config: TrainConfig) -> None:
    """Every micro-batch must split evenly over the devices, every batch over the processes."""
    devices, parts = jax.device_count(), config.optim.accumulation
    if config.batch // parts % devices:
        raise UserError(
            f"batch={config.batch} in optim.accumulation={parts} parts does not divide over "
            f"{devices} devices: make batch a multiple of {devices * parts}"
        )


def check_same_run(config: TrainConfig, saved: dict[str, Any], out: Path) -> None:
    """Raises UserError if a setting that matters differs from the run in `out`."""
    old = from_dict(TrainConfig, saved)
    if old.placement.tiered != config.placement.tiered:
        raise UserError(
            f"{out} holds a run {'with' if old.placement.tiered else 'without'} "
            "placement.device_budget: it may be given another one, but tiers cannot be turned on "
            "or off, choose another --out"
        )
    before = settings_that_must_match(old)
    for name, value in settings_that_must_match(config).items():
        if before[name] != value:
            raise UserError(
                f"{out} holds a run with {name}={before[name]}, not {value}: choose another --out, "
                "or remove that folder to start over"
            )


def prepare_data(
    config: TrainConfig, saved: dict[str, Any] | None, tokenizer: Tokenizer | None = None
) -> TokenData:
    """The token arrays; a continued run keeps its own tokenizer and insists on its own text. A new
    one takes the given tokenizer, a teacher's."""
    if saved is None:
        return prepare(config.data, tokenizer, say=say)
    data = prepare(config.data, Tokenizer.from_json(saved["tokenizer"]), say=say)
    if data.fingerprint != saved["data_fingerprint"]:
        raise UserError(
            f"the text of data.source '{config.data.source}' has changed since this run began "
            f"({saved['data_stats']['train']['bytes']} bytes of training text then, "
            f"{data.stats['train']['bytes']} now): restore it, or choose another --out"
        )
    return data


def describe_data(data: TokenData) -> str:
    """One line: sizes of the two splits."""
    parts = (
        f"{name} {s['documents']} documents, {s['bytes'] / 1e6:.1f} MB, {s['tokens']} tokens"
        for name in ("train", "validation")
        for s in [data.stats[name]]
    )
    return "; ".join(parts)


@dataclass
class Run:
    """A run under way: what run_steps needs."""

    config: TrainConfig
    out: Path
    data: TokenData
    checkpoints: Checkpoints
    state: TrainState
    batches: Any
    place: Callable[[Batch], Batch]
    step: Callable[..., Any]
    evaluate: Callable[[TrainState], float]
    compile_seconds: float
    gemm_rate: float
    flops_per_token: float
    experts: TieredExperts | None = None
    """Those that live in tiers; `state` is then without them."""
    lesson: Lesson | None = None

    def summary(self) -> RunSummary:
        """What the report needs."""
        config, state = self.config, self.state
        if self.experts is not None and config.samples:
            whole = sampling_state(self.experts, state)
            if whole is None:
                say(
                    "no samples: all experts are more than placement.device_budget has left; "
                    f"experiments/complete.py --run {self.out} writes within it"
                )
                config = dataclasses.replace(config, samples=0)
            state = whole or state
        return RunSummary(
            config,
            self.out,
            self.data,
            jax.tree.map(lambda leaf: leaf.addressable_data(0), state),
            self.compile_seconds,
            self.gemm_rate,
            self.flops_per_token,
        )

    def moved(self, step: int) -> dict[str, Any]:
        """What an update moved between tiers, for its line of metrics."""
        return self.step.lines.pop(step, {}) if isinstance(self.step, TieredStep) else {}

    def close(self) -> None:
        """Lets go of the tiers."""
        if self.experts is not None:
            self.experts.close()


def start(
    config: TrainConfig,
    out: Path,
    data: TokenData,
    mesh: Mesh,
    checkpoints: Checkpoints,
    lesson: Lesson | None = None,
) -> Run:
    """Fresh or restored state, the batch iterator at the same place, and the compiled step."""
    ahead = config.model.mtp_depth
    batches = train_batches(
        data.train,
        config.data.length,
        config.batch,
        config.seed,
        ahead=ahead,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        beside=lesson and lesson.cache,
    )
    tiered = config.placement.tiered
    initial = init_trunk if tiered else init_state
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(lambda: initial(config)),
    )
    restored = checkpoints.restore(shapes, say)
    if restored is None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        state = jax.jit(lambda: initial(config), out_shardings=shardings)()
        state = lesson.first_state(state) if lesson else state
    else:
        state = restored.state
        batches.set_state(restored.extra["data_state"])
        say(f"continuing after step {restored.step} of {config.steps} in {out}")

    sharding = batch_sharding(mesh)

    def place(batch: Batch) -> Batch:
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
        )

    row = jax.ShapeDtypeStruct(
        (config.batch, config.data.length + 1 + ahead), jnp.int32, sharding=sharding
    )
    begin, experts = time.perf_counter(), None
    rows, objective, more = {"tokens": row, "segments": row}, losses, ()
    if lesson is not None:
        rows |= lesson.rows(row)
        objective, more = lesson.objective, lesson.arguments(mesh)
    step: Any
    if tiered:
        folder = restored and checkpoints.directory / str(restored.step)
        with disk_errors(out):
            experts = open_experts(config, out, folder, int(state.updates))
        step = TieredStep(config, experts)
        compile_seconds = step.compile(state, rows)
        evaluate = step.evaluator(data.validation, place)
    else:
        jitted = jax.jit(make_step(config, objective), donate_argnums=0)
        step = jitted.lower(shapes, rows, *more).compile()
        compile_seconds = time.perf_counter() - begin
        evaluate = make_evaluator(config, data.validation, place)
    rate = gemm_rate(config.model.compute_dtype) * jax.device_count()
    say(f"compiled in {compile_seconds:.1f} s; a plain GEMM here runs at {rate / 1e9:,.0f} GFLOP/s")
    flops = train_flops_per_token(config.resolved_model(), config.data.length)
    if lesson is not None:
        step = lesson.taught(step, more, mesh, int(state.step))
        flops += lesson.flops_per_token()
    return Run(
        config, out, data, checkpoints, state, batches, place, step, evaluate,
        compile_seconds, rate, flops, experts, lesson,
    )  # fmt: skip


def run_steps(run: Run) -> None:
    """All remaining updates. The metrics of one are read while the next one computes."""
    config, first = run.config, int(run.state.step)
    speed = Speedometer(config.batch * config.data.length, config.steps)
    lines = MetricsFile(run.out / "metrics.jsonl", resume_after=first)
    with Display(config.steps, plain_every=max(1, config.steps // 20)) as display:

        def finish(step: int, metrics: Metrics) -> None:
            line = describe(step, metrics, with_load=_load_due(step, config)) | run.moved(step)
            speed.tick(line)
            if _evaluation_due(step, config):
                line[VALIDATION] = run.evaluate(run.state)
                speed.pause()
            lines.write(line)
            utilisation = speed.tokens_per_second * run.flops_per_token / run.gemm_rate
            display.show(line, speed, utilisation)
            _check_finite(run, line)
            if _save_due(step, config) and not line["skipped_in_a_row"]:
                lines.sync()
                _save(run, step, line.get(VALIDATION))

        unread: tuple[int, Metrics] | None = None
        for step in range(first + 1, config.steps + 1):
            run.state, metrics = run.step(run.state, run.place(next(run.batches)))
            run.checkpoints.poll()
            if unread is not None:
                finish(*unread)
            unread = (step, metrics)
            if _save_due(step, config):  # the state of this very step is wanted
                finish(*unread)
                unread = None
    lines.close()


def _evaluation_due(step: int, config: TrainConfig) -> bool:
    return step % config.evaluate_every == 0 or step == config.steps


def _save_due(step: int, config: TrainConfig) -> bool:
    return _evaluation_due(step, config) or step % config.checkpoint.every == 0


def _load_due(step: int, config: TrainConfig) -> bool:
    """About a hundred snapshots of the expert load over the run."""
    return step % max(1, config.steps // 100) == 0 or step == 1


def _check_finite(run: Run, line: dict[str, Any]) -> None:
    """Says when an update was skipped; gives up after optim.max_skipped in a row."""
    skipped = line["skipped_in_a_row"]
    if not skipped:
        return
    say(f"step {line['step']}: loss {line['loss']}, update skipped ({skipped} in a row)")
    if skipped >= run.config.optim.max_skipped:
        run.checkpoints.wait()
        raise DivergedError(
            f"stopped at step {line['step']}: {skipped} updates in a row were not finite; the last "
            f"good checkpoint in {run.checkpoints.directory} is kept (lower optim.learning_rate "
            "or raise optim.warmup, and choose another --out)"
        )


def _save(run: Run, step: int, bits: float | None) -> None:
    extra = {
        "config": dataclasses.asdict(run.config),
        "tokenizer": run.data.tokenizer.to_json(),
        "data_fingerprint": run.data.fingerprint,
        "data_stats": run.data.stats,
        "data_state": run.batches.get_state(),
    } | ({"teacher": run.lesson.fingerprint} if run.lesson else {})
    beside = run.experts and save_experts(run.experts, run.out, step)
    run.checkpoints.save(step, run.state, extra, bits, beside)
