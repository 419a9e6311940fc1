"""A pipelined gradient, timed in two processes that have a core each, and its parts.

Both processes call `time_rounds`. Everything is timed once in each round: the gradient of one
process alone, each schedule's gradient by both, and each part of the work alone. So a simulation
with the parts of a round can be compared with the schedules of the same round.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.base.initial import root_key
from moe_jax.config import ParallelConfig, TrainConfig
from moe_jax.objectives.next_token import next_token
from moe_jax.parallel.executor import PIPE, Arguments, Stages, make_gradient
from moe_jax.parallel.gradient_split import SAVEABLE
from moe_jax.parallel.processes import Peers
from moe_jax.parallel.schedules import PipelineSchedule
from moe_jax.parallel.simulate import Simulation, simulate
from moe_jax.study.on_cores import timed
from moe_jax.study.pipeline_parts import DEVICES, REPEATS, Program, parts_of
from moe_jax.train import step
from moe_jax.train.engines.pipelined.engine import PipelinedEngine, schedule_of
from moe_jax.train.engines.pipelined.gradient import PipelinedModel, make_arguments
from moe_jax.train.state import TrainState, init_state

Seconds = dict[str, float]
"""Of one round, by the name of what was timed."""


class Parts(NamedTuple):
    """Seconds of the parts of an update."""

    forward: float
    """F: of half of the layers, for a micro-batch."""
    backward_input: float
    backward_weight: float
    """With the sum of gradients to which it is added."""
    first: float
    """The first piece's further work: embedding."""
    pull_first: float
    """The gradient of the embedding."""
    last: float
    """The last piece's further work: head and loss, forward and backward."""
    messages: float
    """The messages of a tick: an activation and a gradient in each direction."""

    @classmethod
    def of(cls, seconds: Mapping[str, float]) -> "Parts":
        return cls(*(seconds[name] for name in cls._fields))

    def simulated(self, schedule: PipelineSchedule) -> Simulation:
        """The schedule with these costs, tick by tick as the executor does it."""
        last = schedule.pieces - 1
        share = DEVICES / schedule.pieces
        forward = [self.forward * share] * schedule.pieces
        to_input = [self.backward_input * share] * schedule.pieces
        forward[0] += self.first
        to_input[0] += self.pull_first
        to_input[last] += self.last
        to_weight = [self.backward_weight * share] * schedule.pieces
        return simulate(
            schedule, forward, to_input, to_weight, communication=self.messages, lockstep=True
        )


def with_schedule(config: TrainConfig, name: str, microbatches: int) -> TrainConfig:
    """The same run in a pipeline of two devices."""
    parallel = ParallelConfig(pipe=DEVICES, schedule=name, microbatches=microbatches)  # pyright: ignore
    return replace(config, parallel=parallel)


# Any: engines take arrays of NumPy too.
def random_batch(config: TrainConfig) -> Any:
    """Random tokens, a document in each sequence."""
    shape = (config.batch, config.data.length + 1 + config.model.mtp_depth)
    random = np.random.default_rng(config.seed)
    tokens = random.integers(0, config.data.vocabulary, shape, np.int32)
    return {"tokens": tokens, "segments": np.ones_like(tokens)}


def time_rounds(
    peers: Peers, config: TrainConfig, names: list[str], microbatches: int, rounds: int
) -> list[Seconds]:
    """What this process needed in each round. All processes call this together."""
    engines = {n: PipelinedEngine(with_schedule(config, n, microbatches)) for n in names}
    state = engines[names[0]].start(Path())  # laid out alike for all schedules
    both = {name: pipelined(engine, state) for name, engine in engines.items()}
    ticks = {n: ticks_alone(with_schedule(config, n, microbatches)) for n in names}
    alone, parts = on_one_device(config, microbatches)
    parts["messages"] = messages_of_a_tick(config, microbatches)
    programs = both | {f"{name}.ticks": program for name, program in ticks.items()}
    programs |= {"twice": alone} | parts
    for program in programs.values():
        program()  # the first call is slower
    require_same_loss({name: float(program()) for name, program in both.items()}, float(alone()))
    found = []
    for number in range(rounds):
        seconds = {}
        order = list(programs)
        shift = number * len(order) // rounds  # the place of a program in the round changes
        for name in order[shift:] + order[:shift]:
            seconds[name] = timed(peers, programs[name]) / (REPEATS if name in parts else 1)
        # Only the first process works, and the other one waits.
        seconds["once"] = timed(peers, alone if peers.index == 0 else lambda: None)
        found.append(seconds)
    return found


