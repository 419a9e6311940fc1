"""The work of one device of the pipeline, tick by tick."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moe_jax.parallel.executor.interface import PIPE, Arguments, Result, Stages, Tree
from moe_jax.parallel.executor.piece import Forward, Piece, Work
from moe_jax.parallel.executor.placement import piece_numbers
from moe_jax.parallel.executor.row import Row, Step, rows_of
from moe_jax.parallel.executor.slots import (
    Stack,
    add,
    add_at,
    at,
    put,
    shapes_of,
    when,
    zero_index,
    zeros,
)
from moe_jax.parallel.gradient_split import Saveable, split
from moe_jax.parallel.mesh import largest, own_copies, varying_axes
from moe_jax.parallel.schedules import Kind, PipelineSchedule
from moe_jax.parallel.ticks import IDLE, NONE, OVERLAPPED, Channel, TickTable, tick_table

NAMES = {kind: kind.name.lower() for kind in Kind} | {OVERLAPPED: "overlapped"}
"""Names of the steps, which the operations of the compiled program carry."""
FIRST = "first"
FIRST_GRADIENT = "first_gradient"
LAST = "last"
"""Names of what the first or the last piece alone does in a step."""


class Buffers(NamedTuple):
    """What a device holds from tick to tick."""

    activations: Array
    """Messages that wait for their forward, [slots, …]."""
    gradients: Array
    """Messages that wait for their backward, [slots, …]."""
    saved: tuple[Tree, Array]
    """Of a piece's layers and its output, between a forward and its last backward, [slots, …]."""
    pending: Tree
    """Between a backward to the input and the one to the weights, [slots, …]."""
    result: Result


class Outbox(NamedTuple):
    """What a device sends at the end of a tick: an output, and the gradient of an input."""

    activation: Array
    gradient: Array
    steps: Array
    """Steps that the device has done in this tick, 0 or 1."""

    def at_the_end(self) -> "Outbox":
        """The same messages, which depend on all steps of the tick.

        XLA may otherwise send an activation between the steps. A device that does a backward would
        then wait there until its neighbour has done a forward, and the other way round.
        """
        done = self.steps >= 0  # always, which XLA cannot know
        activation = jnp.where(done, self.activation, 0)
        return Outbox(activation, jnp.where(done, self.gradient, 0), self.steps)


