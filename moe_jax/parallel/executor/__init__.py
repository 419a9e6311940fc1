"""Any pipeline schedule as one program: a scan over the ticks of its table on every device.

In a tick a device does one step of the schedule, chosen by `lax.switch`, and sends what it computed
to its neighbours by `ppermute`, outside the switch. So compiling takes as long for many
micro-batches as for few. What lies between the steps of a micro-batch is kept in slots, whose
number is the schedule's peak (parallel.ticks). A device that has nothing to do computes nothing.

The executor knows no model. It takes three functions (Stages), and the layers between the first and
the last of them are its pieces. Gradients are split by parallel.gradient_split.
"""

from moe_jax.parallel.executor.gradient import make_gradient
from moe_jax.parallel.executor.interface import PIPE, Arguments, Result, Stages

__all__ = ["PIPE", "Arguments", "Result", "Stages", "make_gradient"]
