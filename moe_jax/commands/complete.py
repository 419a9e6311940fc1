"""Continues a text with a trained model whose experts may be more than the memory they are given.

    python experiments/complete.py --run DIR [--text TEXT] [--placement.device-budget 2GB]

The first time, the run's newest checkpoint is written to DIR/decode, a file a layer. From then on
only the trunk is loaded, and experts within the budget. The text is the same for every budget.
"""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.base.initial import root_key
from moe_jax.base.provenance import call_of
from moe_jax.cli import parse_settings
from moe_jax.config import DecodePlacement, require
from moe_jax.config.checks import not_negative
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
        not_negative("", self, "temperature")


class Completion(NamedTuple):
    """A text with its continuation."""

    text: str
    traffic: Traffic
    """Counts of the store of experts."""
    seconds: float | None
    """A generated token, the median. Compiling and the prompt are before the first one.
    None: a single token was generated."""


def complete(settings: Settings) -> Completion:
    """Continues settings.text with the model of settings.run."""
    require(settings.run != "", "which model? give --run DIR, the folder of a training run")
    decoder, run = open_decoder(settings.run, settings.placement)
    tokenizer = run.tokenizer
    prompt = jnp.asarray([[tokenizer.bos, *tokenizer.encode(settings.text)]], jnp.int32)
    with decoder.store:
        times: list[float] = []
        tokens = decoder.generate(
            prompt,
            root_key(settings.seed),
            count=settings.tokens,
            vocabulary=tokenizer.vocabulary,
            temperature=settings.temperature,
            on_token=lambda: times.append(time.perf_counter()),
        )
    text = settings.text + decode_until_end(tokenizer, tokens[0])
    # The median, because what is used for the first time later on is compiled then.
    seconds = float(np.median(np.diff(times))) if len(times) > 1 else None
    return Completion(text, decoder.store.traffic, seconds)


def describe(completion: Completion, budget: str) -> str:
    """Speed, and what the store of experts did. `budget`: placement.device_budget."""
    traffic = completion.traffic
    megabytes = f"{traffic.peak_bytes / 1e6:.1f} MB"
    speed = ""
    if completion.seconds is not None:
        speed = f"{1 / completion.seconds:.1f} tokens/s, the median token, without compilation. "
    if not budget:
        return (
            f"{speed}The device has room for all experts. The text used {megabytes} of them. "
            "--placement.device-budget gives them less room."
        )
    ahead = traffic.ahead / max(1, traffic.uses)
    return (
        f"{speed}{traffic.hit_rate:.0%} of the uses found their expert on the device, "
        f"{ahead:.0%} more were fetched ahead. {traffic.disk_bytes / 1e6:.1f} MB came from disk, "
        f"{traffic.host_bytes / 1e6:.1f} MB from host memory. "
        f"At most {megabytes} of experts were on the device."
    )


def main(argv: list[str]) -> None:
    """Parses, writes on, reports."""
    prog = call_of("complete")
    settings = parse_settings(Settings(), argv, (__doc__ or "").splitlines()[0], prog)
    completion = complete(settings)
    print(completion.text)
    print(f"\n{describe(completion, settings.placement.device_budget)}")
