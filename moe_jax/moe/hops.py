"""The static side of expert parallelism: who sends what to whom, and how large the buffers are."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe_jax.config.exchange import ExchangeConfig
from moe_jax.moe.wire import send_in_fp8
from moe_jax.parallel.exchange import Level, Transfer, all_to_all, shift


class Assigned(NamedTuple):
    """Which experts of a range 0 … E - 1 compute a row, and with what weight."""

    experts: Int[Array, "T K"]
    """E stands for no expert."""
    weights: Float[Array, "T K"]


class Route(NamedTuple):
    """Where a token's copies go, and for which experts each of them is."""

    destination: Int[Array, "T copies"]
    """Lane · destinations of a lane + destination. The number of all destinations: no copy."""
    experts: Int[Array, "T copies K"]
    """Experts of a copy, counted from the first of its lane, or -1 for none."""
    weights: Float[Array, "T copies K"]


class Lane(NamedTuple):
    """Destinations whose rows travel and are computed together."""

    transfer: Transfer
    first: int
    """The first expert that computes its rows, counted from the first behind the device."""
    experts: int
    """How many they are."""
    fp8: bool = False
    """Whether activations are sent in E4M3."""

    def send(self, rows: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """The activations that arrive here."""
        if self.fp8:
            return send_in_fp8(rows, self.transfer)
        return self.transfer.there(rows)


@dataclass(frozen=True)
class Hop:
    """One exchange among the devices of a level."""

    level: Level
    exchange: ExchangeConfig
    own: int
    """Experts behind each device of the level."""
    rows: int
    """Rows that a device sends copies of."""
    mean: float
    """Copies from a device to a destination, if the router is balanced."""
    most: int
    """Copies from a device to a destination, at most."""

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """A lane for each chunk of experts, or for each distance of the ring."""
        fp8 = self.exchange.fp8
        if self.exchange.kind == "ring":
            shifts = (shift(self.level, by) for by in range(self.level.size))
            return tuple(Lane(transfer, 0, self.own, fp8) for transfer in shifts)
        part = self.own // self.exchange.chunks
        transfer = all_to_all(self.level)
        return tuple(Lane(transfer, i * part, part, fp8) for i in range(self.exchange.chunks))

    @property
    def destinations(self) -> int:
        """Destinations of all lanes."""
        if self.exchange.kind == "ring":
            return self.level.size
        return self.level.size * self.exchange.chunks

    @property
    def size(self) -> int:
        """Slots of a destination (C): the mean times the buffer, in eights."""
        return max(1, min(self.most, 8 * math.ceil(self.exchange.buffer * self.mean / 8)))

    @property
    def rounds(self) -> int:
        """Rounds that suffice for any routing."""
        return -(-self.most // self.size)

    def send_small(self, parts: tuple[Float[Array, "N D"], ...]) -> list[Float[Array, "N D"]]:
        """What every lane's transfer gives for its part, in one transfer if all lanes share it.

        A transfer of a few bytes costs its latency.
        """
        if self.exchange.kind == "ring" or len(parts) == 1:
            return [lane.transfer.there(p) for lane, p in zip(self.lanes, parts, strict=True)]
        apart = [p.reshape(self.level.size, -1, p.shape[-1]) for p in parts]
        received = self.lanes[0].transfer.there(jnp.stack(apart, axis=1))  # [G, lanes, C, D]
        return [received[:, i].reshape(p.shape) for i, p in enumerate(parts)]

    def route(self, assigned: Assigned) -> Route:
        """The copies of every row. Expert e is behind device e // own of the level."""
        experts = assigned.experts
        some = experts < self.level.size * self.own
        device = experts // self.own
        if self.exchange.kind == "ring":
            device = (device - self.level.index()) % self.level.size
        within = experts % self.own
        part = self.own // self.exchange.chunks
        destination = within // part * self.level.size + device
        destination = jnp.where(some, destination, self.destinations)
        if self.exchange.kind == "copies":
            return self._one_copy_a_device(destination, within, assigned)
        local = jnp.where(some, within % part, -1)
        return Route(destination, local[..., None], assigned.weights[..., None])

    def _one_copy_a_device(
        self, device: Int[Array, "T K"], within: Int[Array, "T K"], assigned: Assigned
    ) -> Route:
        """The first of a token's experts on a device has the copy, for all its experts there."""
        same = device[:, :, None] == device[:, None, :]
        first = ~jnp.tril(same, -1).any(axis=2)
        some = device < self.level.size
        local = jnp.where(same & some[:, None, :], within[:, None, :], -1)
        weights = jnp.broadcast_to(assigned.weights[:, None, :], local.shape)
        return Route(jnp.where(first, device, self.level.size), local, weights)


def hops(
    exchange: ExchangeConfig, axis: str, devices: int, shape: tuple[int, int], own: int
) -> tuple[Hop, ...]:
    """The exchanges that a row goes through, for tokens [T, K] and `own` experts of a device."""
    tokens, per_token = shape
    if exchange.kind == "copies":
        return _copies(exchange, axis, devices, shape, own)
    level = Level(axis, devices)
    lanes = exchange.chunks
    mean = tokens * per_token / (devices * lanes)
    most = tokens * min(per_token, own // lanes)
    return (Hop(level, exchange, own, tokens, mean, most),)


def _copies(
    exchange: ExchangeConfig, axis: str, devices: int, shape: tuple[int, int], own: int
) -> tuple[Hop, ...]:
    """One exchange of copies, or one between nodes and one inside of each."""
    tokens, per_token = shape

    def mean(places: int) -> float:
        # The share of tokens that have any of K independent, equally likely experts in a place.
        return tokens * (1 - (1 - 1 / places) ** per_token)

    if exchange.node in (0, devices):
        only = Hop(Level(axis, devices), exchange, own, tokens, mean(devices), tokens)
        return (only, *_to_experts(only, shape))
    outside = Level(axis, devices, exchange.node)
    inside = Level(axis, devices, exchange.node, inside=True)
    behind = own * exchange.node
    first = Hop(outside, exchange, behind, tokens, mean(outside.size), tokens)
    rows = outside.size * first.size
    second = Hop(inside, exchange, own, rows, outside.size * mean(devices), rows)
    return (first, second, *_to_experts(second, shape))


def _to_experts(last: Hop, shape: tuple[int, int]) -> tuple[Hop, ...]:
    """From the copies that arrived to a row for each of their experts, on the device itself.

    Without it the experts' buffers would have room for all experts of every copy. Empty where a
    copy is for one expert.
    """
    tokens, per_token = shape
    if min(per_token, last.own) == 1:
        return ()
    own = Level(last.level.axis, last.level.devices, 1, inside=True)
    exchange = replace(last.exchange, kind="all_to_all", node=0, fp8=False)
    rows = last.level.size * last.size
    most = rows * min(per_token, last.own)
    return (Hop(own, exchange, last.own, rows, min(tokens * per_token, most), most),)
