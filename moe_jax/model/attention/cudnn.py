"""Attention by cuDNN's fused kernel for NVIDIA GPUs, through jax.nn.dot_product_attention."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe_jax.base.errors import require
from moe_jax.base.machine import compute_capability
from moe_jax.model.attention.context import AttentionMask

DTYPES = ("bfloat16", "float16")
MINIMUM_CAPABILITY = 8.0
"""Ampere: the first compute capability that the fused kernel exists for."""
HOPPER = 9.0


def attend(
    query: Float[Array, "B L H head_dim"],
    key: Float[Array, "B keys kv_heads head_dim"],
    value: Float[Array, "B keys kv_heads value_dim"],
    mask: AttentionMask,
) -> Float[Array, "B L H value_dim"]:
    """softmax(q kᵀ / sqrt(head_dim), masked) v, as reference.attend.

    No scores reach the GPU's memory.
    The documents cost one number for each query and key, shared by all heads: jax.nn takes the
    mask as B x 1 x L x keys booleans and hands it to cuDNN as a bias. UserError: see `obstacle`.
    """
    width = value.shape[-1]
    problem = obstacle(query.dtype, query.shape[-1], width)
    require(not problem, refusal(problem))
    # jax.nn wants values as wide as keys, and those of latent attention are narrower. Columns of
    # zeros in the values are columns of zeros in the output.
    padding = [(0, 0), (0, 0), (0, 0), (0, query.shape[-1] - width)]
    # A mask that is causal by name lets cuDNN skip the future; one of booleans does not.
    causal = mask.start is None
    visible = mask.same_document() if causal else mask.dense()
    out = jax.nn.dot_product_attention(
        query,
        key,
        jnp.pad(value, padding),
        mask=visible[:, None],
        is_causal=causal,
        implementation="cudnn",
    )
    return out[..., :width]


def obstacle(dtype: jnp.dtype, key_width: int, value_width: int) -> str:
    """Why cuDNN cannot compute such an attention on this machine; empty if it can.

    The limits are those of jax._src.cudnn.fused_attention_stablehlo.check_is_flash_attention.
    """
    if dtype.name not in DTYPES:
        return f"it computes bfloat16 and float16, and model.compute_dtype is {dtype.name}"
    capability = compute_capability()
    if capability is None:
        return f"the devices are {jax.default_backend()}, not NVIDIA GPUs"
    if capability < MINIMUM_CAPABILITY:
        return f"the GPU has compute capability {capability}, below {MINIMUM_CAPABILITY}"
    widest = 256 if capability >= HOPPER else 128
    if key_width % 8 or key_width > widest:
        return (
            f"its heads are multiples of 8 up to {widest} wide here, and the model's queries "
            f"and keys are {key_width} wide"
        )
    if value_width > key_width:
        return f"the model's values ({value_width} wide) are wider than its keys ({key_width})"
    return ""


def refusal(problem: str) -> str:
    """The error message of a run that names cudnn."""
    return (
        f"model.attention.implementation=cudnn cannot run: {problem}; "
        "use implementation auto or blockwise"
    )
