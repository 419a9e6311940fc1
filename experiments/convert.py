"""Rewrites a run or a published model as a folder of safetensors that transformers loads.

    python experiments/convert.py SRC DST [--dtype bfloat16] [--mtp drop] [--check]

SRC is the --out of a training run, a folder of safetensors, hf:OWNER/NAME, or a GGUF file. Its
tensors are read one by one, so that a published model may be larger than memory. A run is read
whole. The same command goes on after a kill. DST/conversion.json holds the hash of every file.
--check loads both models and compares what they predict.
"""

import time
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.base.console import progress, say
from moe_jax.base.machine import peak_resident_bytes
from moe_jax.base.paths import user_path
from moe_jax.cli import parse_settings, program
from moe_jax.config import require
from moe_jax.config.checks import parse_bytes, positive
from moe_jax.distill.teacher import Teacher
from moe_jax.interop.convert import convert, size_of
from moe_jax.model.abstract import graph_of
from moe_jax.runs.weights import load_weights, open_weights

MOST_DIVERGENCE = 0.015
"""nats. A largest Kullback-Leibler divergence of a position above it is an error (MaxText's gate).
bfloat16 in place of float32 stays far below."""
TEXT = "def mean(values):\n    return sum(values) / len(values)\n\n\nThe mean of 1, 2 and 6 is 3. "


@dataclass(frozen=True)
class Settings:
    """Rewrites a model as a folder of safetensors."""

    source: str = ""
    """SRC: a run, a folder of safetensors, hf:OWNER/NAME, or a GGUF file."""
    target: str = ""
    """DST: the folder to be written."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Type of the tensors. `stored` is the source's, and bfloat16 for an FP8 model."""
    mtp: Literal["keep", "drop"] = "keep"
    """Modules of multi-token prediction."""
    shard: str = "4GiB"
    """Most bytes of a file."""
    length: int = 4096
    """Context that config.json names. Nothing that is computed depends on it."""
    check: bool = False
    """Compare the log-probabilities of both on a text. Both are loaded whole, in float32."""
    text: str = TEXT
    """The text of --check."""

    def __post_init__(self) -> None:
        positive("", self, "length")
        require(parse_bytes("shard", self.shard) > 0, "shard is 0: it must be positive")


def run(settings: Settings) -> None:
    """Converts, and checks if asked to."""
    both = bool(settings.source and settings.target)
    require(both, "name both models: python experiments/convert.py SRC DST")
    begin = time.perf_counter()
    source = open_weights(
        settings.source,
        dtype=None if settings.dtype == "stored" else settings.dtype,
        mtp=settings.mtp,
    )
    target = user_path(settings.target)
    most = parse_bytes("shard", settings.shard)
    with progress("writing tensors", size_of(source.config)) as advance:
        convert(source, target, shard_bytes=most, length=settings.length, on_bytes=advance)
    seconds = time.perf_counter() - begin
    say(
        f"{target}: {_bytes_of(target) / 1e6:,.1f} MB in {seconds:.1f} s, "
        f"peak memory {peak_resident_bytes() / 1e6:,.0f} MB"
    )
    if settings.check:
        check(load_weights(settings.source), load_weights(settings.target), settings.text)


def check(source: Teacher, target: Teacher, text: str) -> float:
    """The largest divergence of a position, in nats. UserError: it is above MOST_DIVERGENCE."""
    ids = source.tokenizer.encode(text)
    require(len(ids) > 0, "text is empty: --check needs one")
    require(
        ids.tolist() == target.tokenizer.encode(text).tolist(),
        "the two tokenizers cut the text in different tokens",
    )
    before, after = (_log_probabilities(model, ids) for model in (source, target))
    divergence = float((np.exp(before) * (before - after)).sum(-1).max())
    largest = np.abs(before - after).max()
    say(
        f"{len(ids)} tokens: log-probabilities differ by at most {largest:.1e}, "
        f"the largest divergence of a position is {divergence:.1e} nats"
    )
    require(
        divergence <= MOST_DIVERGENCE,
        f"the models differ: {divergence:.3g} nats exceed {MOST_DIVERGENCE}",
    )
    return divergence


def _log_probabilities(model: Teacher, ids: np.ndarray) -> np.ndarray:
    tokens = jnp.asarray([[model.tokenizer.bos, *ids]], jnp.int32)
    whole = nnx.merge(graph_of(model.model), model.parameters, model.router)
    logits = nnx.jit(lambda whole, tokens: whole(tokens, jnp.ones_like(tokens)))(whole, tokens)
    return np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)), np.float64)


def _bytes_of(target: Path) -> int:
    return sum(file.stat().st_size for file in target.glob("*.safetensors"))


def main(argv: list[str]) -> None:
    """Parses and converts."""
    # SRC and DST stand first and without a name.
    named = list(takewhile(lambda word: not word.startswith("-"), argv[:2]))
    options = [word for pair in zip(("--source", "--target"), named, strict=False) for word in pair]
    argv = options + argv[len(named) :]
    run(parse_settings(Settings(), argv, (__doc__ or "").splitlines()[0]))


if __name__ == "__main__":
    program(main)
