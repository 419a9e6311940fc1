"""The bound on activations is below what XLA reserves, and a batch above it is refused."""

from dataclasses import replace

import jax
import pytest

from moe_jax.base import machine
from moe_jax.base.errors import UserError
from moe_jax.config import DataConfig, DistillConfig, TrainConfig
from moe_jax.train import activations, checks
from moe_jax.train.activations import evaluation_bytes, training_bytes
from moe_jax.train.engines.dense import DenseEngine
from moe_jax.train.step import make_step
from tests.conftest import GQA, SMALL_MODEL


def small(batch=4, length=64, accumulation=1, **model) -> TrainConfig:
    config = TrainConfig(
        batch=batch,
        model=replace(SMALL_MODEL, vocabulary=300, **model),
        data=DataConfig(length=length, tokenizer="bytes"),
    )
    return replace(config, optim=replace(config.optim, accumulation=accumulation))


def test_the_bound_is_the_formula():
    config = small(batch=8, length=64, accumulation=2, output_dtype="bfloat16")
    # 3 blocks of width 20 in float32, and 300 logits in bfloat16.
    assert training_bytes(config, 2) == 2 * 64 * (3 * 20 * 4 + 300 * 2)
    assert evaluation_bytes(config, 2) == 4 * 64 * 300 * 2
    scores = replace(config, model=replace(config.model, attention=quadratic(), remat="full"))
    assert evaluation_bytes(scores, 2) == 4 * 64 * 4 * 64 * 4
    taught = replace(config, distill=DistillConfig(teacher="run", chunk=50))
    assert training_bytes(taught, 2) == 2 * 64 * (3 * 20 * 4 + 50 * 4)


def quadratic():
    return replace(GQA, implementation="reference")


def reserved(config: TrainConfig) -> int:
    engine = DenseEngine(config, jax.devices()[:1])
    step = jax.jit(make_step(config), donate_argnums=0)
    compiled = step.lower(engine.abstract_state(), engine.abstract_batch()).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "model",
    [
        {"layers": 8, "dense_layers": 8, "width": 200, "dense_hidden": 8, "remat": "full"},
        pytest.param({"attention": quadratic(), "remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"compute_dtype": "bfloat16", "remat": "dots"}, marks=pytest.mark.slow),
        pytest.param({"layers": 6, "unroll": 5, "remat": "none"}, marks=pytest.mark.slow),
        pytest.param({"output_dtype": "bfloat16", "mtp_depth": 1}, marks=pytest.mark.slow),
    ],
)
def test_xla_reserves_more_than_the_bound(model):
    config = small(length=256, **model)
    assert training_bytes(config, 1) <= reserved(config)


def test_a_batch_that_cannot_fit_is_refused_before_compiling(small_run, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: None)
    monkeypatch.setattr(checks, "available_bytes", lambda: 3 * 10**9)
    checks.check_memory(small_run, 1, 10**9)
    large = replace(small_run, batch=2**20)
    with pytest.raises(UserError, match=r"^batch=1048576 of data.length=48 needs at least 56.0 GB"):
        checks.check_memory(large, 1, 10**9)
    with pytest.raises(UserError, match=r"has 2.0 GB .*: lower --batch or --data.length$"):
        checks.check_memory(large, 1, 10**9)
    monkeypatch.setattr(checks, "available_bytes", lambda: 55 * 10**9)
    with pytest.raises(UserError, match=r"or raise --optim.accumulation$"):
        checks.check_memory(large, 1, 0)
    monkeypatch.setattr(checks, "available_bytes", lambda: None)
    checks.check_memory(large, 1, 10**9)


def test_a_program_that_may_be_too_large_is_said(monkeypatch, capsys):
    program = jax.jit(lambda x: x @ x @ x).lower(jax.ShapeDtypeStruct((64, 64), "float32"))
    compiled = program.compile()
    monkeypatch.setattr(activations, "available_bytes", lambda: 10)
    activations.say_if_too_large(compiled)
    assert "the compiled step needs 0.0 GB beside the state" in capsys.readouterr().out
    monkeypatch.setattr(activations, "available_bytes", machine.available_bytes)
    activations.say_if_too_large(compiled)
    assert capsys.readouterr().out == ""
