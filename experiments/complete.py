"""Continues a text with a trained model whose experts may be more than the memory they are given.

    python experiments/complete.py --run DIR [--text TEXT] [--placement.device-budget 2GB]

The first time, the run's newest checkpoint is written to DIR/decode, a file a layer; from then on
only the trunk is loaded, and experts within the budget. The text is the same for every budget.
"""

import time
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from moe_jax.cli import parse_settings, program
from moe_jax.config import DecodePlacement, require
from moe_jax.placement.traffic import Traffic
from moe_jax.runs.decode import open_decoder
from moe_jax.runs.load import decode_until_end


@dataclass(frozen=True)
class Settings:
    """Continues a text with a trained model."""

    run: str = ""
    """Folder of a training run."""
    text: str = "import os\n\n\ndef "
    """Beginning of a document."""
    tokens: int = 64
    """Tokens to write."""
    temperature: float = 0.8
    """0 takes the most probable token."""
    seed: int = 0
    """Seed of the sampling."""
    placement: DecodePlacement = field(default_factory=DecodePlacement)

    def __post_init__(self) -> None:
        require(self.tokens > 0, f"tokens is {self.tokens}: it must be positive")
        require(self.temperature >= 0, f"temperature is {self.temperature}: it cannot be negative")


def complete(settings: Settings) -> tuple[str, Traffic, float]:
    """(the text and its continuation, what the store did, seconds a token)"""
    require(settings.run != "", "which model? give --run DIR, the folder of a training run")
    decoder, made = open_decoder(settings.run, settings.placement)
    tokenizer = made.tokenizer
    prompt = jnp.asarray([[tokenizer.bos, *tokenizer.encode(settings.text)]], jnp.int32)
    with decoder.store:
        begin = time.perf_counter()
        found = decoder.generate(
            prompt,
            jax.random.key(settings.seed),
            count=settings.tokens,
            vocabulary=tokenizer.vocabulary,
            temperature=settings.temperature,
        )
        seconds = time.perf_counter() - begin
    text = settings.text + decode_until_end(tokenizer, found[0])
    return text, decoder.store.traffic, seconds / (prompt.shape[1] + settings.tokens)


def main(argv: list[str]) -> None:
    """Parses, writes on, reports."""
    settings = parse_settings(Settings(), argv, (__doc__ or "").splitlines()[0])
    text, traffic, seconds = complete(settings)
    print(text)
    print(
        f"\n{1 / seconds:.1f} tokens/s with the first ones' compilation; {traffic.hit_rate:.0%} of "
        f"the experts were resident, {traffic.ahead / max(1, traffic.uses):.0%} came ahead; "
        f"{traffic.disk_bytes / 1e6:.1f} MB from disk, {traffic.host_bytes / 1e6:.1f} MB from host "
        f"memory; at most {traffic.peak_bytes / 1e6:.1f} MB of experts on the device"
    )


if __name__ == "__main__":
    program(main)
