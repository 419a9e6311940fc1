"""Random cases through the kernels, against float64 in NumPy: python -m moe_kernels.soak."""
