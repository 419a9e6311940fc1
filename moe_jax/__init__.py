"""Mixture-of-experts language models in JAX. README.md has an overview of the packages."""

# First of all imports: it keeps JAX's CUDA plugin silent where there is no GPU.
import moe_kernels as _  # noqa: F401

__version__ = "0.1.0"
