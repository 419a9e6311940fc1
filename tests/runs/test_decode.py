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


def damage(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def in_a_record(path):
    """Offset of a byte of the first record."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little") + 5


@pytest.fixture
def own_run(finished_run, tmp_path):
    """A copy of the finished run's checkpoints, prepared for decoding."""
    shutil.copytree(f"{finished_run.out}/checkpoints", tmp_path / "checkpoints")
    prepare_decoding(tmp_path, low_bit=True)
    return tmp_path


def test_a_damaged_expert_is_written_again_from_the_checkpoint(own_run, capsys):
    path = own_run / "decode" / layer_name(0)
    whole = path.read_bytes()
    tokens, _, _ = written(own_run, DecodePlacement())
    capsys.readouterr()
    records = "decode/layer-000.parameters.safetensors"
    damages = {
        "is corrupt (its checksum does not hold)": lambda: damage(path, in_a_record(path)),
        "is no file of experts": lambda: damage(path, 12),
        "is truncated: it has": lambda: path.write_bytes(whole[:-4096]),
        "is incomplete, its writer was interrupted": lambda: path.write_bytes(bytes(9000)),
        "holds no experts": path.unlink,
    }
    for fault, harm in damages.items():
        harm()
        found, _, _ = written(own_run, DecodePlacement())
        np.testing.assert_array_equal(found, tokens)
        assert path.read_bytes() == whole
        said = capsys.readouterr().out.replace("\n", "")
        assert f"{fault}" in said
        assert said.endswith(": the experts are written again from the checkpoint")
        assert (records in said) or fault == "holds no experts"


def test_damaged_eight_bit_copies_are_written_again(own_run, capsys):
    placement = DecodePlacement(low_bit_share=1.0)
    tokens, _, _ = written(own_run, placement)
    path = own_run / "decode" / decoding.LOW_BIT / layer_name(0)
    whole = path.read_bytes()
    size = ExpertFiles(own_run / "decode").expert_bytes
    damage(path, in_a_record(path))
    written(own_run, replace(placement, device_budget=str(4 * size)))
    assert path.read_bytes() == whole
    assert "the 8-bit copies are written again" in capsys.readouterr().out.replace("\n", " ")
    # The experts that they are made from are damaged as well.
    damage(path, in_a_record(path))
    damage(own_run / "decode" / layer_name(0), in_a_record(path))
    found, _, _ = written(own_run, placement)
    np.testing.assert_array_equal(found, tokens)


def test_a_damaged_expert_of_a_damaged_checkpoint_is_one_line(own_run):
    folder = own_run / "decode"
    newest = newest_step(own_run)
    steps = sorted(int(p.name) for p in (own_run / "checkpoints").iterdir() if p.name.isdigit())
    damage(own_run / "checkpoints" / str(newest) / "extra" / "metadata", 3)
    damage(folder / layer_name(0), in_a_record(folder / layer_name(0)))
    with pytest.raises(UserError, match=rf"takes step {steps[-2]}$"):
        written(own_run, DecodePlacement())
    written(own_run, DecodePlacement())  # of that step
    damage(folder / layer_name(0), in_a_record(folder / layer_name(0)))
    for step in steps:
        (own_run / "checkpoints" / str(step) / "extra" / "metadata").write_bytes(b"{")
    before = (folder / "model.json").read_bytes()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        written(own_run, DecodePlacement())
    assert (folder / "model.json").read_bytes() == before


def test_refusals_are_one_line(run, tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        prepare_decoding(tmp_path)
    with pytest.raises(UserError, match=r"4 experts of .* bytes need at least"):
        open_decoder(run, DecodePlacement(device_budget="1kB"), batch=2)
    with pytest.raises(UserError, match=r"placement\.policy is 'mru': use one of lru"):
        DecodePlacement(policy="mru")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"placement.device_budget '2 parsecs' is no size"):
        DecodePlacement(device_budget="2 parsecs")
    with pytest.raises(UserError, match=r"low_bit_share is 1.5"):
        DecodePlacement(low_bit_share=1.5)
