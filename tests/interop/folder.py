"""Small folders of safetensors, written by hand, and what their models compute, in NumPy."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from tests import oracle

WIDTH = 24
HIDDEN = 40
EXPERT = 20
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8
LAYERS = 2
EXPERTS = 4
KINDS = ("llama", "qwen3", "qwen3_moe")
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n")]
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def write_tokenizer(path: Path) -> int:
    """Bytes, four merges and two special tokens; returns the number of tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in MERGES)]
    tokenizer = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    tokenizer.save(str(path))
    return len(tokens) + 2


def config(kind: str, tied: bool, vocabulary: int) -> dict:
    fields = {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "tie_word_embeddings": tied,
        "eos_token_id": [260, 0],
        "bos_token_id": 261,
    }
    if kind == "qwen3_moe":
        fields |= {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": EXPERT,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        }
    return fields


def shapes(kind: str, tied: bool, rows: int) -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (rows, WIDTH),
        "model.norm": (WIDTH,),
    }
    if not tied:
        result["lm_head"] = (rows, WIDTH)
    for i in range(LAYERS):
        here = f"model.layers.{i}"
        result |= {
            f"{here}.input_layernorm": (WIDTH,),
            f"{here}.post_attention_layernorm": (WIDTH,),
            f"{here}.self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
            f"{here}.self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            f"{here}.self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            f"{here}.self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        }
        if kind != "llama":
            result |= {f"{here}.self_attn.{n}_norm": (HEAD_DIM,) for n in "qk"}
        sparse = kind == "qwen3_moe" and i > 0
        places = [(f"{here}.mlp.experts.{e}", EXPERT) for e in range(EXPERTS)]
        for place, hidden in places if sparse else [(f"{here}.mlp", HIDDEN)]:
            result |= {f"{place}.{n}_proj": (hidden, WIDTH) for n in ("gate", "up")}
            result[f"{place}.down_proj"] = (WIDTH, hidden)
        if sparse:
            result[f"{here}.mlp.gate"] = (EXPERTS, WIDTH)
    return result


def write(
    folder: Path,
    kind: str = "llama",
    *,
    tied: bool = True,
    dtype: str = "F32",
    shards: int = 1,
    rows: int = 0,
    change: dict | None = None,
    fields: dict | None = None,
) -> dict[str, np.ndarray]:
    """A model of two blocks; returns its tensors in float64, as the files hold them. `change`
    replaces tensors (None: leaves them out), `fields` those of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = max(rows, write_tokenizer(folder / "tokenizer.json"))
    settings = config(kind, tied, rows) | (fields or {})
    (folder / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    given = {
        f"{name}.weight": rng.normal(size=s, loc=1.0 if len(s) == 1 else 0.0, scale=0.4)
        for name, s in shapes(kind, tied, rows).items()
    } | (change or {})
    tensors = {name: a.astype(DTYPES[dtype]) for name, a in given.items() if a is not None}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        places = {name: names[i % shards] for i, name in enumerate(tensors)}
        for shard in names:
            own = {name: a for name, a in tensors.items() if places[name] == shard}
            save_file(own, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return {name: a.astype(np.float64) for name, a in tensors.items()}


def change_json(path: Path, change: dict) -> None:
    """Replaces fields of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def logits(tensors: dict[str, np.ndarray], kind: str, ids: np.ndarray) -> np.ndarray:
    """[L, V] for one document, written from the published description of the models."""
    w = {name.removesuffix(".weight"): a for name, a in tensors.items()}
    x = w["model.embed_tokens"][ids]
    for i in range(LAYERS):
        here = f"model.layers.{i}"
        h = oracle.rms_norm(x, 1e-5) * w[f"{here}.input_layernorm"]
        q, k, v = (
            (h @ w[f"{here}.self_attn.{n}_proj"].T).reshape(len(ids), -1, HEAD_DIM) for n in "qkv"
        )
        if kind != "llama":
            q = oracle.rms_norm(q, 1e-5) * w[f"{here}.self_attn.q_norm"]
            k = oracle.rms_norm(k, 1e-5) * w[f"{here}.self_attn.k_norm"]
        q = oracle.rotate(q, 5000.0)
        k = oracle.rotate(k, 5000.0)
        mixed = oracle.attention(q, k, v, np.zeros(len(ids)))
        x = x + mixed.reshape(len(ids), -1) @ w[f"{here}.self_attn.o_proj"].T
        h = oracle.rms_norm(x, 1e-5) * w[f"{here}.post_attention_layernorm"]
        x = x + np.stack([_feed_forward(w, f"{here}.mlp", token) for token in h])
    x = oracle.rms_norm(x, 1e-5) * w["model.norm"]
    return x @ w.get("lm_head", w["model.embed_tokens"]).T


def _feed_forward(w: dict[str, np.ndarray], place: str, token: np.ndarray) -> np.ndarray:
    def one(place: str) -> np.ndarray:
        gate, up, down = (w[f"{place}.{n}_proj"] for n in ("gate", "up", "down"))
        z = gate @ token
        return down @ (z * oracle.sigmoid(z) * (up @ token))

    if f"{place}.gate" not in w:
        return one(place)
    p = oracle.softmax(w[f"{place}.gate"] @ token)
    best = np.argsort(-p)[:2]
    return sum(p[e] / p[best].sum() * one(f"{place}.experts.{e}") for e in best)
