"""Triton kernels for mixture-of-experts layers, launched through jax-triton."""

from moe_kernels.startup import quiet_without_gpu

# JAX looks for its plugins when a device is first asked for, which is after this import.
quiet_without_gpu()
