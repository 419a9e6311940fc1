"""The time of the kernels on a GPU that is not there: a bound by a model, never a measurement."""

from moe_kernels.predict.device import A100, DEVICES, H100, LAUNCH, Device
from moe_kernels.predict.launches import LaunchTime, Predictor
from moe_kernels.predict.layers import (
    forward_launches,
    launch_name,
    routing_launches,
    train_launches,
)
from moe_kernels.predict.routing import Routing, balanced_routing

__all__ = [
    "A100",
    "DEVICES",
    "H100",
    "LAUNCH",
    "Device",
    "LaunchTime",
    "Predictor",
    "Routing",
    "balanced_routing",
    "forward_launches",
    "launch_name",
    "routing_launches",
    "train_launches",
]
