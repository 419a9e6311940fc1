"""Layer sizes, and arrays and routing for them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct
from moe_kernels.bench.shapes import MODELS, SONIC, Shape

from moe_jax.base.initial import root_key
from moe_jax.moe.plan import Plan, make_plan

DTYPE = "bfloat16"
"""Of everything but the gate's weights."""


SHAPES = {name: MODELS[name] for name in ("OLMoE-1B-7B", "Qwen3-30B-A3B", "DeepSeek-V3")}
QUICK = {"small": Shape(1024, 512, 256, 16, 4)}
FIRST_RUN = {**SHAPES, "sonic 7B n=512": SONIC["sonic 7B n=512"]}
"""Of the prediction that is recorded before the first run on a GPU."""


def layer_arrays(shape: Shape) -> tuple[Any, ...]:
    """Shapes and dtypes of x [T, D], weights [T, K], gate_up [E, D, 2F] and down [E, F, D]."""
    tokens = shape.tokens
    width = shape.width
    hidden = shape.hidden
    return (
        ShapeDtypeStruct((tokens, width), DTYPE),
        ShapeDtypeStruct((tokens, shape.per_token), jnp.float32),
        ShapeDtypeStruct((shape.experts, width, 2 * hidden), DTYPE),
        ShapeDtypeStruct((shape.experts, hidden, width), DTYPE),
    )


def make_inputs(shape: Shape, seed: int) -> list[jax.Array]:
    """Normal numbers for layer_arrays, the matrices divided by the root of their inputs' width."""
    keys = jax.random.split(root_key(seed), 4)
    scales = (1.0, 1.0, shape.width**-0.5, shape.hidden**-0.5)
    return [
        (scale * jax.random.normal(key, a.shape)).astype(a.dtype)
        for key, a, scale in zip(keys, layer_arrays(shape), scales, strict=True)
    ]


def make_routing(shape: Shape, seed: int) -> Plan:
    """The plan of independent tokens whose gate prefers no expert."""
    random = np.random.default_rng(seed)
    scores = random.random((shape.tokens, shape.experts))
    chosen = np.argpartition(scores, shape.per_token, axis=1)[:, : shape.per_token]
    return make_plan(jnp.asarray(chosen, jnp.int32), shape.experts)


def plan_shape(shape: Shape) -> Plan:
    """The shapes of make_routing's plan."""
    chosen = ShapeDtypeStruct((shape.tokens, shape.per_token), jnp.int32)
    return jax.eval_shape(partial(make_plan, num_experts=shape.experts), chosen)
