"""The compression baselines beside a validation loss, computed once for each held-out text."""

from pathlib import Path
from typing import Any

from moe_jax.base.console import progress, say
from moe_jax.data.baselines import (
    TRAINING_BYTES,
    gzip_bits_per_byte,
    ngram_bits_per_byte,
    xz_bits_per_byte,
)
from moe_jax.data.cache import cache_folder, entry, usable
from moe_jax.data.tokens import TokenData

BASELINE_NAMES = {
    "gzip_bits_per_byte": "gzip -9",
    "xz_bits_per_byte": "xz -9",
    "ngram_bits_per_byte": "the byte 5-gram",
}
"""The measurements of compression_baselines, as text."""


def compression_baselines(data: TokenData, cache: str) -> dict[str, float]:
    """Bits per byte of gzip -9, xz -9 and a byte 5-gram on the held-out text.

    The data cache keeps them.
    """

    def build(_: Path) -> dict[str, Any]:
        say("compressing the held-out text with gzip, xz and a 5-gram, once")
        held_out = data.validation.text()
        # Each compressor reads the held-out text, and the 5-gram counts training text.
        total = 2 * len(held_out) + min(data.train.bytes, TRAINING_BYTES)
        with progress("compressing", total) as advance:
            return {
                "gzip_bits_per_byte": gzip_bits_per_byte(held_out, advance),
                "xz_bits_per_byte": xz_bits_per_byte(held_out, advance),
                "ngram_bits_per_byte": ngram_bits_per_byte(
                    data.train.chunks(), held_out, on_bytes=advance
                ),
            }

    folder = cache_folder(cache)
    # The number of held-out tokens is no part of the fingerprint, and a run may use fewer of them.
    name = f"baselines-{data.fingerprint}-{len(data.validation.tokens)}"
    with usable(folder):
        return entry(folder / name, build, say)
