"""The layer over many devices: each routes and computes its own share of the batch.

Exchange between devices lies above the mixture: no implementation of the experts knows of devices.
"""

from jax import Array
from jaxtyping import Float

from moe_jax.config import MoEConfig
from moe_jax.moe.layer import Layer, RouterStats, moe_layer
from moe_jax.moe.rules import RoutingContext
from moe_jax.parallel.mesh import map_over_data, own_key


def over_data(
    x: Float[Array, "B L D"], context: RoutingContext, layer: Layer, config: MoEConfig
) -> tuple[Float[Array, "B L D"], RouterStats]:
    """moe_layer on every device's rows of x, and the statistics over the whole batch."""

    def local(
        batch: tuple[Array, Array | None, Array | None], shared: tuple[Layer, Array | None]
    ) -> tuple[tuple[Array, Array | None], RouterStats]:
        rows, tokens, documents = batch
        layer, key = shared
        own = RoutingContext(tokens, own_key(key), documents)
        out, choice = moe_layer(rows, layer, config, own)
        # The chosen experts are rows of the batch. The other statistics are the same everywhere.
        return (out, choice.stats.experts), choice.stats._replace(experts=None)

    batch = (x, context.tokens, context.documents)
    (out, experts), stats = map_over_data(local)(batch, (layer, context.key))
    return out, stats._replace(experts=experts)
