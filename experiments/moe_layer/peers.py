"""Other libraries' mixture-of-experts layers, at the same sizes and with the same weights."""

import importlib.util
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from experiments.moe_layer.timing import Call, Times, forward_and_train, jax_call
from moe_jax.base.machine import environment
from moe_jax.config import MoEConfig
from moe_jax.moe.experts import swiglu
from moe_jax.moe.route import route
from moe_jax.study.layer_case import Inputs, Shape, moe_config

VARIANTS = ("eager", "grouped_mm", "batched_mm")
"""transformers' implementations of the experts."""

MOST_BYTES = 2e9
"""A peer that would copy more than this is left out."""


def ragged_layer(config: MoEConfig) -> Any:
    """The layer with jax.lax.ragged_dot: (x, router, gate_up, down) -> outputs [T, D].

    Assignments are sorted by expert, both products are ragged, the results go back in order.
    """

    def run(
        x: Float[Array, "T D"],
        router: Float[Array, "D E"],
        gate_up: Float[Array, "E D twoF"],
        down: Float[Array, "E F D"],
    ) -> Float[Array, "T D"]:
        chosen = route(x @ router, jnp.zeros(config.experts), config)
        tokens, per_token = chosen.experts.shape
        flat = chosen.experts.reshape(-1)
        order = jnp.argsort(flat)
        sizes = jnp.bincount(flat, length=config.experts).astype(jnp.int32)
        hidden = swiglu(lax.ragged_dot(x[order // per_token], gate_up, sizes))
        rows = lax.ragged_dot(hidden, down, sizes)[jnp.argsort(order)]
        return jnp.einsum("tk,tkd->td", chosen.weights, rows.reshape(tokens, per_token, -1))

    return run


def ragged_calls(shape: Shape, inputs: Inputs) -> tuple[list[Call], str]:
    """(calls, why one is missing).

    XLA:CPU expands ragged_dot to E masked copies [E, S, D] of the rows, and to three times as many
    for the gradients.
    """
    copies = 4.0 * shape.experts * shape.rows * shape.width
    function = ragged_layer(moe_config(shape))
    if copies > MOST_BYTES:
        return [], f"skipped: E masked copies of the rows take {copies / 1e9:.1f} GB"
    if 3 * copies > MOST_BYTES:
        forward = jax_call("ragged_dot forward", function, *inputs.arguments, flops=shape.flops)
        return [forward], f"train skipped: its masked copies take {3 * copies / 1e9:.1f} GB"
    both = (inputs.cotangent, inputs.arguments)
    return forward_and_train("ragged_dot", function, both, flops=shape.flops), ""


def missing_package() -> str | None:
    """The first package of the extra `parity` that is not installed."""
    wanted = ("torch", "transformers")
    return next((name for name in wanted if importlib.util.find_spec(name) is None), None)


def transformers_block(shape: Shape, inputs: Inputs, variant: str) -> Any:
    """transformers' Qwen3MoeSparseMoeBlock in float32 with the weights of `inputs`.

    Its gate is a softmax, and the K weights are divided by their sum.
    """
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    # The cores that this process may use, which JAX uses, too.
    torch.set_num_threads(environment()["cores"])
    settings: dict[str, Any] = {
        "hidden_size": shape.width,
        "moe_intermediate_size": shape.hidden,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.per_token,
        "norm_topk_prob": True,
        "experts_implementation": variant,
    }
    block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**settings))
    weights = {
        "gate.weight": inputs.router.T,
        "experts.gate_up_proj": jnp.swapaxes(inputs.gate_up, 1, 2),
        "experts.down_proj": jnp.swapaxes(inputs.down, 1, 2),
    }
    block.load_state_dict({name: to_torch(array) for name, array in weights.items()})
    return block


def to_torch(array: Array) -> Any:
    """A copy as a torch tensor, in row-major order."""
    import torch

    return torch.from_numpy(np.array(array, order="C"))


def transformers_call(shape: Shape, inputs: Inputs, variant: str) -> list[Call]:
    """`VARIANT forward` without autograd, and `VARIANT train`, gradients of x and all weights."""
    import torch

    block = transformers_block(shape, inputs, variant)
    x = to_torch(inputs.x[None])
    cotangent = to_torch(inputs.cotangent[None])

    def forward() -> Any:
        with torch.no_grad():
            return block(x)

    def train() -> Any:
        block.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        block(leaf).backward(cotangent)
        return leaf.grad

    name = f"transformers {variant}"
    return [
        Call(f"{name} forward", forward, shape.flops),
        Call(f"{name} train", train, 3 * shape.flops),
    ]


def transformers_calls(shape: Shape, inputs: Inputs) -> tuple[list[Call], dict[str, str]]:
    """(calls of the variants that can run, why the others cannot)."""
    missing = missing_package()
    if missing:
        absent = f"absent: {missing} (pip install -e '.[parity]')"
        return [], dict.fromkeys(VARIANTS, absent)
    calls = []
    reasons = {}
    copied = float(shape.rows * shape.expert_bytes)
    for variant in VARIANTS:
        if variant == "batched_mm" and copied > MOST_BYTES:
            reasons[variant] = f"skipped: a copy of the weights per row takes {copied / 1e9:.1f} GB"
        else:
            calls += transformers_call(shape, inputs, variant)
    return calls, reasons


def fastest_peer(times: Times, kind: str) -> str:
    """transformers' fastest variant. The first one where none was timed."""
    names = [f"transformers {variant} {kind}" for variant in VARIANTS]
    return min(names, key=lambda name: times.median(name) or float("inf"))
