"""A teacher: a frozen model with its tokenizer, read out position by position."""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from moe_jax.base.errors import UserError
from moe_jax.config import ModelConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.distill.chunked import Readout
from moe_jax.interop import gguf, huggingface
from moe_jax.model.abstract import abstract_states
from moe_jax.model.transformer import Transformer


class Teacher(NamedTuple):
    """What distillation needs of a model that was trained before."""

    model: ModelConfig
    parameters: Any
    router: Any
    """The RouterBias variables; empty for a dense model."""
    tokenizer: Tokenizer

    @staticmethod
    def from_gguf(path: str) -> "Teacher":
        """interop.gguf.load; errors as there."""
        return Teacher._untrained_router(*gguf.load(path))

    @staticmethod
    def from_folder(path: str) -> "Teacher":
        """interop.huggingface.load; errors as there."""
        return Teacher._untrained_router(*huggingface.load(path))

    @staticmethod
    def _untrained_router(config: ModelConfig, parameters: Any, tokenizer: Tokenizer) -> "Teacher":
        """Models from elsewhere have no selection bias."""
        router = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_states(config)[1])
        return Teacher(config, parameters, router, tokenizer)

    def fingerprint(self) -> str:
        """Hash of the architecture, every parameter and the tokenizer."""
        state = hashlib.blake2b(digest_size=16)
        state.update(f"{self.model}{self.tokenizer.fingerprint}".encode())
        for leaf in jax.tree.leaves((self.parameters, self.router)):
            state.update(np.asarray(leaf).tobytes())
        return state.hexdigest()


def readout(model: Transformer, hidden: Float[Array, "B L D"]) -> Readout:
    """The logits of every position, not yet multiplied out; N = B·L."""
    return Readout(model.norm(hidden).reshape(-1, hidden.shape[-1]), model.output_table())


def read(model: Transformer, tokens: Int[Array, "B L"], segments: Int[Array, "B L"]) -> Readout:
    """The model's readout of packed documents."""
    return readout(model, model.hidden(tokens, segments)[0])


def require_same_tokens(student: Tokenizer, teacher: Tokenizer) -> None:
    """Probabilities can only be compared over the same tokens. UserError: they are not the same.

    A string has many tokenisations, so that aligning two vocabularies by their longest common
    tokens compares different events. Text is common ground: let the teacher write or choose it.
    """
    if student.fingerprint != teacher.fingerprint:
        raise UserError(
            f"the student's tokenizer ({student.vocabulary} tokens) is not the teacher's "
            f"({teacher.vocabulary}): train the student with the teacher's tokenizer, or on text "
            "that the teacher wrote (sequence-level distillation)"
        )
