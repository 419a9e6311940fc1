"""The kernels beside their peers and a plain GEMM, on a GPU: python -m moe_kernels.bench."""
