"""Settings of training on a teacher; part of config.TrainConfig, in a file of their own."""

from dataclasses import dataclass
from typing import Literal, get_args

from moe_jax.base.errors import require

Kind = Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse", "total_variation"]
CACHES: dict[str, Literal["sampled", "top_k"]] = {"samples": "sampled", "top": "top_k"}


def check_divergence(kind: str, mix: float) -> None:
    """UserError: the kind is unknown, or `mix` outside its range."""
    kinds = get_args(Kind)
    require(kind in kinds, f"divergence '{kind}' is unknown: use {', '.join(kinds)}")
    require(0 <= mix <= 1, f"mix is {mix}: it must lie between 0 and 1")
    skewed = kind.startswith("skew")
    require(not skewed or 0 < mix < 1, f"mix is {mix}: {kind} needs 0 < mix < 1")


@dataclass(frozen=True)
class DistillConfig:
    """What a student learns from its teacher. The student has the teacher's tokenizer."""

    teacher: str = ""
    """`smollm2`, a GGUF file, a folder of safetensors (Llama, Qwen3), hf:OWNER/NAME, or the folder
    of a run of yours; unset, no teacher."""
    kind: Kind = "forward"
    """The divergence from an online teacher; a cache always gives forward KL."""
    mix: float = 0.5
    """jsd's b, or the skew divergences' l."""
    alpha: float = 1.0
    """Share of the teacher; the rest is cross-entropy with the text."""
    temperature: float = 1.0
    """Of teacher and student."""
    on_policy: float = 0.0
    """lambda: fraction of the batches that the student writes itself."""
    prompt: int = 32
    """on_policy: tokens of text that the student continues."""
    cache: str = "none"
    """`none`: the teacher reads every batch. `samples:K` or `top:K`: it reads the whole training
    text once, and K tokens drawn from each distribution, or its K best and the mass of all others,
    are kept in data.cache (2 K or 4 K + 2 bytes a token)."""
    upcycle: bool = False
    """Start from the dense teacher's weights: every expert is a copy of its feed-forward, or the
    1/G of it that expert_hidden allows (sparse upcycling)."""
    upcycle_noise: float = 0.0
    """upcycle: experts' weights + noise · their standard deviation · N(0, 1)."""
    upcycle_reinitialised: float = 0.0
    """upcycle: fraction of each expert's hidden units that is drawn anew."""
    chunk: int = 4096
    """Columns of the vocabulary in memory at once."""

    def __post_init__(self) -> None:
        check_divergence(self.kind, self.mix)
        for name in ("alpha", "on_policy", "upcycle_reinitialised"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"distill.{name} is {value}: it must lie between 0 and 1")
        for name in ("temperature", "prompt", "chunk"):
            value = getattr(self, name)
            require(value > 0, f"distill.{name} is {value}: it must be positive")
        require(self.upcycle_noise >= 0, "distill.upcycle_noise must not be negative")
        self._check_cache()
        for name in ("upcycle_noise", "upcycle_reinitialised"):
            value = getattr(self, name)
            require(self.upcycle or not value, f"distill.{name}={value} needs distill.upcycle")

    def _check_cache(self) -> None:
        kind, _, count = self.cache.partition(":")
        known = kind in CACHES and count.isdecimal() and int(count) > 0
        require(
            self.cache == "none" or known,
            f"distill.cache '{self.cache}' is unknown: use none, samples:K or top:K",
        )
        cached = f"distill.cache={self.cache}"
        require(
            not known or self.kind == "forward",
            f"{cached} gives the forward divergence only: set distill.kind={self.kind} to forward",
        )
        require(
            not known or self.on_policy == 0,
            f"{cached} holds nothing of the student's own text: distill.on_policy={self.on_policy} "
            "needs cache=none",
        )

    @property
    def kept(self) -> tuple[Literal["sampled", "top_k"], int] | None:
        """What the cache keeps of a distribution, and of how many tokens; None without a cache."""
        kind, _, count = self.cache.partition(":")
        return None if self.cache == "none" else (CACHES[kind], int(count))

    def check_length(self, length: int) -> None:
        """UserError: a window of `length` tokens is all prompt."""
        require(
            self.on_policy == 0 or self.prompt < length,
            f"distill.prompt={self.prompt} leaves nothing of data.length={length} to write",
        )
