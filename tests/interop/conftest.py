"""Small GGUF files, written by the gguf library."""

from pathlib import Path

import gguf
import numpy as np
import pytest

WIDTH = 32
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
LAYERS = 2
HEAD_DIM = {"llama": 16, "qwen3": 128}
"""transformers takes 128 for every qwen3 file."""
MERGES = ["Ġ t", "h e", "Ġt he", "i n"]


def byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tokens() -> list[str]:
    return ["<|end|>", "<|start|>", *byte_alphabet(), *(m.replace(" ", "") for m in MERGES)]


def tensors(architecture: str, tied: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    head_dim = HEAD_DIM[architecture]
    queries = HEADS * head_dim
    keys = KV_HEADS * head_dim
    shapes = {"token_embd": (len(tokens()), WIDTH), "output_norm": (WIDTH,)}
    if not tied:
        shapes["output"] = (len(tokens()), WIDTH)
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (WIDTH,),
            f"blk.{i}.attn_q": (queries, WIDTH),
            f"blk.{i}.attn_k": (keys, WIDTH),
            f"blk.{i}.attn_v": (keys, WIDTH),
            f"blk.{i}.attn_output": (WIDTH, queries),
            f"blk.{i}.ffn_norm": (WIDTH,),
            f"blk.{i}.ffn_gate": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_up": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_down": (WIDTH, HIDDEN),
        }
        if architecture == "qwen3":
            shapes |= {f"blk.{i}.attn_{n}_norm": (head_dim,) for n in "qk"}
    spread = {1: 1.0, 2: 0.3}
    return {k: rng.normal(size=s).astype(np.float32) * spread[len(s)] for k, s in shapes.items()}


def write(
    path: Path,
    architecture: str = "llama",
    tied: bool = True,
    quantised: str | None = None,
    change: dict | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """A model of two blocks. `change` replaces metadata (name -> value) or tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    change = change or {}
    head_dim = HEAD_DIM.get(architecture, 16)
    fields = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": len(tokens()),
    }
    for name, value in fields.items():
        writer.add_uint32(f"{architecture}.{name}", change.pop(name, value))
    writer.add_float32(f"{architecture}.rope.freq_base", 5000.0)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model(change.pop("model", "gpt2"))
    writer.add_tokenizer_pre(change.pop("pre", "smollm"))
    writer.add_token_list(change.pop("tokens", tokens()))
    writer.add_token_types([3, 3] + [1] * (len(tokens()) - 2))
    writer.add_token_merges(change.pop("merges", MERGES))
    writer.add_bos_token_id(change.pop("bos", 1))
    writer.add_eos_token_id(0)
    given = tensors("qwen3" if architecture == "qwen3" else "llama", tied)
    for name, array in (given | change).items():
        if name in without:
            continue
        kind = None
        if quantised and array.ndim == 2:
            kind = getattr(gguf.GGMLQuantizationType, quantised)
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(f"{name}.weight", array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    return write(tmp_path / "small.gguf")
