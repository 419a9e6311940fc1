"""Checks and chooses the implementation of softmax(q kᵀ / sqrt(head_dim), masked) v."""

from collections.abc import Callable

from jax import Array
from jaxtyping import Float

from moe_jax.base.errors import require
from moe_jax.config import ModelConfig
from moe_jax.model.attention import blockwise, cudnn, reference
from moe_jax.model.attention.context import AttentionMask
from moe_jax.model.dtype import compute_dtype

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": reference.attend,
    "blockwise": blockwise.attend,
    "cudnn": cudnn.attend,
}
"""(query, key, value, mask) -> outputs, by `model.attention.implementation`."""

# Forward and backward on two busy CPU cores, B=2, H=4, kv_heads=2, head_dim=64, float32, medians of
# paired runs (`python -m moe_jax.model.attention.bench --length L`): blockwise is 0.85x as fast as
# reference at L = 256, 1.1x at 512, 2.9x at 1024, 4.1x at 2048 and 2.3x at 4096. Its
# temporaries at L = 4096 are 34 MB, and those of reference 1,623 MB.
LONG = 1024
"""Queries from which on `auto` computes blockwise."""


def attend(
    query: Float[Array, "B L H head_dim"],
    key: Float[Array, "B keys kv_heads head_dim"],
    value: Float[Array, "B keys kv_heads value_dim"],
    mask: AttentionMask,
    implementation: str = "auto",
) -> Float[Array, "B L H value_dim"]:
    """softmax(q kᵀ / sqrt(head_dim), masked) v; each key head serves H / kv_heads queries.

    UserError: `implementation` is cudnn and cuDNN cannot compute this attention here.
    """
    name = choose(query, value, mask, implementation)
    return IMPLEMENTATIONS[name](query, key, value, mask)


def choose(
    query: Float[Array, "B L H head_dim"],
    value: Float[Array, "B keys kv_heads value_dim"],
    mask: AttentionMask,
    implementation: str = "auto",
) -> str:
    """The implementation that runs: the one that is named, or for `auto` the best that can run.

    cuDNN computes whole windows only. Tokens that read a KV cache (`mask.start` is not None) go to
    reference or blockwise even where cudnn is named.
    """
    if implementation in ("reference", "blockwise"):
        return implementation
    length = query.shape[1]
    if mask.start is None:
        if implementation == "cudnn":
            return "cudnn"
        # cuDNN's backward pass with a mask refuses odd lengths, and whether a backward pass
        # follows is not known here.
        if length % 2 == 0 and not cudnn.obstacle(query.dtype, query.shape[-1], value.shape[-1]):
            return "cudnn"
    return "blockwise" if length >= LONG else "reference"


def check_attention(model: ModelConfig, length: int) -> None:
    """Refuses, before anything is compiled, a run over windows of `length` tokens with cudnn.

    UserError: `model.attention.implementation` is cudnn and cuDNN cannot train this model here.
    """
    c = model.attention
    if c.implementation != "cudnn":
        return
    key_width = c.head_dim if c.kind == "gqa" else c.nope_dim + c.rope_dim
    value_width = c.head_dim if c.kind == "gqa" else c.v_dim
    obstacle = cudnn.obstacle(compute_dtype(model), key_width, value_width)
    require(not obstacle, cudnn.refusal(obstacle))
    require(
        length % 2 == 0,
        cudnn.refusal(f"its backward pass needs an even length, and data.length is {length}"),
    )
