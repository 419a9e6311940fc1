"""How many bits does a model need for a byte of a text? Runs and published models in one unit.

    python experiments/evaluate.py --model MODEL [--data.source SOURCE] --out DIR

MODEL is the --out of a run, a folder of safetensors, hf:OWNER/NAME, or a GGUF file. The text is
the held-out part of SOURCE. A window of --context tokens slides over it by --stride tokens. Bits
per byte do not depend on the tokenizer, so that models with different ones compare.
"""

from dataclasses import dataclass, field

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from moe_jax.base.console import progress, say
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, program
from moe_jax.config import DataConfig, require
from moe_jax.config.checks import positive
from moe_jax.data.tokens import prepare
from moe_jax.runs.sliding import count_windows, sliding_bits_per_byte
from moe_jax.runs.weights import load_weights

QUICK_TOKENS = 2000


@dataclass(frozen=True)
class Settings:
    """Bits per byte of a model on a text."""

    model: str = ""
    """A run, a folder of safetensors, hf:OWNER/NAME, or a GGUF file."""
    out: str = "runs/evaluate"
    """Folder of result.json."""
    context: int = 512
    """Tokens of a window."""
    stride: int = 256
    """Tokens by which the window moves. A small stride gives every token a long context."""
    batch: int = 4
    """Windows at once. It does not change the result."""
    tokens: int = 0
    """At most this many tokens of the held-out text. 0 takes data.validation_tokens."""
    quick: bool = False
    """2000 tokens of the text: the same code in less time."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        positive("", self, "context", "stride", "batch")
        require(
            self.stride <= self.context,
            f"stride={self.stride} exceeds context={self.context}: tokens would be left out",
        )
        require(self.tokens >= 0, f"tokens is {self.tokens}: it must not be negative")


def evaluate(settings: Settings) -> float:
    """Measures and writes result.json."""
    require(settings.model != "", "which model? give --model RUN, FOLDER, hf:OWNER/NAME or a file")
    out = output_folder(settings.out)
    model = load_weights(settings.model)
    text = prepare(settings.data, model.tokenizer, say).validation
    limit = QUICK_TOKENS if settings.quick else settings.tokens
    text = text.first(limit) if limit else text
    with progress("windows", count_windows(text, settings.stride), "items") as advance:
        bits = sliding_bits_per_byte(
            model,
            text,
            context=settings.context,
            stride=settings.stride,
            batch=settings.batch,
            on_window=advance,
        )
    verdict = (
        f"{settings.model}: {bits:.4f} bits per byte of {text.bytes:,} bytes "
        f"({len(text.tokens):,} tokens), context {settings.context}, stride {settings.stride}"
    )
    write_result(
        out,
        experiment="evaluate",
        question="How many bits does the model need for a byte of the text?",
        config=settings,
        measurements=[
            Measurement("bits_per_byte", bits, "bits/byte"),
            Measurement("tokens", len(text.tokens), "tokens"),
            Measurement("bytes", text.bytes, "bytes"),
        ],
        verdict=verdict,
    )
    say(verdict)
    return bits


def main(argv: list[str]) -> None:
    """Parses and evaluates."""
    evaluate(parse_settings(Settings(), argv, (__doc__ or "").splitlines()[0]))


if __name__ == "__main__":
    program(main)
