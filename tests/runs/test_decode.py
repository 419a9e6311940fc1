"""A run made ready for decoding: its own text within any budget, and only what is needed."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import DecodePlacement
from moe_jax.model.abstract import graph_of
from moe_jax.model.generate import generate
from moe_jax.placement.files import ExpertFiles, layer_name
from moe_jax.runs import decode as decoding
from moe_jax.runs.decode import open_decoder, prepare_decoding
from moe_jax.runs.load import load_run, newest_step

SETTINGS = {"count": 6, "vocabulary": 258, "temperature": 1.0}


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A folder of its own with the finished run's checkpoints."""
    folder = tmp_path_factory.mktemp("decoding")
    (folder / "checkpoints").symlink_to(f"{finished_run.out}/checkpoints")
    return folder


def written(run, placement):
    decoder, made = open_decoder(run, placement, batch=2)
    prompt = jnp.asarray([made.tokenizer.encode("def f"), made.tokenizer.encode("retur")])
    with decoder.store:
        tokens = decoder.generate(prompt, jax.random.key(1), **SETTINGS)
    return tokens, prompt, decoder.store


def test_every_budget_gives_the_models_own_tokens(run):
    tokens, prompt, store = written(run, DecodePlacement())
    assert store.residency.placement.capacity == store.files.layers * store.files.experts
    trained = load_run(run)
    states = trained.state.parameters, trained.state.router
    graph = graph_of(trained.config.model)
    np.testing.assert_array_equal(
        tokens, generate(graph, states, prompt, jax.random.key(1), **SETTINGS)
    )
    size = store.files.expert_bytes
    small = DecodePlacement(device_budget=str(4 * size), host_budget=str(2 * size))
    for placement in (small, replace(small, on_miss="compute", policy="lru", look_ahead=0)):
        found, _, store = written(run, placement)
        np.testing.assert_array_equal(found, tokens)
        assert store.traffic.hits < store.traffic.uses
        assert store.traffic.peak_bytes <= 4 * size


def test_what_is_prepared_is_not_prepared_again_and_needs_no_run(run, monkeypatch):
    folder = prepare_decoding(run)
    before = (folder / layer_name(0)).stat().st_mtime_ns
    monkeypatch.setattr(decoding, "load_run", None)
    assert prepare_decoding(run) == folder
    assert (folder / layer_name(0)).stat().st_mtime_ns == before
    (folder / "model.json").write_text("{")
    with pytest.raises(TypeError):  # it would be loaded
        prepare_decoding(run)


def test_what_was_written_for_an_older_checkpoint_goes_when_the_newest_is_mended(
    finished_run, tmp_path
):
    shutil.copytree(f"{finished_run.out}/checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / str(newest_step(tmp_path))
    extra = newest / "extra" / "metadata"
    whole = extra.read_bytes()
    extra.write_bytes(b"{")
    folder = prepare_decoding(tmp_path)
    older = (folder / "trunk.safetensors").read_bytes()
    assert prepare_decoding(tmp_path) == folder  # still damaged: nothing is written again
    assert (folder / "trunk.safetensors").read_bytes() == older
    extra.write_bytes(whole)
    prepare_decoding(tmp_path)
    mended = (folder / "trunk.safetensors").read_bytes()
    assert mended != older
    for name in ("trunk.safetensors", "model.json"):  # any flipped bit is noticed
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)
        prepare_decoding(tmp_path)
        assert (folder / "trunk.safetensors").read_bytes() == mended
    for checkpoint in (tmp_path / "checkpoints").iterdir():  # a refusal takes nothing away
        if checkpoint.name.isdigit():
            (checkpoint / "extra" / "metadata").write_bytes(b"{")
    before = (folder / "model.json").read_bytes()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        prepare_decoding(tmp_path, dtype="bfloat16")
    assert (folder / "model.json").read_bytes() == before


def test_rounded_experts_take_half_the_bytes_and_every_budget_gives_the_same_text(run):
    exact, rounded = DecodePlacement(), DecodePlacement(dtype="bfloat16")
    size = written(run, exact)[2].files.expert_bytes
    tokens, _, store = written(run, rounded)
    assert 2 * store.files.expert_bytes == size
    found, _, small = written(run, replace(rounded, device_budget=str(2 * size)))
    np.testing.assert_array_equal(found, tokens)
    assert small.traffic.hits < small.traffic.uses
    assert written(run, exact)[2].files.expert_bytes == size  # prepared anew


def test_eight_bit_copies_stand_in_if_asked_for(run):
    tokens, _, _ = written(run, DecodePlacement())
    size = ExpertFiles(prepare_decoding(run)).expert_bytes
    placement = DecodePlacement(device_budget=str(4 * size), low_bit_share=1.0)
    found, _, store = written(run, placement)
    assert store.traffic.low_bit > 0
    assert found.shape == tokens.shape
    assert store.low_bit is not None
    assert store.low_bit.expert_bytes < 0.5 * size
    stale = store.low_bit.folder / "model.json"
    stale.write_text('{"step": 1}')  # of an earlier checkpoint
    prepare_decoding(run, low_bit=True)
    assert stale.read_text() != '{"step": 1}'


def test_refusals_are_one_line(run, tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        prepare_decoding(tmp_path)
    with pytest.raises(UserError, match=r"4 experts of .* bytes need at least"):
        open_decoder(run, DecodePlacement(device_budget="1kB"), batch=2)
    with pytest.raises(UserError, match=r"placement.policy is 'mru': use one of lru"):
        DecodePlacement(policy="mru")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"placement.device_budget '2 parsecs' is no size"):
        DecodePlacement(device_budget="2 parsecs")
    with pytest.raises(UserError, match=r"low_bit_share is 1.5"):
        DecodePlacement(low_bit_share=1.5)
