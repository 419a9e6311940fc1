"""Which experts a token goes to, and with what weight."""

from moe_kernels.gate.api import Choice, Gate, gate

__all__ = ["Choice", "Gate", "gate"]
