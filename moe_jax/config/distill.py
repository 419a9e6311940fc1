"""Settings of training on a teacher."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from moe_jax.base.errors import quote, require
from moe_jax.config.checks import fraction, known_choices, not_negative, positive
from moe_jax.config.codec import MAY_DIFFER

DivergenceKind = Literal[
    "forward", "reverse", "jsd", "skew_forward", "skew_reverse", "total_variation"
]
CacheKind = Literal["sampled", "top_k"]
CACHES: dict[str, CacheKind] = {"samples": "sampled", "top": "top_k"}
"""What distill.cache may begin with, and the kind of cache that it stands for."""


def check_divergence(kind: str, mix: float) -> None:
    """UserError: the kind is unknown, or `mix` is outside its range."""
    kinds = get_args(DivergenceKind)
    require(kind in kinds, f"divergence {quote(kind)} is unknown: use {', '.join(kinds)}")
    require(0 <= mix <= 1, f"mix is {quote(mix)}: it must lie between 0 and 1")
    skewed = kind.startswith("skew")
    require(not skewed or 0 < mix < 1, f"mix is {quote(mix)}: {kind} needs 0 < mix < 1")


@dataclass(frozen=True)
class DistillConfig:
    """Knowledge distillation: how a student learns from its teacher.

    The student has the teacher's tokenizer. Everything but `teacher` needs a teacher."""

    # A teacher's folder may move between runs. train/teacher.py compares its fingerprint instead.
    teacher: str = field(default="", metadata=MAY_DIFFER)
    """The teacher. Unset, there is none.
    A published Llama or Qwen3: `smollm2`, a GGUF file, hf:OWNER/NAME, or a folder of safetensors.
    A model of yours: the folder of a run."""
    kind: DivergenceKind = "forward"
    """Divergence between teacher and student (distill/divergences.py).
    `forward` is KL(teacher ‖ student). It is the only one with a cache."""
    mix: float = 0.5
    """Weight in the mixture of teacher and student that jsd and the skew divergences use.
    jsd: the teacher's weight, from 0 to 1.
    skew_forward: the teacher's weight, skew_reverse: the student's, above 0 and below 1."""
    alpha: float = 1.0
    """Share of the divergence in the loss, from 0 to 1. The rest is cross-entropy with the text."""
    temperature: float = 1.0
    """Temperature of the softmax of both teacher and student."""
    on_policy: float = 0.0
    """Fraction of the batches whose text the student writes itself.
    It goes on with the last document of the prompt. Its text after that one's end is padding."""
    prompt: int = 32
    """on_policy: tokens of the corpus that the student continues."""
    cache: str = "none"
    """`none`: the teacher reads every batch.
    Otherwise the teacher reads the training text once. Its outputs are stored in data.cache.
    `samples:K` stores K tokens drawn from each distribution, in 2 K bytes a token.
    `top:K` stores the K most probable tokens and the mass of the others, in 4 K + 2 bytes.
    A vocabulary above 65536 takes 2 K bytes more."""
    upcycle: bool = False
    """Start from the dense teacher's weights (sparse upcycling, arXiv:2212.05055).
    Every expert is a copy of the teacher's feed-forward layer.
    If expert_hidden is 1/G of that layer's width, every expert is one G-th of it."""
    upcycle_noise: float = 0.0
    """upcycle: standard deviation of noise on the weights, relative to that of the weights."""
    upcycle_reinitialised: float = 0.0
    """upcycle: fraction of each expert's hidden units that is initialised anew."""
    chunk: int = 4096
    """Columns of the vocabulary that the loss has in memory at once."""

    def __post_init__(self) -> None:
        owner = "distill"
        known_choices(owner, self)
        check_divergence(self.kind, self.mix)
        fraction(owner, self, "alpha", "on_policy", "upcycle_reinitialised")
        positive(owner, self, "temperature", "prompt", "chunk")
        not_negative(owner, self, "upcycle_noise")
        self._check_cache(owner)
        for name in ("upcycle_noise", "upcycle_reinitialised"):
            value = getattr(self, name)
            require(self.upcycle or not value, f"{owner}.{name}={value} needs {owner}.upcycle")

    def _check_cache(self, owner: str) -> None:
        if self.cache == "none":
            return
        kind, _, count = self.cache.partition(":")
        # Python refuses to read an integer of more than 4300 digits.
        number = int(count) if count.isdecimal() and len(count) < 20 else 0
        require(
            kind in CACHES and number > 0,
            f"{owner}.cache {quote(self.cache)} is unknown: use none, samples:K or top:K",
        )
        cached = f"{owner}.cache={self.cache}"
        require(
            self.kind == "forward",
            f"{cached} gives the forward divergence only: set {owner}.kind={self.kind} to forward",
        )
        require(
            self.on_policy == 0,
            f"{cached} holds nothing of the student's own text: {owner}.on_policy={self.on_policy} "
            "needs cache=none",
        )

    @property
    def cache_contents(self) -> tuple[CacheKind, int] | None:
        """(kind of cache, tokens that it stores of each distribution), or None without a cache."""
        kind, _, count = self.cache.partition(":")
        return None if self.cache == "none" else (CACHES[kind], int(count))

    def check_length(self, length: int) -> None:
        """UserError: the prompt leaves the student nothing to write in `length` tokens."""
        require(
            self.on_policy == 0 or self.prompt < length,
            f"distill.prompt={self.prompt} leaves nothing of data.length={length} to write",
        )
