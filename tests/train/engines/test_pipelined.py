"""Training in a pipeline: equal to micro-batches on one device, refused in one line, resumed."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import OptimConfig, ParallelConfig
from moe_jax.runs.run import run_training
from moe_jax.train.engines import engine_kind
from moe_jax.train.engines.pipelined.engine import PipelinedEngine, schedule_of
from moe_jax.train.metrics import read_lines
from tests.parallel.pipelined_layouts import CASES, PIPELINES

TOLERANCE = 1e-12
"""Of float64, relative to an array's largest value. The order of a few sums differs."""


def check(pairs):
    """tests.parallel.pipelined_layouts in a process with eight devices."""
    number = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", "tests.parallel.pipelined_layouts", *pairs]
    done = subprocess.run(
        command, env=os.environ | number, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {pair: float(value) for pair, value in re.findall(r"^(\S+) (\S+)$", done.stdout, re.M)}
    assert list(found) == pairs
    assert all(value < TOLERANCE for value in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_schedule_equals_one_device(pipeline):
    check([f"gqa/{pipeline}"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_everything_that_a_model_may_have(case):
    check([f"{case}/with-data", f"{case}/zb-v"])


def deep(small_run, **parallel):
    model = replace(small_run.model, layers=4)
    return replace(small_run, model=model, batch=8, parallel=ParallelConfig(**parallel))


def test_bad_pipelines_are_refused_before_anything_compiles(small_run):
    config = deep(small_run, pipe=2, microbatches=4)
    assert engine_kind(config) is PipelinedEngine
    PipelinedEngine(config).check()
    three = replace(config, model=replace(config.model, layers=3))
    with pytest.raises(UserError, match="3 layers cannot be cut into the 2 equal pieces of 1f1b"):
        PipelinedEngine(three).check()
    with pytest.raises(UserError, match="batch=8 does not divide into 3 micro-batches"):
        PipelinedEngine(deep(small_run, pipe=2, microbatches=3)).check()
    both = replace(config, optim=OptimConfig(accumulation=2))
    with pytest.raises(UserError, match=r"optim\.accumulation=2 does not go with parallel\.pipe"):
        PipelinedEngine(both).check()
    with pytest.raises(UserError, match="needs at least 4 micro-batches, not 2"):
        schedule_of(ParallelConfig(pipe=2, schedule="dualpipe", microbatches=2))
    with pytest.raises(UserError, match=r"parallel\.microbatches=4 needs a pipeline"):
        ParallelConfig(microbatches=4)


@pytest.mark.slow
def test_a_run_equals_one_with_accumulation(small_run):
    config = replace(deep(small_run), steps=2)
    model = replace(config.model, layers=2)
    accumulated = replace(config, model=model, optim=replace(config.optim, accumulation=2))
    parallel = ParallelConfig(pipe=2, microbatches=2)
    out = f"{config.out}-pipe"
    run_training(accumulated)
    run_training(replace(config, model=model, parallel=parallel, out=out))
    one, pipe = (list(read_lines(Path(o) / "metrics.jsonl")) for o in (config.out, out))
    for name in ("loss", "gradient_norm", "dropped", "router_bias_max", "validation_bits_per_byte"):
        values = [[line[name] for line in lines if name in line] for lines in (one, pipe)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)  # float32, other sums
        assert values[0]


@pytest.mark.slow
def test_a_run_goes_on_with_another_schedule_and_without_one(small_run):
    """Three layouts in one folder end at the loss of one layout."""
    layouts = [
        ParallelConfig(pipe=2, schedule="zb-h1", microbatches=4),
        ParallelConfig(pipe=2, schedule="interleaved", microbatches=2),
        ParallelConfig(),
    ]
    config = deep(small_run)
    config = replace(config, optim=replace(config.optim, schedule="constant"), evaluate_every=2)
    for number, parallel in enumerate(layouts):
        run_training(replace(config, parallel=parallel, steps=2 * (number + 1)))
    whole = replace(config, out=f"{config.out}-whole", steps=6)
    run_training(whole)
    losses = [
        [line["loss"] for line in read_lines(Path(out) / "metrics.jsonl")]
        for out in (config.out, whole.out)
    ]
    assert len(losses[0]) == 6
    # float32, and other sums in every layout.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
