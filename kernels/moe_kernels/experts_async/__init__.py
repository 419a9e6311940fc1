"""The experts' forward products by TMA and specialised warps, on 9.0 and 10.0."""

from moe_kernels.experts_async.api import misfit, mixture

__all__ = ["misfit", "mixture"]
