"""Models from folders of safetensors, Hugging Face's format, as transformers of ours.

    config, parameters, tokenizer = load("models/SmolLM2-135M")       # or "hf:OWNER/NAME"

Llama, Qwen3 and Qwen3-MoE: config.json, tokenizer.json, and model.safetensors or its shards with
model.safetensors.index.json. The safetensors library compares a file's header with its size.
"""

from moe_jax.interop.hugging_face.folder import HUB, find
from moe_jax.interop.hugging_face.model import load, read

__all__ = ["HUB", "find", "load", "read"]
