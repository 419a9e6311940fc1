"""A model, whole, from a folder of safetensors."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moe_jax.base.errors import reading
from moe_jax.config import ModelConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop.assemble import as_parameters, read_arrays
from moe_jax.interop.hugging_face.config import read_config
from moe_jax.interop.hugging_face.folder import CONFIG, TOKENIZER, find, read_json
from moe_jax.interop.hugging_face.tensors import SafeTensors
from moe_jax.interop.hugging_face.tokenizer import read_tokenizer


def load(path: str | Path) -> tuple[ModelConfig, nnx.State, Tokenizer]:
    """The model in a folder, or on the hub: its config, the parameters of `Transformer(config)`
    (float32), and its tokenizer.

    UserError, in one line: there is no such folder or no network (with the command that gets it),
    a model or a tokenizer is not supported, or files are damaged or malicious. Memory: the float32
    parameters once, besides one tensor of the mapped files.
    """
    config, arrays, tokenizer = read(path)
    return config, as_parameters(config, arrays), tokenizer


def read(path: str | Path) -> tuple[ModelConfig, dict[str, np.ndarray], Tokenizer]:
    """`load` with the parameters as NumPy arrays by dotted name."""
    folder = find(path)
    with reading(folder):
        return _read(folder)


def _read(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray], Tokenizer]:
    fields = read_json(folder / CONFIG)
    tensors = SafeTensors(folder)
    config = read_config(fields)
    assert config.vocabulary is not None
    arrays = read_arrays(tensors, config)
    tokenizer = read_tokenizer(
        read_json(folder / TOKENIZER),
        rows=config.vocabulary,
        bos=_first_token(fields, "bos_token_id"),
        eos=_first_token(fields, "eos_token_id"),
    )
    return config, arrays, tokenizer


def _first_token(fields: dict[str, Any], name: str) -> Any:
    """A token that opens or closes a document. Models with several list the main one first."""
    value = fields.get(name)
    return value[0] if isinstance(value, list) and value else value
