"""Models from and to folders of safetensors, Hugging Face's format, as transformers of ours.

    config, parameters, tokenizer = load("models/SmolLM2-135M")       # or "hf:OWNER/NAME"
    save("models/mine", config, parameters, router, tokenizer)

families.py lists the families. A folder has config.json, tokenizer.json, and model.safetensors or
its shards with model.safetensors.index.json. The safetensors library compares a file's header with
its size.
"""

from moe_jax.interop.hugging_face.folder import HUB, find
from moe_jax.interop.hugging_face.model import Model, load, load_model, read
from moe_jax.interop.hugging_face.writer import save

__all__ = ["HUB", "Model", "find", "load", "load_model", "read", "save"]
