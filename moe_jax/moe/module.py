"""The parameters of a mixture-of-experts layer: a router, its bias, and the stacked experts."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from moe_jax.base.initial import named_key, normal_parameter
from moe_jax.config import MoEConfig
from moe_jax.moe import layer, sharded
from moe_jax.moe.rules import NO_CONTEXT, RoutingContext


class RouterBias(nnx.Variable):
    """Selection bias of a sigmoid gate: state that no optimizer touches (balance.update_bias)."""


class ExpertSlots(nnx.Variable):
    """The expert in each slot of the devices, int32[slots] (moe.replicas). A layer has this only
    where experts change their devices. Otherwise each device has its own, in order."""


class MoE(nnx.Module):
    """y[t] = sum_k weight[t, k] · expert_k(x[t]) over the K experts that the gate chooses."""

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        *,
        std: float,
        out_std: float,
        dtype: jnp.dtype,
        gradient: str = "float32",
        key: Array,
    ) -> None:
        """`gradient`: see ModelConfig.gradient_dtype."""
        experts = config.experts
        hidden = config.expert_hidden
        self.config = config
        self.gradient = gradient

        def normal(name: str, shape: tuple[int, ...], std: float) -> nnx.Param:
            return normal_parameter(named_key(key, name), shape, std, dtype)

        self.router = normal("router", (width, experts), std)
        self.gate_up = normal("gate_up", (experts, width, 2 * hidden), std)
        self.down = normal("down", (experts, hidden, width), out_std)
        if config.rule == "noisy_top_k":
            # Zero: at the start every logit has noise of the same size, softplus(0).
            self.router_noise = nnx.Param(jnp.zeros((width, experts), dtype))
        # A softmax gate has one as well, so that every model has the same tree. It does not use it.
        self.bias = RouterBias(jnp.zeros((experts,), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: RoutingContext = NO_CONTEXT,
        stack: layer.ExpertStack | None = None,
    ) -> tuple[Float[Array, "B L D"], layer.RouterStats]:
        slots: ExpertSlots | None = getattr(self, "slots", None)  # set by merge_with_slots
        own = None if slots is None else slots[...]
        arrays = layer.Layer(self.gate(), self.gate_up[...], self.down[...], own, stack)
        return sharded.over_data(x, context, arrays, self.config, self.gradient)

    def stack(self, dtype: jnp.dtype) -> layer.ExpertStack | None:
        """Of layers whose parameters carry a leading layer axis: sharded.expert_stack."""
        return sharded.expert_stack(self.gate_up[...], self.down[...], self.config, dtype)

    def gate(self) -> layer.Gate:
        """The router's own arrays."""
        noisy = self.config.rule == "noisy_top_k"
        return layer.Gate(
            self.router[...], self.bias[...], self.router_noise[...] if noisy else None
        )

    def choose(
        self, x: Float[Array, "B L D"], context: RoutingContext = NO_CONTEXT
    ) -> layer.Choice:
        """layer.choose with this layer's router, for a batch that is on one device."""
        return layer.choose(x, self.gate(), self.config, context)
