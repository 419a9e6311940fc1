"""FP8 (E4M3) with a scale for every tile: 1x128 of activations, 128x128 of matrices."""

from moe_kernels.quantise.api import Quantised, quantise_matrices, quantise_rows

__all__ = ["Quantised", "quantise_matrices", "quantise_rows"]
