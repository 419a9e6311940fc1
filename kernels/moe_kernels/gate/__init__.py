"""The experts that a token goes to, and the weights of their outputs."""

from moe_kernels.gate.api import GateOutput, gate
from moe_kernels.gate.config import GateConfig

__all__ = ["GateConfig", "GateOutput", "gate"]
