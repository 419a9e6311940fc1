"""The layer of experts in two processes that have a core each: plain and chunked exchange."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.base.initial import named_key, root_key
from moe_jax.base.result import Measurement
from moe_jax.config import MoEConfig
from moe_jax.config.exchange import ExchangeConfig
from moe_jax.moe.expert_parallel import Experts, Sharding, expert_parallel
from moe_jax.moe.hops import Assigned
from moe_jax.moe.implementation import mixture_of
from moe_jax.moe.lanes import Matrices
from moe_jax.parallel.exchange import Level, all_to_all
from moe_jax.parallel.processes import Peers
from moe_jax.study.on_cores import timed
from moe_jax.study.rounds import speedup

EXPERT = "expert"
PLAIN = 1
"""Chunks of the plain exchange."""
Program = Callable[[], Any]
Seconds = dict[str, float]
"""Of one round, by the name of what was timed."""


@dataclass(frozen=True)
class LayerSize:
    """A layer of experts for CPUs."""

    tokens: int = 1024
    """Of a device."""
    width: int = 512
    hidden: int = 256
    experts: int = 16
    """Of all devices."""
    per_token: int = 2
    chunks: tuple[int, ...] = (2, 4)

    def quick(self) -> "LayerSize":
        """A small one."""
        return LayerSize(tokens=64, width=32, hidden=16, chunks=(2,))


def time_exchanges(peers: Peers, size: LayerSize, rounds: int) -> list[Seconds]:
    """What this process needed in each round. All processes call this together.

    `transfers` are the plain layer's, alone and forward. `products` is the same work without an
    exchange, as if all tokens went to experts of their own device.
    """
    everyone = Mesh(np.array(jax.devices()), (EXPERT,), axis_types=(AxisType.Auto,))
    alone = Mesh(np.array(jax.local_devices()), (EXPERT,), axis_types=(AxisType.Auto,))
    programs = {"transfers": transfers(size, everyone)}
    for backward in (False, True):
        for chunks in (PLAIN, *size.chunks):
            programs[name_of(chunks, backward)] = layer(size, everyone, chunks, backward)
        programs[f"products_{_pass(backward)}"] = layer(size, alone, PLAIN, backward)
    for program in programs.values():
        jax.block_until_ready(program())  # the first call is slower
    found = []
    for number in range(rounds):
        order = list(programs)
        shift = number % len(order)  # the place of a program in the round changes
        order = order[shift:] + order[:shift]
        found.append({name: timed(peers, programs[name], repeats=3) for name in order})
    return found


def name_of(chunks: int, backward: bool) -> str:
    """Of a timed layer."""
    kind = "plain" if chunks == PLAIN else f"chunked_{chunks}"
    return f"{kind}_{_pass(backward)}"


def _pass(backward: bool) -> str:
    return "backward" if backward else "forward"


def layer(size: LayerSize, mesh: Mesh, chunks: int, backward: bool) -> Program:
    """The layer on the devices of the mesh, each of which has the same number of experts."""
    devices = mesh.size
    own = size.experts // jax.device_count()
    exchange = ExchangeConfig(chunks=chunks)
    # The kernels are for GPUs.
    config = MoEConfig(experts=size.experts, implementation="xla", bias_rate=0.0)
    sharding = Sharding(EXPERT, devices, exchange, mixture_of(config))

    def of_device(x: Array, assigned: Assigned, matrices: Matrices) -> Array:
        return expert_parallel(x, assigned, Experts(matrices), sharding)[0]

    split = P(EXPERT)
    local = jax.shard_map(of_device, mesh=mesh, in_specs=(split, split, split), out_specs=split)

    def loss(x: Array, weights: Array, matrices: Matrices, experts: Array) -> Array:
        out = local(x, Assigned(experts, weights), matrices)
        return jnp.sum(out * out) / 2

    operands = placed(size, mesh, own)
    function = jax.grad(loss, (0, 1, 2)) if backward else _forward(local)
    program = jax.jit(function).lower(*operands).compile()
    return lambda: program(*operands)


def _forward(local: Callable[..., Array]) -> Callable[..., Array]:
    def forward(x: Array, weights: Array, matrices: Matrices, experts: Array) -> Array:
        return local(x, Assigned(experts, weights), matrices)

    return forward


def placed(size: LayerSize, mesh: Mesh, own: int) -> tuple[Array, Array, Matrices, Array]:
    """(x, weights, matrices, experts). Every expert gets the same number of tokens."""
    experts = own * mesh.size
    rows = size.tokens * mesh.size

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P(EXPERT)))
    def draw() -> tuple[Array, Array, Matrices, Array]:
        def normal(name: str, *shape: int) -> Array:
            return jax.random.normal(named_key(root_key(0), name), shape) / shape[-1] ** 0.5

        gate_up = normal("gate_up", experts, size.width, 2 * size.hidden)
        down = normal("down", experts, size.hidden, size.width)
        # Consecutive tokens go to consecutive experts, so to all devices in turn.
        numbers = jnp.arange(rows * size.per_token, dtype=jnp.int32) % experts
        weights = jnp.full((rows, size.per_token), 1 / size.per_token)
        return (
            normal("x", rows, size.width),
            weights,
            Matrices(gate_up, down),
            numbers.reshape(weights.shape),
        )

    return draw()


def transfers(size: LayerSize, mesh: Mesh) -> Program:
    """Only the send buffer, there and back."""
    swap = all_to_all(Level(EXPERT, mesh.size)).there
    slots = int(size.tokens * size.per_token * ExchangeConfig().buffer)
    shape = (slots * mesh.size, size.width)
    local = jax.shard_map(
        lambda x: swap(swap(x) + 1), mesh=mesh, in_specs=P(EXPERT), out_specs=P(EXPERT)
    )
    sharding = NamedSharding(mesh, P(EXPERT))
    x = jax.jit(lambda: jnp.ones(shape), out_shardings=sharding)()
    program = jax.jit(local).lower(x).compile()
    return lambda: program(x)


def measurements(size: LayerSize, processes: Sequence[list[Seconds]]) -> list[Measurement]:
    """The layer's times in two processes, and the ratios within a round. The slower one counts."""
    found = []
    seconds = {
        name: np.array([[one[name] for one in rounds] for rounds in processes]).max(axis=0)
        for name in processes[0][0]
    }
    for backward in (True, False):
        plain = seconds[name_of(PLAIN, backward)]
        for chunks in size.chunks:
            # speedup's ratio is baseline / seconds.
            ratio = speedup(plain, seconds[name_of(chunks, backward)])
            name = f"two_process_chunked_over_plain_{_pass(backward)}_{chunks}"
            found.append(Measurement(name, ratio, "time ratio", "plain", ratio))
    first = found[0]
    named = Measurement("two_process_chunked_over_plain", first.value, "time ratio", "plain")
    times = [
        Measurement(f"two_process_{name}", 1e3 * float(np.median(values)), "ms")
        for name, values in seconds.items()
    ]
    return [named, *found, *times]