@dataclass(frozen=True)
class DeviceProgram:
    """The work of one device. It runs inside jax.shard_map over `axes`."""

    table: TickTable
    placement: np.ndarray
    """piece_numbers of the schedule."""
    stages: Stages
    axes: tuple[str, ...]
    arguments: Arguments
    """Layers and their constants are [chunks, layers of a piece, …] here."""
    piece: Piece
    x: Any
    """Shape of a message."""
    split: tuple[Tree, Tree]
    """The axes over which each of the shared parameters and of the layers' is split."""

    @classmethod
    def of(
        cls,
        schedule: PipelineSchedule,
        stages: Stages,
        saveable: Saveable,
        axes: tuple[str, ...],
        arguments: Arguments,
    ) -> "DeviceProgram":
        """Marks parameters as the device's own, and splits the gradient of a layer."""
        split_over = jax.tree.map(varying_axes, (arguments.shared, arguments.layers))
        # Their gradients then stay local until the end, where they are summed once. What is the
        # same on several devices keeps its type, and so do losses: the cotangent of a loss that
        # all devices have together must not be counted by each of them.
        arguments = arguments._replace(
            shared=own_copies(arguments.shared, axes), layers=own_copies(arguments.layers, axes)
        )
        c = (arguments.constants, at(arguments.contexts, zero_index()))
        x = jax.eval_shape(lambda a, c: own_copies(stages.first(a, c), axes), arguments.shared, c)
        p, own = (at(at(tree, zero_index()), 0) for tree in (arguments.layers, arguments.own))

        def layer(p: Tree, x: Array, c: Tree) -> tuple[Array, Array, Tree]:
            y, loss, others = stages.layer(p, x, c)
            return own_copies(y, axes), loss, others

        piece = Piece(split(layer, p, x, (own, c), saveable))
        table = tick_table(schedule)
        return cls(
            table=table,
            placement=piece_numbers(schedule),
            stages=stages,
            axes=axes,
            arguments=arguments,
            piece=piece,
            x=x,
            split=split_over,
        )

    def run(self) -> Result:
        """All ticks, then the sums over devices."""
        rows = jax.tree.map(lambda a: a[:, lax.axis_index(PIPE)], rows_of(self.table))
        buffers, _ = lax.scan(lambda b, row: (self._tick(b, row), None), self._empty(), rows)
        return self._summed(buffers.result)

    def _tick(self, buffers: Buffers, row: Row) -> Buffers:
        carry = (buffers, Outbox(zeros(self.x), zeros(self.x), zero_index()))
        for kind in np.unique(self.table.kinds):  # what the schedule never does is not compiled
            if kind != IDLE:
                carry = when(NAMES[kind], row.kind == kind, partial(self._do, kind, row), carry)
        buffers, outbox = carry
        outbox = outbox.at_the_end()
        for channel, slot in zip(self.table.channels, row.slots, strict=True):
            buffers = self._receive(buffers, channel, slot, getattr(outbox, channel.payload))
        return buffers

    def _do(self, kind: int, row: Row, carry: tuple[Buffers, Outbox]) -> tuple[Buffers, Outbox]:
        """One step of a kind."""
        buffers, (y, dx, steps) = carry
        if kind == OVERLAPPED:
            buffers, y, dx = self._overlapped(buffers, row)
        if kind == Kind.FORWARD:
            work, x = self._of_forward(buffers, row.forward)
            into = Stack(buffers.saved[0], row.forward.saved)
            done = self.piece.forward(work, x, into)
            buffers, y = self._store_forward(buffers, row.forward, done)
        if kind == Kind.BACKWARD:
            buffers, dx = self._backward(buffers, row.backward)
        if kind == Kind.BACKWARD_INPUT:
            buffers, dx = self._backward_input(buffers, row.backward)
        if kind == Kind.BACKWARD_WEIGHT:
            buffers = self._backward_weight(buffers, row.backward)
        return buffers, Outbox(y, dx, steps + 1)

    def _overlapped(self, buffers: Buffers, row: Row) -> tuple[Buffers, Array, Array]:
        """A forward and a whole backward as one computation."""
        # Both read before one of them writes, so that they do not depend on each other.
        work, x = self._of_forward(buffers, row.forward)
        buffers, other, saved, dy = self._of_backward(buffers, row.backward)
        sums = buffers.result.layers
        forward, dx, sums = self.piece.overlapped(
            (work, x, row.forward.saved), (other, saved, dy), sums
        )
        buffers = buffers._replace(result=buffers.result._replace(layers=sums))
        buffers, y = self._store_forward(buffers, row.forward, forward)
        return self._store_first(buffers, row.backward, other, dx), y, dx

    def _of_forward(self, buffers: Buffers, step: Step) -> tuple[Work, Array]:
        """The operands of a forward."""
        work = self._work(step)
        # Only the first piece's forward has no message.
        with jax.named_scope(FIRST):
            x = lax.cond(
                step.inbox == NONE,
                lambda: own_copies(self.stages.first(self.arguments.shared, work.c), self.axes),
                lambda: at(buffers.activations, step.inbox),
            )
        return work, x

    def _store_forward(self, buffers: Buffers, step: Step, done: Forward) -> tuple[Buffers, Array]:
        result = buffers.result
        result = result._replace(
            loss=result.loss + done.loss, others=add_at(result.others, step.chunk, done.others)
        )
        saved = (done.saved, put(buffers.saved[1], step.saved, done.y))
        return buffers._replace(saved=saved, result=result), done.y

    def _of_backward(self, buffers: Buffers, step: Step) -> tuple[Buffers, Work, Stack, Array]:
        """The operands of a backward. The last piece computes its own dy."""
        work = self._work(step)
        y = at(buffers.saved[1], step.saved)
        dy = at(buffers.gradients, jnp.maximum(step.inbox, 0))
        # Only the last piece's backward has no message. Only then is y the model's output.
        dy, result = when(
            LAST,
            step.inbox == NONE,
            lambda carry: self._last(carry[1], y, work.c),
            (dy, buffers.result),
        )
        return buffers._replace(result=result), work, Stack(buffers.saved[0], step.saved), dy

    def _backward(self, buffers: Buffers, step: Step) -> tuple[Buffers, Array]:
        """The whole backward of a piece: both halves."""
        buffers, work, saved, dy = self._of_backward(buffers, step)
        dx, sums = self.piece.backward(work, saved, dy, buffers.result.layers)
        buffers = buffers._replace(result=buffers.result._replace(layers=sums))
        return self._store_first(buffers, step, work, dx), dx

    def _backward_input(self, buffers: Buffers, step: Step) -> tuple[Buffers, Array]:
        buffers, work, saved, dy = self._of_backward(buffers, step)
        into = Stack(buffers.pending, step.pending)
        dx, pending = self.piece.backward_input(work, saved, dy, into)
        return self._store_first(buffers._replace(pending=pending), step, work, dx), dx

    def _store_first(self, buffers: Buffers, step: Step, work: Work, dx: Array) -> Buffers:
        """The first piece has the gradient of the parameters of `first`."""
        result = when(
            FIRST_GRADIENT,
            self._is_first(step),
            lambda r: self._pull_first(r, dx, work.c),
            buffers.result,
        )
        return buffers._replace(result=result)

    def _last(self, result: Result, y: Array, c: Tree) -> tuple[Array, Result]:
        def last(shared: Tree, y: Array) -> tuple[Array, Tree]:
            return self.stages.last(shared, y, c)

        gradient = jax.value_and_grad(last, argnums=(0, 1), has_aux=True)
        (loss, results), (shared, dy) = gradient(self.arguments.shared, y)
        result = result._replace(
            loss=result.loss + loss,
            shared=add(result.shared, shared),
            results=add(result.results, results),
        )
        return dy, result

    def _pull_first(self, result: Result, dx: Array, c: Tree) -> Result:
        def first(shared: Tree) -> Array:
            return own_copies(self.stages.first(shared, c), self.axes)

        (shared,) = jax.vjp(first, self.arguments.shared)[1](dx)
        return result._replace(shared=add(result.shared, shared))

    def _backward_weight(self, buffers: Buffers, step: Step) -> Buffers:
        result = buffers.result
        saved = Stack(buffers.saved[0], step.saved)
        kept = Stack(buffers.pending, step.pending)
        layers = self.piece.backward_weight(self._work(step), saved, kept, result.layers)
        return buffers._replace(result=result._replace(layers=layers))

    def _work(self, step: Step) -> Work:
        """Parameters and constants of the chunk, and the context of the micro-batch."""
        a = self.arguments
        c = (a.constants, at(a.contexts, step.microbatch))
        return Work(Stack(a.layers, step.chunk), Stack(a.own, step.chunk), c)

    def _receive(self, buffers: Buffers, channel: Channel, slot: Array, sent: Array) -> Buffers:
        devices = self.table.kinds.shape[1]
        if channel.hop:
            pairs = [(device, (device + channel.hop) % devices) for device in range(devices)]
            sent = lax.ppermute(sent, PIPE, pairs)
        name = f"{channel.payload}s"
        box = getattr(buffers, name)
        # A device that receives nothing writes what is there.
        value = jnp.where(slot == NONE, at(box, jnp.maximum(slot, 0)), sent)
        return buffers._replace(**{name: put(box, jnp.maximum(slot, 0), value)})

    def _is_first(self, step: Step) -> Array:
        """Whether the chunk is the model's first piece."""
        return jnp.asarray(self.placement == 0)[lax.axis_index(PIPE), step.chunk]

    def _empty(self) -> Buffers:
        """Slots and sums of zeros."""
        a = self.arguments
        work = self._work(Step(*[zero_index()] * 5))
        loss, others, saved, kept = self.piece.shapes_of_layer(work, self.x)
        loss_of_last, results = jax.eval_shape(self.stages.last, a.shared, self.x, work.c)
        slots = self.table.slots
        chunks = self.placement.shape[1]
        layers = len(work.indices)
        return Buffers(
            activations=zeros(self.x, slots.activation),
            gradients=zeros(self.x, slots.gradient),
            saved=(zeros(saved, slots.saved, layers), zeros(self.x, slots.saved)),
            pending=zeros(kept, slots.pending, layers),
            result=Result(
                loss=zeros(loss) + zeros(loss_of_last),
                shared=zeros(shapes_of(a.shared)),
                layers=zeros(shapes_of(a.layers)),
                others=zeros(others, chunks, layers),
                results=zeros(results),
            ),
        )

    def _summed(self, result: Result) -> Result:
        """Over the devices of the pipeline, and gradients over the shares of the batch as well.

        A parameter's gradient is summed over the axes on which devices have the same part of it.
        """
        shares = tuple(axis for axis in self.axes if axis != PIPE)

        def equal(leaf: Array) -> Array:
            return largest(leaf, shares)  # the same on all of them

        def summed(leaf: Array) -> Array:
            return lax.psum(equal(leaf), PIPE)

        def gradient(leaf: Array, split: frozenset[str]) -> Array:
            over = tuple(axis for axis in self.axes if axis not in split)
            return lax.psum(leaf, over) if over else leaf

        shared, layers = self.split
        return Result(
            loss=summed(result.loss),
            shared=jax.tree.map(gradient, result.shared, shared),
            layers=jax.tree.map(gradient, result.layers, layers),
            others=jax.tree.map(equal, result.others),
            results=jax.tree.map(summed, result.results),
        )
