"""Training with experts in tiers against the ordinary update, and what may go wrong with it."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    PlacementConfig,
    TrainConfig,
)
from moe_jax.placement.records.store import RecordStore
from moe_jax.runs.load import load_run
from moe_jax.runs.run import run_training
from moe_jax.train import loop
from moe_jax.train.engines.tiered import engine as tiered
from moe_jax.train.engines.tiered import residency
from moe_jax.train.engines.tiered.chunks import Sizes
from moe_jax.train.engines.tiered.engine import (
    TieredEngine,
    assembled,
    open_experts,
    save_experts,
)
from moe_jax.train.engines.tiered.rows import row_shapes
from moe_jax.train.engines.tiered.step import TieredStep
from moe_jax.train.engines.tiered.trunk import init_trunk
from moe_jax.train.evaluate import make_evaluator
from moe_jax.train.metrics import read_lines
from moe_jax.train.state import init_state
from moe_jax.train.step import make_step
from moe_jax.train.task import Task
from moe_jax.train.text import prepare_data
from tests.conftest import GQA
from tests.train.test_step import make_batch

RARE = MoEConfig(experts=12, experts_per_token=1, expert_hidden=6, normalise=False, z_loss=1e-3)
"""Twelve tokens choose one of twelve experts: about a third of them is not chosen."""
ALL = replace(RARE, experts_per_token=12)


def small(mode="exact", budget="1MB", moe=RARE, model=None, optimizer="adamw", **placement):
    """One dense and two sparse blocks, 12 tokens a batch."""
    settings = {"width": 12, "layers": 3, "dense_hidden": 8, "attention": GQA, "init_std": 0.2}
    return TrainConfig(
        steps=20,
        batch=2,
        model=ModelConfig(moe=moe, **{**settings, **(model or {})}),
        data=DataConfig(tokenizer="bytes", length=6),
        optim=OptimConfig(optimizer=optimizer, learning_rate=1e-2),
        placement=PlacementConfig(device_budget=budget, mode=mode, **placement),
    ).resolved()


class Tiers:
    """A tiered state that tests step through."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder
        self.experts = open_experts(config, folder, None, 0)
        self.step = TieredStep(config, self.experts)
        # The trunk is the same wherever the experts are: one program for all placements.
        anywhere = replace(config, placement=PlacementConfig())
        self.trunk = jax.jit(init_trunk, static_argnums=0)(anywhere)
        self.losses = []

    def run(self, first, last):
        for index in range(first, last):
            self.trunk, metrics = self.step(self.trunk, make_batch(self.config, index))
            self.losses.append(float(metrics.loss))
        return metrics

    def state(self):
        """Everything as numpy arrays by name."""
        checkpoint = self.folder / "checkpoint"
        checkpoint.mkdir(exist_ok=True)
        saved = save_experts(self.experts, self.folder, 0)
        target = checkpoint / "experts"
        for old in target.glob("*"):
            old.unlink()
        saved.replace(target)
        return by_name(assembled(self.config, self.trunk, checkpoint))

    def close(self):
        self.experts.close()


@pytest.fixture
def tiers(tmp_path):
    """Makes Tiers of a config, each in a folder of its own, and closes them."""
    made = []

    def make(config):
        folder = tmp_path / f"tiers-{len(made)}"
        folder.mkdir()
        made.append(Tiers(config, folder))
        return made[-1]

    yield make
    for one in made:
        one.close()


def by_name(state):
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)


def resident(config):
    """The ordinary path: losses and states of 12 updates."""
    state = jax.jit(init_state, static_argnums=0)(config)
    step, losses = jax.jit(make_step(config)), []
    states = [by_name(state)]
    for index in range(12):
        state, metrics = step(state, make_batch(config, index))
        losses.append(float(metrics.loss))
        states.append(by_name(state))
    return losses, states


