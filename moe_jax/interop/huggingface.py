"""Models from folders of safetensors (Hugging Face's format), as transformers of ours.

    config, params, tokenizer = load("models/SmolLM2-135M")       # or "hf:OWNER/NAME"

Llama, Qwen3 and Qwen3-MoE: config.json, tokenizer.json, and model.safetensors or its shards with
model.safetensors.index.json. The safetensors library checks a file's header against its size.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from moe_jax.base.errors import UserError
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.interop.huggingface_tokenizer import read_tokenizer
from moe_jax.interop.parameters import Tensors, as_parameters, number, read_arrays, whole

HUB = "hf:"
CONFIG, TOKENIZER, WHOLE = "config.json", "tokenizer.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_JSON_BYTES = 64 << 20
"""The longest tokenizer.json of the published models has half of it."""
DTYPES = ("F32", "F16", "BF16")
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
"""interop.parameters' name of a tensor -> the file's. Rotary halves lie as in ours."""
PLAIN: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "decoder_sparse_step": 1,
}
"""Settings that we know at one value only."""


def load(path: str | Path) -> tuple[ModelConfig, nnx.State, Tokenizer]:
    """The model in a folder, or on the hub: its config, the parameters of `Transformer(config)`
    (float32), and its tokenizer.

    UserError, one line: no such folder or no network (with the command that gets it), a model or a
    tokenizer that is not supported, or files that are damaged or lie. Memory: the float32
    parameters once, besides one tensor of the mapped files.
    """
    config, arrays, tokenizer = read(path)
    return config, as_parameters(config, arrays), tokenizer


def read(path: str | Path) -> tuple[ModelConfig, dict[str, np.ndarray], Tokenizer]:
    """`load` with the parameters as NumPy arrays by dotted name."""
    place = find(path)
    try:
        fields = read_json(place / CONFIG)
        tensors = SafeTensors(place)
        config = read_config(fields)
        arrays = read_arrays(tensors, config)
        assert config.vocabulary is not None
        ends = [_end(fields, name) for name in ("bos_token_id", "eos_token_id")]
        tokenizer = read_tokenizer(read_json(place / TOKENIZER), config.vocabulary, *ends)
        return config, arrays, tokenizer
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror or error}") from error


def find(path: str | Path) -> Path:
    """The folder that `path` names; `hf:OWNER/NAME` is fetched from the hub, once. UserError: there
    is none, or it cannot be fetched."""
    if str(path).startswith(HUB):
        return _from_hub(str(path).removeprefix(HUB))
    place = Path(path).expanduser()
    if not place.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
        hint = f"{HUB}{path} for the hub's model of that name" if hub else f"{HUB}OWNER/NAME"
        raise UserError(
            f"there is no folder {place}: give one with {CONFIG}, {WHOLE} and {TOKENIZER}, "
            f"or {hint}"
        )
    return place


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"{HUB}{name} needs a further package: pip install 'moe_jax[teacher]'"
        ) from error
    files = [CONFIG, TOKENIZER, INDEX, "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot fetch {HUB}{name}: {reason}; where there is a network, hf download {name} "
            f"--local-dir {name.rpartition('/')[2] or 'FOLDER'}, and name that folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UserError: the file is missing, too long, or no object."""
    if not path.is_file():
        raise UserError(f"{path.name} is missing")
    if path.stat().st_size > MOST_JSON_BYTES:
        raise UserError(f"{path.name} has more than {MOST_JSON_BYTES >> 20} MiB")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path.name} is no JSON: {reason}; fetch the file again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path.name} holds no JSON object; fetch the file again")
    return found


