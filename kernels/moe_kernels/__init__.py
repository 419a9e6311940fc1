"""Triton kernels for mixture-of-experts layers, launched through jax-triton."""