def assert_close(found, expected):
    """The same sums in other programs: XLA fuses them in another order, and Adam's division by
    sqrt(v) raises the rounding of tiny gradients, up to 1e-4 of the largest parameter here."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(np.abs(value).max()), 1e-3)
        error = np.abs(found[name].astype(float) - value.astype(float)).max()
        assert error < 1e-3 * scale, (name, error, scale)


VARIANTS = {
    "rare experts, exact": {},
    "rare experts, muon, exact": {"optimizer": "muon"},
    "every expert in every update, sparse": {"mode": "sparse", "moe": ALL},
    "dropout and multi-token prediction": {"model": {"dropout": 0.1, "mtp_depth": 1}},
    "rematerialised": {"model": {"remat": "full"}},
    "softmax, capacity, no shared expert": {
        "moe": replace(RARE, gate="softmax", bias_rate=0, capacity_factor=1.0, shared_experts=0),
        "model": {"tied_embedding": False, "dense_layers": 0},
    },
}
QUICK = ("rare experts, exact",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in VARIANTS],
)
def test_tiers_equal_the_ordinary_update(tiers, name):
    """Losses and every leaf of the state, by name, after 12 updates."""
    config = small(**VARIANTS[name])
    losses, states = resident(config)
    one = tiers(config)
    for leaf, value in one.state().items():  # the same draws, scaled in another program
        np.testing.assert_allclose(value, states[0][leaf], rtol=1e-6, err_msg=leaf)
    metrics = one.run(0, 12)
    np.testing.assert_allclose(one.losses, losses, rtol=1e-5)
    assert_close(one.state(), states[-1])
    assignments = config.model.moe_layers * 12 * config.model.moe.experts_per_token
    assert int(metrics.stats["sparse"].load.sum()) == assignments


PLACES = {
    "all resident": {"budget": "10MB"},
    "none resident": {"budget": ""},
    "a few, changing often": {"budget": "75kB"},
    "lru": {"budget": "75kB", "policy": "lru"},
    "host memory for some": {"budget": "", "host_budget": "40kB"},
    "host memory for all": {"budget": "", "host_budget": "1MB"},
    "around the page cache": {"budget": "", "direct": True},
}


def least(config):
    """The config with the smallest budget."""
    with pytest.raises(UserError, match="working set") as refused:
        Sizes(with_budget(config, "1kB"), row_shapes(config))
    return with_budget(config, str(refused.value).split()[-2])


def with_budget(config, budget):
    return replace(config, placement=replace(config.placement, device_budget=budget))


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """mode -> losses and states of 9 updates for each of PLACES, and how many were resident."""

    @cache
    def run(mode):
        found = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(residency, "DECIDE_EVERY", 2)
            patch.setattr(residency, "HYSTERESIS", 0.0)
            for name, place in PLACES.items():
                config = small(mode=mode, **{**place, "budget": place["budget"] or "1MB"})
                config = config if place["budget"] else least(config)
                one = Tiers(config, tmp_path_factory.mktemp("place"))
                before = one.experts.residency.placement.resident.copy()
                one.run(0, 9)
                swapped = bool(np.any(before != one.experts.residency.placement.resident))
                lines = list(one.step.lines.values())
                found[name] = (one.losses, one.state(), int(before.sum()), swapped, lines)
                one.close()
        return found

    return run


@pytest.mark.parametrize("mode", ["sparse", pytest.param("exact", marks=pytest.mark.slow)])
def test_no_budget_and_no_policy_changes_a_bit(everywhere, mode):
    found = everywhere(mode)
    losses, state, *_ = found["all resident"]
    for name in PLACES:
        assert found[name][0] == losses, name
        assert_equal(found[name][1], state)


def test_the_places_are_what_they_say(everywhere):
    kinds = everywhere("sparse")
    assert [kinds[n][2] for n in ("all resident", "none resident")] == [24, 0]
    assert 0 < kinds["a few, changing often"][2] < 24
    assert kinds["a few, changing often"][3]
    assert kinds["lru"][3]
    read = {name: sum(line["disk_read_bytes"] for line in kind[4]) for name, kind in kinds.items()}
    assert read["all resident"] == read["host memory for all"] == 0
    assert 0 < read["a few, changing often"] < read["none resident"]
    assert 0 < read["host memory for some"] < read["none resident"]
    assert read["around the page cache"] == read["none resident"]
    assert kinds["all resident"][4][0]["expert_hit_rate"] == 1
    assert kinds["none resident"][4][0]["expert_hit_rate"] == 0


def test_sparse_mode_leaves_untouched_experts_alone(tiers):
    one = tiers(small(mode="sparse"))
    one.run(0, 3)
    before = one.state()
    metrics = one.run(3, 4)
    after = one.state()
    used = np.asarray(metrics.stats["sparse"].load) > 0
    assert 0 < used.sum() < used.size
    names = [n for n in before if tiered_leaf(n)]
    assert len(names) == 6  # parameters and two moments of two matrices
    for name in names:
        changed = np.any(before[name] != after[name], axis=(2, 3))
        np.testing.assert_array_equal(changed, used, err_msg=name)


def tiered_leaf(name):
    return "['moe']['down']" in name or "['moe']['gate_up']" in name


def test_exact_mode_moves_untouched_experts(tiers):
    """The difference between the modes is real: dense AdamW decays and drifts what is not used."""
    one = tiers(small(mode="exact"))
    one.run(0, 3)
    before = one.state()
    one.run(3, 4)
    after = one.state()
    names = [n for n in before if tiered_leaf(n) and n.startswith(".parameters")]
    for name in names:
        assert np.any(before[name] != after[name], axis=(2, 3)).all(), name


@pytest.mark.parametrize("mode", ["sparse", "exact"])
def test_bringing_up_to_date_early_changes_nothing(tiers, mode):
    config = small(mode=mode)
    lazy, eager = tiers(config), tiers(config)
    lazy.run(0, 6)
    for index in range(6):
        eager.run(index, index + 1)
        eager.state()
    assert eager.losses == lazy.losses
    assert_equal(eager.state(), lazy.state())


@pytest.mark.parametrize("mode", ["sparse", "exact"])
def test_a_skipped_update_is_void(tiers, mode):
    """Its gradients never reach an expert, nor do they cost it the update before."""
    config = small(mode=mode)
    plain, hurt = tiers(config), tiers(config)
    plain.run(0, 5)
    hurt.run(0, 3)
    healthy = hurt.trunk
    poisoned = jax.tree.map(jnp.copy, healthy.parameters)
    poisoned["embedding"][...] = poisoned["embedding"][...].at[0, 0].set(jnp.inf)
    poisoned["norm"]["scale"][...] = poisoned["norm"]["scale"][...].at[0].set(jnp.nan)
    kept = jax.tree.map(jnp.copy, healthy)
    hurt.trunk = healthy._replace(parameters=poisoned)
    metrics = hurt.run(3, 4)
    assert not np.isfinite(float(metrics.loss))
    assert [int(hurt.trunk.skipped), int(hurt.trunk.updates)] == [1, 3]
    hurt.trunk = kept
    hurt.run(3, 5)
    assert hurt.losses[4:] == plain.losses[3:]
    assert_equal(hurt.state(), plain.state())


def test_a_corrupt_row_stops_the_update_and_is_named(tiers):
    one = tiers(least(small(mode="sparse")))
    one.run(0, 2)
    one.experts.drain()
    path = one.experts.records.store.path("parameters", 1)
    path.write_bytes(bytes(b ^ 1 for b in path.read_bytes()))
    with pytest.raises(
        UserError, match=r"^expert \d+ of layer 1 in .*parameters.safetensors is corrupt"
    ):
        one.run(2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placement": PlacementConfig(device_budget="9kB")}, "need at least \\d+ bytes"),
        ({"optim": OptimConfig(accumulation=2)}, "optim.accumulation=2: .*set optim.accumulation"),
        ({"model": ModelConfig(layers=1)}, "a dense model"),
    ],
)
def test_what_tiers_cannot_do_is_refused_in_a_line(monkeypatch, change, message):
    monkeypatch.setattr(tiered, "visible_devices", lambda: 1)
    with pytest.raises(UserError, match=rf"^placement.device_budget=\w+ .*{message}"):
        TieredEngine(replace(small(), **change)).check()


def test_several_devices_are_refused():
    with pytest.raises(UserError, match=r"device_budget=1MB and 2 devices"):
        run_training(small())


# Whole runs.


@pytest.fixture
def tiered_run(small_run, monkeypatch):
    """small_run with one sparse block of twelve experts, some of them resident."""
    monkeypatch.setattr(tiered, "visible_devices", lambda: 1)
    moe = replace(RARE, experts=12, expert_hidden=6)
    model = replace(small_run.model, width=12, moe=moe)
    placement = PlacementConfig(device_budget="75kB")
    checkpoint = CheckpointConfig(every=4)
    return replace(small_run, model=model, placement=placement, checkpoint=checkpoint)


def losses(config):
    return [(x["step"], x["loss"]) for x in read_lines(Path(config.out) / "metrics.jsonl")]


def train_until(config, step):
    """Trains and is cut after `step`, as by a kill between two updates."""

    def stop(run, line):
        if line["step"] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_check_finite", stop)
        with pytest.raises(KeyboardInterrupt):
            run_training(config)


@pytest.mark.slow  # tests/test_campaign.py kills and continues one by default
def test_a_run_in_tiers_is_resumed_bit_for_bit_and_loads_as_any_other(tiered_run, tmp_path):
    run_training(tiered_run)
    lines = list(read_lines(Path(tiered_run.out) / "metrics.jsonl"))
    assert {"disk_read_bytes", "expert_hit_rate", "expert_wait_seconds"} <= set(lines[-1])
    cut = replace(tiered_run, out=str(tmp_path / "cut"))
    train_until(cut, 7)
    unfinished = tmp_path / "cut" / "checkpoints" / "unfinished"
    (unfinished / "experts-8").mkdir()  # what a kill in mid save leaves
    run_training(with_budget(cut, "1MB"))
    assert losses(cut) == losses(tiered_run)
    assert not list(unfinished.glob("experts-*"))
    assert not (tmp_path / "cut" / "expert-records").exists()
    one, two = load_run(tiered_run.out), load_run(cut.out)
    assert_equal(by_name(one.state), by_name(two.state))

    array = prepare_data(Task(tiered_run), None).validation
    bits = make_evaluator(tiered_run, array, lambda batch: batch)(one.state)
    np.testing.assert_allclose(lines[-1]["validation_bits_per_byte"], bits, rtol=1e-5)
    assert one.complete("def f", tokens=3).startswith("def f")

    with pytest.raises(
        UserError, match=r"a run with placement.device_budget, and this one is without .* choose"
    ):
        # With samples, because a finished run with its whole report would be left as it is.
        run_training(replace(with_budget(tiered_run, ""), samples=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("pwritev", errno.ENOSPC, "No space left"),
        ("preadv", errno.EIO, "Input/output error"),
    ],
)
def test_a_disk_that_fails_in_mid_run_is_a_line_and_the_last_checkpoint_is_good(
    tiered_run, monkeypatch, call, error, words
):
    real, state = getattr(os, call), SimpleNamespace(broken=False)

    def moved(*arguments):
        if state.broken:
            raise OSError(error, os.strerror(error))
        return real(*arguments)

    def break_after_six(run, line):
        state.broken = line["step"] >= 6

    with monkeypatch.context() as patch:
        patch.setattr(os, call, moved)
        patch.setattr(loop, "_check_finite", break_after_six)
        with pytest.raises(UserError, match=rf"^expert \d+ of layer 0 in .*{words}.*the same comm"):
            run_training(tiered_run)
    assert load_run(tiered_run.out).step == 4  # the save after step 6 failed as well
    run_training(tiered_run)
    assert [step for step, _ in losses(tiered_run)] == list(range(1, 13))


@pytest.mark.slow
def test_a_checkpoint_whose_experts_are_damaged_is_passed_over(tiered_run):
    run_training(tiered_run)
    newest = (
        Path(tiered_run.out) / "checkpoints" / "12" / "experts" / "layer-000.moments.safetensors"
    )
    newest.write_bytes(newest.read_bytes()[:-1])
    assert load_run(tiered_run.out).step == 8


@pytest.mark.slow
def test_samples_need_all_experts_within_the_budget(tiered_run, capsys):
    run_training(replace(tiered_run, samples=1, steps=1))
    assert "no samples: all experts are more" in capsys.readouterr().out
    roomy = replace(tiered_run.placement, device_budget="10MB")
    out = f"{tiered_run.out}-roomy"
    run_training(replace(tiered_run, samples=1, steps=1, placement=roomy, out=out))
    assert "⟫" in (Path(out) / "samples.txt").read_text()


def test_a_saved_store_holds_what_the_experts_hold(tiers):
    """A save is complete by itself: no row of it is unwritten."""
    one = tiers(small(mode="exact"))
    one.run(0, 2)
    one.state()
    saved = RecordStore.open(one.folder / "checkpoint" / "experts")
    assert all(file.written.all() for files in saved.files.values() for file in files)
    saved.close()


def test_the_ledger_keeps_to_the_budget():
    config = small(budget="80kB")
    sizes = Sizes(config, row_shapes(config))
    assert 0 < sizes.quota < 12
    assert sizes.device <= 80_000 < sizes.device + 2 * row_shapes(config).record_bytes


def test_calls_out_of_order_and_from_another_thread_are_refused(tiers):
    one = tiers(small())
    one.run(0, 1)
    experts = one.experts
    with ThreadPoolExecutor(1) as other:
        for call in (experts.drain, lambda: experts.prefetch(0), lambda: experts.need(0, [0])):
            with pytest.raises(AssertionError, match="called from a second thread"):
                other.submit(call).result()
    with pytest.raises(AssertionError, match="called from a second thread"):
        experts._updater.fill(None, 0, np.arange(1))  # its own thread has called before
    going_on = threading.Event()
    experts.threads.submit("bring", going_on.wait)
    experts.prefetch(0, np.arange(3))
    gradients = tuple(jnp.zeros((12, *s.shape)) for s in experts.shapes.parameters)
    try:
        with pytest.raises(AssertionError, match="layer 0 is still being brought"):
            experts.put_gradient(0, np.arange(3), gradients)
        with pytest.raises(AssertionError, match="still being brought"):
            experts.end_update([np.arange(3)] * 2, True, 1.0)
    finally:
        going_on.set()
    experts.drain()