def read_config(fields: dict[str, Any]) -> ModelConfig:
    """Our settings for config.json. UserError: another kind of model, or a field is missing or
    absurd."""
    kind = fields.get("model_type")
    if kind not in ("llama", "qwen3", "qwen3_moe"):
        raise UserError(f"model_type {kind!r} is not supported: use llama, qwen3 or qwen3_moe")
    for name, plain in PLAIN.items():
        if fields.get(name, plain) not in (plain, None):
            raise UserError(f"{name}={fields[name]!r} is not supported: only {plain!r} is")
    if set(_list(fields, "layer_types")) - {"full_attention"}:
        raise UserError("layer_types other than full_attention are not supported")

    def at(name: str, default: Any = None) -> tuple[str, Any]:
        value = fields.get(name)
        return name, default if value is None else value

    width, heads = whole(*at("hidden_size")), whole(*at("num_attention_heads"))
    layers, sparse = whole(*at("num_hidden_layers")), kind == "qwen3_moe"
    head_dim = 128 if kind != "llama" else max(width // heads, 1)
    return ModelConfig(
        vocabulary=whole(*at("vocab_size")),
        width=width,
        layers=layers,
        dense_layers=_dense_layers(fields, layers) if sparse else layers,
        dense_hidden=whole(*at("intermediate_size")),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=whole(*at("num_key_value_heads", heads)),
            head_dim=whole(*at("head_dim", head_dim)),
            qk_norm="none" if kind == "llama" else "head",
        ),
        moe=_experts(at) if sparse else MoEConfig(),
        tied_embedding=_flag(fields, "tie_word_embeddings"),
        norm_epsilon=number(*at("rms_norm_eps", 1e-6)),
        rope_base=_rope_base(fields),
    )


def _experts(at: Any) -> MoEConfig:
    name, value = at("norm_topk_prob", False)
    count = at("num_experts", at("num_local_experts")[1])  # transformers 4 and 5
    return MoEConfig(
        experts=whole(*count),
        experts_per_token=whole(*at("num_experts_per_tok")),
        expert_hidden=whole(*at("moe_intermediate_size")),
        shared_experts=0,
        gate="softmax",
        normalise=_flag({name: value}, name),
        bias_rate=0.0,
    )


def _dense_layers(fields: dict[str, Any], layers: int) -> int:
    """Blocks with a dense feed-forward: only the first ones may be."""
    dense = _list(fields, "mlp_only_layers")
    if dense != list(range(len(dense))) or len(dense) > layers:
        raise UserError(f"mlp_only_layers={dense!r} is not supported: only the first blocks are")
    return len(dense)


def _rope_base(fields: dict[str, Any]) -> float:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"the rope's parameters are {rope!r}: an object is needed")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"rope scaling ({kind!r}) is not supported: use a model without it")
    base = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
    return number("rope_theta", base, most=1e12)


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r}: true or false is needed")
    return value


def _list(fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(name) or []
    if not isinstance(value, list) or not all(isinstance(v, int | str) for v in value):
        raise UserError(f"{name} is {value!r}: a list is needed")
    return value


def _end(fields: dict[str, Any], name: str) -> Any:
    """A token that opens or closes a document; models with several name the chief one first."""
    value = fields.get(name)
    return value[0] if isinstance(value, list) and value else value


class SafeTensors(Tensors):
    """The tensors of a folder's shards. UserError: a shard is missing, damaged or elsewhere."""

    def __init__(self, folder: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        for shard in _shards(folder):
            file = _told(shard, lambda shard=shard: safe_open(folder / shard, framework="np"))
            for name in file.keys():  # noqa: SIM118
                if name in self.shapes:
                    raise UserError(f"tensor {name} is in two files")
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                self._files[name] = file

    def name(self, part: str, layer: int | None, expert: int | None) -> str:
        name = NAMES[part]
        if expert is not None:
            name = name.replace("mlp.", f"mlp.experts.{expert}.")
        return f"{name}.weight" if layer is None else f"model.layers.{layer}.{name}.weight"

    def read(self, name: str, part: str) -> np.ndarray:
        file = self._files[name]
        kind = file.get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise UserError(f"tensor {name} has type {kind}: only {', '.join(DTYPES)} are read")
        return _told(name, lambda: file.get_tensor(name)).astype(np.float32)

    def ignored(self, name: str) -> bool:
        """Old files hold the rotary frequencies that follow from rope_theta; and the head of a tied
        model (an untied one needs it) is its embedding."""
        return name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight"


def _shards(folder: Path) -> list[str]:
    """File names, by the index if there is one; they may not lead out of the folder."""
    if not (folder / INDEX).is_file():
        shards = [WHOLE]
    else:
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{INDEX} has no weight_map; fetch the file again")
        shards = list(dict.fromkeys(map(str, places.values())))
    for shard in shards:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise UserError(f"{INDEX} names {shard!r}: no safetensors file of this folder")
        if not (folder / shard).is_file():
            raise UserError(f"{shard} is missing")
    return shards


def _told(what: str, action: Callable[[], Any]) -> Any:
    """action(), with what the library finds wrong as a UserError of one line."""
    try:
        return action()
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what} is damaged ({reason}): fetch the file again") from error
