"""One layer to be timed: its sizes, random inputs, and the layer as a plain function of arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from moe_jax.config import MoEConfig
from moe_jax.moe.layer import Gate, Layer, moe_layer


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: T, D, F, E, K."""

    tokens: int
    width: int
    hidden: int
    experts: int
    per_token: int
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = (self.tokens, self.width, self.hidden, self.experts, self.per_token)
        return " ".join(f"{k}={v}" for k, v in zip("TDFEK", sizes, strict=True))

    @property
    def rows(self) -> int:
        """S = T·K."""
        return self.tokens * self.per_token

    @property
    def flops(self) -> float:
        """Useful FLOPs of the experts, forward: 6 S D F. Forward and backward: three times that."""
        return 6.0 * self.rows * self.width * self.hidden

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's matrices, 3 D F numbers."""
        return 3 * self.width * self.hidden * jnp.dtype(self.dtype).itemsize


class Inputs(NamedTuple):
    """Random arrays of a layer call. Their scale keeps all activations near 1."""

    x: Float[Array, "T D"]
    router: Float[Array, "D E"]
    gate_up: Float[Array, "E D twoF"]
    down: Float[Array, "E F D"]
    cotangent: Float[Array, "T D"]

    @property
    def arguments(self) -> tuple[Array, Array, Array, Array]:
        """What the layer takes, and has gradients for."""
        return self.x, self.router, self.gate_up, self.down


def make_inputs(shape: Shape, seed: int) -> Inputs:
    """Normal arrays, the matrices divided by the root of their inputs' width.

    The router is float32 whatever the others are, as in training.
    """
    random = np.random.default_rng(seed)

    def normal(*size: int, divisor: float = 1.0, dtype: str = shape.dtype) -> Array:
        numbers = random.standard_normal(size, np.float32) / np.float32(divisor)
        return jnp.asarray(numbers, dtype)

    experts = shape.experts
    width = shape.width
    hidden = shape.hidden
    return Inputs(
        x=normal(shape.tokens, width),
        router=normal(width, experts, divisor=width**0.5, dtype="float32"),
        gate_up=normal(experts, width, 2 * hidden, divisor=width**0.5),
        down=normal(experts, hidden, width, divisor=hidden**0.5),
        cotangent=normal(shape.tokens, width),
    )


def moe_config(shape: Shape, implementation: Literal["xla", "reference"] = "xla") -> MoEConfig:
    """A sigmoid gate and no balance loss, so that the layer alone is timed."""
    return MoEConfig(
        experts=shape.experts,
        experts_per_token=shape.per_token,
        expert_hidden=shape.hidden,
        sequence_loss=0.0,
        implementation=implementation,
    )


def layer(config: MoEConfig) -> Callable[[Array, Array, Array, Array], Array]:
    """Router, route, plan and experts: (x, router, gate_up, down) -> outputs [T, D]."""

    def run(x: Array, router: Array, gate_up: Array, down: Array) -> Array:
        gate = Gate(router, jnp.zeros(config.experts))
        return moe_layer(x[None], Layer(gate, gate_up, down), config)[0][0]

    return run


def with_gradients(function: Callable[..., Array]) -> Callable[..., Any]:
    """The function (cotangent, arguments, *fixed) -> (outputs, gradients of the arguments).

    It returns the outputs, too: XLA would leave out the computation that only they need.
    """

    def run(cotangent: Array, arguments: tuple[Array, ...], *fixed: Array) -> Any:
        out, pull = jax.vjp(lambda *a: function(*a, *fixed), *arguments)
        return out, pull(cotangent)

    return run
