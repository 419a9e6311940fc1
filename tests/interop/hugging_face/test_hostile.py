"""Damaged and malicious files are refused in one line and without memory."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moe_jax.base.errors import UserError
from moe_jax.interop.hugging_face import folder as model_folder
from moe_jax.interop.hugging_face import read
from moe_jax.interop.hugging_face.config import read_config, read_layout
from moe_jax.interop.hugging_face.export import write_config
from tests.interop import folder as small
from tests.interop.hugging_face.test_save import MODELS


def header(entries, body=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NAME = "model.embed_tokens.weight"
HOSTILE = {
    "empty": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "header longer than the file": header({}, length=2**62),
    "no JSON": header(b"{" * 50),
    "deep": header(b"[" * 100_000),
    "beyond the file": header({NAME: entry([262, 24], 0, 262 * 96)}, bytes(100)),
    "shared bytes": header({NAME: entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),
    "a hole": header({NAME: entry([1], 4, 8)}, bytes(8)),
    "unknown type": header({NAME: entry([1], 0, 4, "F99")}, bytes(4)),
    "huge": header({NAME: entry([2**62, 4], 0, 4)}, bytes(4)),
    "another size": header({NAME: entry([8], 0, 4)}, bytes(4)),
    "negative": header({NAME: entry([-1], 0, 4)}, bytes(4)),
    "no columns": header({NAME: entry([262, 0], 0, 0)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_without_memory(tmp_path, name):
    small.write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None]
)
def test_an_index_may_not_lead_out_of_the_folder(tmp_path, place):
    small.write(tmp_path, shards=2)
    (tmp_path.parent / "secret.safetensors").write_bytes(b"")
    small.change_json(tmp_path / model_folder.INDEX, {"weight_map": {NAME: place}})
    with pytest.raises(UserError, match="no safetensors file of this folder"):
        read(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    small.write(tmp_path, shards=2)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match="is in two files"):
        read(tmp_path)


def test_pickles_are_refused_with_the_reason(tmp_path):
    small.write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin is not read: a pickle can run any code"
    ):
        read(tmp_path)


def test_a_tensor_that_is_missing_twice_or_of_another_kind_in_a_sparse_model(tmp_path):
    small.write(tmp_path, "qwen3_moe")
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    changes = {
        f"tensor {name} is missing": {name: None},
        rf"{name} has shape \(20, 24\), not \(24, 20\)": {name: whole[name].T.copy()},
        f"{name} has type I8": {name: whole[name].astype(np.int8)},
        "experts.4.down_proj.weight has no place": {name.replace(".3.", ".4."): whole[name]},
        "e_score_correction_bias has no place": {
            "model.layers.1.mlp.gate.e_score_correction_bias": np.zeros(4, np.float32)
        },
    }
    for message, change in changes.items():
        save_file({k: v for k, v in (whole | change).items() if v is not None}, path)
        with pytest.raises(UserError, match=message):
            read(tmp_path)


def test_json_that_is_none_or_too_long(tmp_path, monkeypatch):
    small.write(tmp_path)
    path = tmp_path / "config.json"
    for text in ("", "[]", "{", "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=r"config\.json") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(model_folder, "MOST_JSON_BYTES", 1 << 20)
    path.write_bytes(b" " * (1 << 21))
    with pytest.raises(UserError, match="more than 1 MiB"):
        read(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folders that the fuzz tests damage and mend."""
    base = tmp_path_factory.mktemp("fuzz")
    for kind in small.KINDS:
        small.write(base / kind, kind, shards=2)
    return base


def harmless_or_refused(folder: Path) -> None:
    said = ""
    tracemalloc.start()
    try:
        read(folder)
    except UserError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2e7
    assert "\n" not in said


FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
absurd = st.one_of(
    [
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.integers(0, 1_000_000),
        st.floats(),
        st.text(max_size=5),
        st.lists(st.integers(-3, 3), max_size=3),
        st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "x"]), st.floats(), max_size=2),
    ]
)


@FUZZ
@given(st.data())
def test_fuzz_config(shared, data):
    """Any settings are either harmless or a UserError."""
    folder = shared / data.draw(st.sampled_from(small.KINDS))
    path = folder / "config.json"
    whole = (folder / "config.json").read_text()
    fields = json.loads(whole)
    names = st.sampled_from([*fields, "rope_parameters", "layer_types", "hidden_act"])
    fields |= data.draw(st.dictionaries(names, absurd, min_size=1, max_size=3))
    for name in data.draw(st.lists(st.sampled_from(list(fields)), max_size=2)):
        fields.pop(name, None)
    try:
        path.write_text(json.dumps(fields))
        harmless_or_refused(folder)
    finally:
        path.write_text(whole)


WRITTEN = {name: write_config(model, 256, 257, 4096) for name, model in MODELS.items()}


@settings(max_examples=150, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(st.data())
def test_fuzz_config_of_every_family(data):
    """The same for the fields of each family, and for those of another."""
    fields = dict(WRITTEN[data.draw(st.sampled_from(sorted(WRITTEN)))])
    other = WRITTEN[data.draw(st.sampled_from(sorted(WRITTEN)))]
    names = st.sampled_from(sorted({*fields, *other, "rope_parameters"}))
    for name in data.draw(st.lists(names, max_size=3)):
        fields.pop(name, None)
    fields |= {
        name: other[name] for name in data.draw(st.lists(names, max_size=3)) if name in other
    }
    fields |= data.draw(st.dictionaries(names, absurd, max_size=3))
    said = ""
    try:
        read_config(fields)
        read_layout(fields)
    except UserError as error:
        said = str(error)
    assert "\n" not in said


@FUZZ
@given(st.data())
def test_fuzz_bytes(shared, data):
    """The same for any byte of any file; the headers get most of it."""
    folder = shared / data.draw(st.sampled_from(small.KINDS))
    path = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.is_file())))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    reach = len(whole) if data.draw(st.booleans()) else min(len(whole), 1500)
    for place in data.draw(st.lists(st.integers(0, reach - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.sampled_from([0, 48, 57, 91, 123, 125, 127, 128, 255]))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
    try:
        path.write_bytes(bytes(damaged[:cut]))
        harmless_or_refused(folder)
    finally:
        path.write_bytes(whole)
