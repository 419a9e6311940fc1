"""A teacher: a frozen model with its tokenizer, and the logits of a model at every position."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from moe_jax.base.console import working
from moe_jax.base.errors import UserError
from moe_jax.base.hashes import hasher
from moe_jax.config import ModelConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.distill.chunked import LazyLogits
from moe_jax.interop import gguf, hugging_face
from moe_jax.model.abstract import abstract_states
from moe_jax.model.transformer import Transformer


class Teacher(NamedTuple):
    """A trained model as distillation uses it."""

    model: ModelConfig
    parameters: Any
    router: Any
    """The RouterBias variables; empty for a dense model."""
    tokenizer: Tokenizer

    @staticmethod
    def from_gguf(path: str) -> "Teacher":
        """The model in a GGUF file. Errors as interop.gguf.load."""
        with working(f"reading {path}"):
            config, parameters, tokenizer = gguf.load(path)
        return Teacher(config, parameters, abstract_states(config)[1], tokenizer)  # dense: empty

    @staticmethod
    def from_folder(path: str) -> "Teacher":
        """The model in a folder of safetensors. Errors as interop.hugging_face.load_model."""
        # A teacher predicts the next token alone.
        return Teacher(*hugging_face.load_model(path, mtp="drop"))

    def fingerprint(self) -> str:
        """Hash of the architecture, every parameter and the tokenizer."""
        content = hasher()
        content.update(f"{self.model}{self.tokenizer.fingerprint}".encode())
        for leaf in jax.tree.leaves((self.parameters, self.router)):
            content.update(np.asarray(leaf).tobytes())
        return content.hexdigest()


def lazy_logits(model: Transformer, hidden: Float[Array, "B L D"]) -> LazyLogits:
    """As model.logits(hidden), but not multiplied out; N = B·L positions."""
    return LazyLogits(model.norm(hidden).reshape(-1, hidden.shape[-1]), model.output_table())


def lazy_forward(
    model: Transformer, tokens: Int[Array, "B L"], segments: Int[Array, "B L"]
) -> LazyLogits:
    """As model(tokens, segments), but the logits are not multiplied out."""
    return lazy_logits(model, model.hidden(tokens, segments)[0])


def require_same_tokens(student: Tokenizer, teacher: Tokenizer) -> None:
    """UserError: the tokenizers differ. Probabilities can only be compared over the same tokens.

    Aligning two vocabularies by their longest common tokens would compare different events, because
    a string has many tokenisations. Text is what both share, so the teacher may write or choose it.
    """
    if student.fingerprint != teacher.fingerprint:
        raise UserError(
            f"the student's tokenizer ({student.vocabulary} tokens) is not the teacher's "
            f"({teacher.vocabulary}): train the student with the teacher's tokenizer, or on text "
            "that the teacher wrote (sequence-level distillation)"
        )