def require_same_loss(losses: Mapping[str, float], alone: float) -> None:
    """AssertionError: a schedule has not computed what one process does."""
    for name, loss in losses.items():
        assert abs(loss - alone) < 1e-4 * abs(alone), f"{name}: loss {loss} and not {alone}"


def pipelined(engine: PipelinedEngine, state: TrainState) -> Program:
    """The gradient of an update over the devices of all processes. It gives the loss."""
    batch = engine.place(random_batch(engine.config))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, engine.abstract_state().parameters)
    gradient = engine.make_gradient(next_token)

    def of_batch(state: TrainState, batch: Any) -> tuple[Array, Any]:
        key = state.step_key()
        (loss, _), gradients = gradient(state.parameters, state.router, batch, key)
        return loss, gradients

    with jax.set_mesh(engine.mesh):
        replicated = NamedSharding(engine.mesh, P())
        program = jax.jit(of_batch, out_shardings=(replicated, shardings))
        compiled = program.lower(state, batch).compile()
    return lambda: jax.block_until_ready(compiled(state, batch))[0]


def on_one_device(config: TrainConfig, microbatches: int) -> tuple[Program, dict[str, Program]]:
    """(the gradient without a pipeline, the parts of the pipelined one) on this process's device.

    The parts work on one micro-batch and on half of the layers.
    """
    accumulated = replace(config, optim=replace(config.optim, accumulation=microbatches))
    state = jax.jit(lambda: init_state(config))()
    batch = jax.tree.map(jnp.asarray, random_batch(config))
    gradient = step.make_gradient(accumulated)

    @jax.jit
    def alone(state: TrainState, batch: Any) -> tuple[Array, Any]:
        (loss, _), gradients = gradient(state.parameters, state.router, batch, state.step_key())
        return loss, gradients

    @jax.jit
    def arguments_of(state: TrainState, batch: Any) -> Arguments:
        key = state.step_key()
        return make_arguments(config, microbatches, state.parameters, state.router, batch, key)[0]

    stages = PipelinedModel(config, next_token, config.batch).as_stages()
    parts = parts_of(stages, arguments_of(state, batch), SAVEABLE[config.model.remat])
    return lambda: jax.block_until_ready(alone(state, batch))[0], parts


def ticks_alone(config: TrainConfig) -> Program:
    """The executor's ticks with the schedule's messages, and layers that only multiply by 1."""
    schedule = schedule_of(config.parallel)
    engine = PipelinedEngine(config)
    rows = config.batch // schedule.microbatches
    shape = (schedule.microbatches, rows, config.data.length, config.model.width)

    def layer(p: Array, x: Array, c: Any) -> tuple[Array, Array, tuple[()]]:
        return x * p, jnp.zeros(()), ()

    stages = Stages(
        first=lambda shared, c: c[1] * shared,
        layer=layer,
        last=lambda shared, y, c: (shared * y.ravel()[0], ()),
    )
    specs: Any = Arguments(P(), P(PIPE), P(PIPE), P(), P())
    gradient = make_gradient(schedule, stages, engine.mesh, specs)

    def run() -> Array:
        one = jnp.ones(())
        layers = jnp.ones(schedule.pieces)
        return gradient(Arguments(one, layers, layers, one, jnp.ones(shape))).loss

    with jax.set_mesh(engine.mesh):
        compiled = jax.jit(run).lower().compile()
    return compiled


def messages_of_a_tick(config: TrainConfig, microbatches: int) -> Program:
    """As many times as REPEATS: an activation to the next device, and a gradient to the last."""
    engine = PipelinedEngine(with_schedule(config, "1f1b", microbatches))
    rows = config.batch // microbatches
    shape = (DEVICES, rows, config.data.length, config.model.width)

    def exchange(_: int, boxes: tuple[Array, Array]) -> tuple[Array, Array]:
        y, dx = (lax.ppermute(box, PIPE, [(0, 1), (1, 0)]) for box in boxes)
        return y, dx

    def of_device(x: Array) -> tuple[Array, Array]:
        return lax.fori_loop(0, REPEATS, exchange, (x, x + 1))

    mesh: Mesh = engine.mesh
    local = jax.shard_map(of_device, mesh=mesh, in_specs=P(PIPE), out_specs=P(PIPE))
    sharding = NamedSharding(mesh, P(PIPE))
    x = jax.jit(lambda: jax.random.normal(root_key(0), shape), out_shardings=sharding)()
    compiled = jax.jit(local).lower(x).compile()
    return lambda: compiled(x)
