"""A training run from its config to its last step, continuing what is there."""

import dataclasses
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_jax.base import process
from moe_jax.base.console import say, working
from moe_jax.base.files import disk_errors
from moe_jax.base.machine import GemmRates, gemm_rate
from moe_jax.base.signals import StopRequest, stop_request
from moe_jax.config import TrainConfig
from moe_jax.data.batches import train_batches
from moe_jax.data.tokens import TokenData
from moe_jax.model.dtype import compute_dtype
from moe_jax.parallel.exchange import exchanging
from moe_jax.parallel.processes import ALONE, Peers
from moe_jax.train.checkpoint import VALIDATION, Checkpoints, Extra, Restored
from moe_jax.train.checks import check_same_run, check_same_task
from moe_jax.train.engine import Engine
from moe_jax.train.logs import NoLog, open_log
from moe_jax.train.metrics import MetricsFile, NoMetricsFile, describe, read_lines
from moe_jax.train.profile import StepTrace
from moe_jax.train.progress import Display, Speedometer, elapsed_until
from moe_jax.train.state import Metrics, TrainState
from moe_jax.train.task import Task
from moe_jax.train.text import describe_data, prepare_data, require_same_text


class DivergedError(Exception):
    """Too many non-finite updates in a row. The last good checkpoint is kept."""


@dataclass(frozen=True)
class RunSummary:
    """The results of a run that its files do not hold. runs.report writes the report from it."""

    config: TrainConfig
    out: Path
    data: TokenData
    state: TrainState | None
    """On one device, to sample from. None: no samples are wanted, or it has no room there."""
    compile_seconds: float | None
    """None: nothing was compiled, because the run was at its last step when it started."""
    gemm: GemmRates
    """FLOP/s of a plain GEMM on all devices, before the first update and after the last one."""
    flops_per_token: float


def train(task: Task, engine: Engine, out: Path, peers: Peers = ALONE) -> RunSummary:
    """Runs task.config to its last step, from the newest checkpoint in `out` if there is one.

    The caller has passed the task through train.checks.check, which gives `out`. It also locks the
    folder (base.files.only_process). UserError: `out` holds another run. Stopped: a signal came.
    The step that was under way is then saved, unless nothing was trained yet.

    Each of several processes calls this with its `peers`. The first one writes all files but the
    arrays of checkpoints, of which every process writes its own.
    """
    checkpoints = Checkpoints(out, task.config.checkpoint, peers=peers)
    try:
        saved = checkpoints.peek(say)
        if saved is not None:
            check_same_task(task.fingerprint, saved.get("task"), out)
            check_same_run(task.config, saved, out)
        # The first process makes what the cache lacks. The others find it there.
        with peers.first("data"):
            data = prepare_data(task, saved)
        require_same_text(data, peers)
        say(describe_data(data))
        exchange = task.config.parallel.exchange
        # Outside the mesh: what it computes runs on the one device that its model was loaded on.
        with peers.first("task"):
            task = task.prepare(data)
        with jax.set_mesh(engine.mesh), exchanging(exchange), closing(engine):
            run = start(task, engine, out, data, checkpoints)
            peers.exchange("compiled")  # no process waits for another inside a collective
            # The request is the outer block, because it ends with Stopped once all is saved.
            with stop_request() as stop, disk_errors(out):
                run_steps(run, stop)
                checkpoints.wait()
            return run.summary()
    except BaseException as error:
        # Before checkpoints are waited for, because the others take part in them.
        peers.leave(error)
        raise
    finally:
        checkpoints.close()


@dataclass
class Run:
    """A run in progress."""

    task: Task
    engine: Engine
    out: Path
    data: TokenData
    checkpoints: Checkpoints
    state: TrainState
    trace: StepTrace
    windows: Any
    """Grain iterator over batches of text. Its position is part of a checkpoint."""
    compile_seconds: float | None
    gemm_rate: float
    flops_per_token: float

    @property
    def config(self) -> TrainConfig:
        return self.task.config

    def next_batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of update `step`, from 0."""
        return self.task.batch(self.state, step, self.engine.place(next(self.windows)))

    def summary(self) -> RunSummary:
        """The run's results, for the report."""
        return RunSummary(
            config=self.config,
            out=self.out,
            data=self.data,
            state=self.engine.local_state(self.state) if self.config.samples else None,
            compile_seconds=self.compile_seconds,
            gemm=GemmRates(self.gemm_rate, device_gemm_rate(self.config, self.engine)),
            flops_per_token=self.flops_per_token,
        )


def start(task: Task, engine: Engine, out: Path, data: TokenData, checkpoints: Checkpoints) -> Run:
    """Fresh or restored state, the batch iterator at the same place, and the compiled step."""
    config = task.config
    windows = train_batches(
        data.train,
        config.data.length,
        config.batch,
        config.seed,
        ahead=config.model.mtp_depth,
        rows=engine.rows(),
        beside=task.beside,
    )
    restored = checkpoints.restore(engine.abstract_state(), say)
    with disk_errors(out):
        state = first_state(task, engine, out, restored)
    if restored is not None:
        windows.set_state(restored.extra["data_state"])
        say(f"continuing after step {restored.step} of {config.last_step} in {out}")
    compile_seconds = None
    if int(state.step) < config.last_step:
        compile_seconds = compile_step(task, engine, state, data)
    rate = device_gemm_rate(config, engine)
    say(f"a plain GEMM here runs at {rate / 1e9:,.0f} GFLOP/s")
    return Run(
        task=task,
        engine=engine,
        out=out,
        data=data,
        checkpoints=checkpoints,
        state=state,
        trace=StepTrace(out, int(state.step), config.profile if process.index() == 0 else 0),
        windows=windows,
        compile_seconds=compile_seconds,
        gemm_rate=rate,
        flops_per_token=task.flops_per_token(),
    )


