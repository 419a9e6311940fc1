"""Models from GGUF files, the format of llama.cpp, as dense transformers of ours.

    config, parameters, tokenizer = load("smollm2")     # or the path of any Llama or Qwen3 file

The package `gguf` (pip install 'moe_jax[teacher]') decodes the quantised tensors. header.py reads
everything else, because that library believes every length in a file.
"""

from moe_jax.interop.gguf.model import GET_LIBRARY, GET_SMOLLM2, SMOLLM2, find, load, read

__all__ = ["GET_LIBRARY", "GET_SMOLLM2", "SMOLLM2", "find", "load", "read"]
