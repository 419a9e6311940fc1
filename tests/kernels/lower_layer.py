"""A layer and its gradients, lowered for the compute capabilities of the command line.

It is a program of its own: Triton's compiler cannot run beside its interpreter, and other versions
of Python and of the packages lower it, too.
"""

import sys

import jax
import jax.numpy as jnp
from moe_kernels.experts import mixture
from moe_kernels.gate import GateConfig, gate
from moe_kernels.launch import lowering_for
from moe_kernels.schedule import schedule


def layer(logits, x, gate_up, down):
    """The sum of a layer's outputs."""
    chosen = gate(logits, None, GateConfig(2, "softmax"))
    plan = schedule(chosen.experts, 4, 16)
    return mixture(x, chosen.weights, gate_up, down, plan).sum()


bf16 = jnp.bfloat16
shapes = [((64, 4), jnp.float32), ((64, 64), bf16), ((4, 64, 64), bf16), ((4, 32, 64), bf16)]
arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
for arch in map(int, sys.argv[1:]):
    jax.clear_caches()  # the architecture is no argument of what is traced
    with lowering_for(arch):
        step = jax.jit(jax.grad(layer, argnums=(0, 1, 2, 3))).trace(*arrays)
        step.lower(lowering_platforms=("cuda",))