def compile_step(task: Task, engine: Engine, state: TrainState, data: TokenData) -> float:
    """Compiles the update. Returns the seconds that it took."""
    say("compiling the training step")
    begin = time.perf_counter()
    # Abstract: compiling must not draw a batch from the iterator.
    batch = task.abstract_batch(engine.abstract_batch())
    with working("compiling"):
        engine.compile(state, batch, task.objective, task.operands, data.validation)
    seconds = time.perf_counter() - begin
    say(f"compiled in {seconds:.1f} s")
    return seconds


def device_gemm_rate(config: TrainConfig, engine: Engine) -> float:
    """FLOP/s of a plain GEMM in the run's compute dtype on all devices, measured now."""
    # All CPU devices of a process share its cores.
    devices = jax.process_count() if jax.default_backend() == "cpu" else engine.mesh.size
    return gemm_rate(compute_dtype(config.model).name) * devices


def first_state(task: Task, engine: Engine, out: Path, restored: Restored | None) -> TrainState:
    """The state of a checkpoint, or the state before the first update."""
    if restored is None:
        return task.first_state(engine.start(out))
    return engine.resume(out, restored.state, restored.folder)


def run_steps(run: Run, stop: StopRequest) -> None:
    """All remaining updates, or those until `stop` is set.

    The metrics of one update are read while the next one computes.
    """
    config = run.config
    last = config.last_step
    first = int(run.state.step)
    path = run.out / "metrics.jsonl"
    # A kill may leave lines of updates that no checkpoint has. They are done again.
    writes = run.checkpoints.peers.index == 0
    lines = MetricsFile(path, resume_after=first) if writes else NoMetricsFile()
    log = open_log(config, run.out, first) if writes else NoLog()
    before = elapsed_until(read_lines(path), first)
    speed = Speedometer(config.batch * config.data.length, last, before=before)
    with Display(last) as display:

        def finish(step: int, metrics: Metrics, save: bool) -> None:
            line = describe(step, metrics, with_load=_is_load_step(step, config))
            line |= run.engine.step_line(step)
            speed.tick(line)
            if _is_evaluation_step(step, config):
                display.evaluating(step)
                line[VALIDATION] = run.engine.evaluate(run.state)
                speed.pause()  # the evaluation is no part of the next update's time
            lines.write(line)
            log.write(line)
            display.show(line, speed, run.gemm_rate / run.flops_per_token)
            _check_finite(run, line)
            # A checkpoint is one that a run can go on from: not in the middle of skipped updates.
            if save and not line["skipped_in_a_row"]:
                # First: a checkpoint at step n promises that the file has the lines up to n.
                lines.sync()
                _save(run, step, line.get(VALIDATION))

        for step, metrics, save in _updates(run, first, stop):
            finish(step, metrics, save)
    run.trace.close(run.state)
    log.close()
    lines.close()


def _updates(run: Run, first: int, stop: StopRequest) -> Iterator[tuple[int, Metrics, bool]]:
    """(step, metrics, whether to save) of each update, one update late.

    So the device computes while the host reads metrics. At a step that saves or evaluates, they
    come at once, because run.state must then be the state of that very step. A signal that asks to
    stop is looked at before each update: the one before it is then saved, and is the last. Of
    several processes all stop at the same update.
    """
    unread: tuple[int, Metrics] | None = None
    for step in range(first + 1, run.config.last_step + 1):
        if _stops(run, stop, step - 1):
            if unread is not None:
                yield *unread, True
            return
        run.trace.before(step, run.state)
        run.state, metrics = run.engine.step(run.state, run.next_batch(step - 1))
        run.checkpoints.poll()
        if unread is not None:
            yield *unread, False
        unread = (step, metrics)
        if _is_save_step(step, run.config):
            yield *unread, True
            unread = None
    _stops(run, stop, run.config.last_step)


def _stops(run: Run, stop: StopRequest, done: int) -> bool:
    """Whether update `done` is to be the last one. A signal to another process is then this one's
    too."""
    agreed = run.checkpoints.peers.stops(done, stop.number)
    if agreed is not None:
        stop.number = signal.Signals(agreed)
    return agreed is not None


def _is_evaluation_step(step: int, config: TrainConfig) -> bool:
    return step % config.evaluate_every == 0 or step == config.last_step


def _is_save_step(step: int, config: TrainConfig) -> bool:
    return _is_evaluation_step(step, config) or step % config.checkpoint.every == 0


def _is_load_step(step: int, config: TrainConfig) -> bool:
    """About a hundred snapshots of the expert load over the run."""
    return step % max(1, config.last_step // 100) == 0 or step == 1


def _check_finite(run: Run, line: dict[str, Any]) -> None:
    """Says when an update was skipped. Gives up after optim.max_skipped in a row."""
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
    extra: Extra = {
        "step": step,
        "config": dataclasses.asdict(run.config),
        "tokenizer": run.data.tokenizer.to_json(),
        "data_fingerprint": run.data.fingerprint,
        "data_stats": run.data.stats,
        "data_state": run.windows.get_state(),
        "task": run.task.fingerprint,
    }
    beside = run.engine.save_beside(run.out, step)
    run.checkpoints.save(step, run.state, extra, bits, beside)
