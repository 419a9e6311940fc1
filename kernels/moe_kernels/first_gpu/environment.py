"""Step 0: the device, the versions, the assemblers, and one small kernel."""

import platform
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from moe_kernels.first_gpu.context import Context, Outcome
from moe_kernels.launch import assembler, capability, launch_fault, recording, triton_support
from moe_kernels.launch.probe import SIDE, probe_product
from moe_kernels.timing import device_report


def environment(context: Context) -> Outcome:
    """Reports them. Without it nothing else can run, so its reason is the run's."""
    report: dict[str, Any] = {"python": platform.python_version(), **device_report()}
    candidates = list(dict.fromkeys(assembler.candidates()))
    report["assemblers"] = {str(path): assembler.release_of(path) for path in candidates}
    support = triton_support()
    wanted = "interpreter" if context.settings.dry_run else "gpu"
    if support.name != wanted:
        return Outcome(False, support.reason, {"environment": report})
    if fault := launch_fault():
        return Outcome(False, fault, {"environment": report})
    if support.name == "gpu":
        report["capability"] = capability()
        report["ptx"] = stamped_version()
    return Outcome(True, "", {"environment": report})


def stamped_version() -> str:
    """The version of PTX that Triton writes for the device at hand."""
    # The audit's compiler reads Triton's own tools: only here, and only on a GPU.
    from moe_kernels.audit.compile import ptx_version

    square = ShapeDtypeStruct((SIDE, SIDE), jnp.float16)
    with recording(capability()) as launches:
        # A function of its own: JAX does not trace one twice, and the probe has been traced.
        jax.eval_shape(partial(probe_product), square, square)
    return ptx_version(launches[0], capability())
