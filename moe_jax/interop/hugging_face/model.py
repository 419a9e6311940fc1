"""A model, whole, from a folder of safetensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.base.console import working
from moe_jax.base.errors import UserError, quote, reading, require
from moe_jax.config import DType, ModelConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop.assemble import as_parameters, as_router, read_arrays
from moe_jax.interop.fields import Fields
from moe_jax.interop.hugging_face.config import read_config, read_layout
from moe_jax.interop.hugging_face.folder import CONFIG, TOKENIZER, find, read_json
from moe_jax.interop.hugging_face.tensors import SafeTensors
from moe_jax.interop.hugging_face.tokenizer import read_tokenizer

MTP = Literal["keep", "drop"]


class Model(NamedTuple):
    """A published model, in the order of `save`'s arguments."""

    config: ModelConfig
    parameters: nnx.State
    router: nnx.State
    """The selection biases, which no optimizer touches."""
    tokenizer: Tokenizer


def load(path: str | Path) -> tuple[ModelConfig, nnx.State, Tokenizer]:
    """The model in a folder, or on the hub: its config, the parameters of `Transformer(config)`
    (float32), and its tokenizer.

    UserError, in one line: there is no such folder or no network (with the command that gets it),
    a model or a tokenizer is not supported, files are damaged or malicious, or the model has
    selection biases, which load_model gives. Memory: the float32 parameters once, besides one
    tensor of the mapped files.
    """
    config, parameters, router, tokenizer = load_model(path)
    biased = any(bool(jnp.any(bias != 0)) for bias in jax.tree.leaves(router))
    require(
        not biased,
        f"{path} has selection biases (e_score_correction_bias): use load_model, which gives them",
    )
    return config, parameters, tokenizer


def load_model(path: str | Path, *, param_dtype: DType = "float32", mtp: MTP = "keep") -> Model:
    """The model in a folder, or on the hub, with its selection biases. Errors as `load`.

    `param_dtype`: the type of the parameters in memory. Biases are float32. `mtp`: whether modules
    of multi-token prediction are kept where the files have them.
    """
    config, arrays, tokenizer = read(path, param_dtype=param_dtype, mtp=mtp)
    return Model(config, as_parameters(config, arrays), as_router(config, arrays), tokenizer)


def read(
    path: str | Path, *, param_dtype: DType = "float32", mtp: MTP = "keep"
) -> tuple[ModelConfig, dict[str, np.ndarray], Tokenizer]:
    """`load_model` with the parameters and biases as NumPy arrays by dotted name."""
    folder = find(path)
    with working(f"reading {folder}"), reading(folder):
        config, tensors = open_folder(folder, mtp=mtp)
        config = replace(config, param_dtype=param_dtype)
        arrays = read_arrays(tensors, config, param_dtype)
        return config, arrays, tokenizer_of(folder, config)


def open_folder(folder: Path, *, mtp: MTP = "keep") -> tuple[ModelConfig, SafeTensors]:
    """The config of the model in a folder, and its tensors, of which none is read yet."""
    fields = read_json(folder / CONFIG)
    config = read_config(fields)
    tensors = SafeTensors(folder, read_layout(fields), _fp8_blocks(fields))
    # transformers writes the number of modules into config.json and their tensors nowhere.
    if config.mtp_depth and (mtp == "drop" or not tensors.holds_layer(config.layers)):
        tensors.without_mtp(config.layers)
        config = replace(config, mtp_depth=0, mtp_input="residual")
    return config, tensors


def tokenizer_of(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in the folder of a model."""
    assert config.vocabulary is not None
    fields = read_json(folder / CONFIG)
    return read_tokenizer(
        read_json(folder / TOKENIZER),
        rows=config.vocabulary,
        bos=first_token(fields, "bos_token_id"),
        eos=first_token(fields, "eos_token_id"),
    )


def _fp8_blocks(fields: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale. UserError: another kind of quantisation."""
    value = fields.get("quantization_config")
    if value is None:
        return None
    own = Fields(value if isinstance(value, dict) else {})
    blocks = own.get("weight_block_size")
    pair = isinstance(blocks, list) and len(blocks) == 2
    if own.get("quant_method") != "fp8" or own.get("fmt", "e4m3") != "e4m3" or not pair:
        raise UserError(
            f"quantization_config={quote(value)} is not supported: only fp8 (e4m3) with a "
            "weight_block_size of two numbers is"
        )
    sizes = Fields({"rows": blocks[0], "columns": blocks[1]}, "")
    return sizes.integer("rows"), sizes.integer("columns")


def first_token(fields: dict[str, Any], name: str) -> Any:
    """A token that opens or closes a document. Models with several list the main one first."""
    value = fields.get(name)
    return value[0] if isinstance(value, list) and value else value
