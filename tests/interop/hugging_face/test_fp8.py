"""Checkpoints in FP8 with a scale for each block, as DeepSeek-V3's is published."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.base.errors import UserError
from moe_jax.interop.convert import convert, open_source
from moe_jax.interop.hugging_face import read, save
from tests.interop import folder as small
from tests.interop.hugging_face.test_save import MODELS, TOKENIZER, random_states

ROWS, COLUMNS = 7, 16
"""Of a block. Neither divides the sizes of the matrices here."""
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [ROWS, COLUMNS],
}
PROJECTION = "model.layers.1.mlp.experts.3.up_proj.weight"


def quantised(folder):
    """Rewrites the projections of a folder in FP8; returns every tensor that it stands for."""
    path = folder / "model.safetensors"
    rng = np.random.default_rng(5)
    tensors = load_file(path)
    expected = dict(tensors)
    for name, tensor in list(tensors.items()):
        if "_proj" not in name or tensor.ndim != 2:
            continue
        shape = (-(-tensor.shape[0] // ROWS), -(-tensor.shape[1] // COLUMNS))
        scale = rng.uniform(0.5, 2.0, shape).astype(np.float32)
        values = tensor.astype(ml_dtypes.float8_e4m3fn)
        tensors[name] = values
        tensors[f"{name}_scale_inv"] = scale
        expected[name] = np.empty(tensor.shape, np.float32)
        for row, column in np.ndindex(tensor.shape):  # one number after the other
            own = scale[row // ROWS, column // COLUMNS]
            expected[name][row, column] = np.float32(values[row, column]) * own
    save_file(tensors, path)
    small.change_json(folder / "config.json", {"quantization_config": FP8})
    return expected


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    config = replace(MODELS["deepseek_v3"], layers=2, mtp_depth=0, mtp_input="residual")
    save(folder, config, *random_states(config, 0), TOKENIZER)
    return folder, quantised(folder)


def test_values_are_multiplied_by_the_scale_of_their_block(fp8, tmp_path):
    """Into bfloat16, where the products are rounded, and into float32, where they are exact."""
    folder, expected = fp8
    convert(open_source(str(folder), dtype="float32"), tmp_path / "a")
    exact = load_file(tmp_path / "a/model.safetensors")
    assert exact.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(exact[name], tensor, err_msg=name)
    convert(open_source(str(folder)), tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == "bfloat16"
    rounded = load_file(tmp_path / "b/model.safetensors")[PROJECTION]
    np.testing.assert_array_equal(rounded, expected[PROJECTION].astype(ml_dtypes.bfloat16))


SCALE = f"{PROJECTION}_scale_inv"
BROKEN = {
    "no scale": ({SCALE: None}, "_scale_inv is missing"),
    "scale of another shape": ({SCALE: np.ones((1, 1), np.float32)}, r"has shape \(1, 1\), not"),
    "scale that is no number": ({SCALE: np.nan}, "values that are not finite"),
    "scale without a matrix": ({"stray.weight_scale_inv": np.ones((1, 1), np.float32)}, "no place"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_scales_that_do_not_fit_are_refused(fp8, name):
    change, message = BROKEN[name]
    path = fp8[0] / "model.safetensors"
    whole = path.read_bytes()
    tensors = load_file_with_fp8(path)
    for key, value in change.items():
        if value is None:
            tensors.pop(key)
        else:
            tensors[key] = np.full_like(tensors[key], value) if np.isscalar(value) else value
    try:
        save_file(tensors, path)
        with pytest.raises(UserError, match=message):
            read(fp8[0])
    finally:
        path.write_bytes(whole)


def load_file_with_fp8(path):
    """The library's NumPy interface knows no FP8."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    names = {"F32": np.float32, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + place for place in entry["data_offsets"])
            flat = np.frombuffer(data[begin:end], names[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"fmt": "e5m2"},
        {"weight_block_size": None},
        {"weight_block_size": [0, 1]},
    ],
)
def test_other_quantisation_is_refused(fp8, change):
    path = fp8[0] / "config.json"
    whole = path.read_text()
    try:
        small.change_json(path, {"quantization_config": FP8 | change})
        with pytest.raises(UserError, match=r"quantization_config=|rows is 0"):
            read(fp8[0])
    finally:
        path.write_text(whole)
