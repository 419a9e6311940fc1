"""Any pipeline schedule as one program: a scan over the ticks of its table on every device.

In a tick a device does one step of the schedule, chosen by `lax.switch`, and sends what it computed
to its neighbours by `ppermute`, outside the switch. So compiling takes as long for many
micro-batches as for few. What lies between the steps of a micro-batch is kept in slots, whose
number is the schedule's peak (parallel.ticks). A device that has nothing to do computes nothing.

The executor knows no model. It takes three functions (Stages), and the layers between the first and
the last of them are its pieces. Gradients are split by parallel.gradient_split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.gradient_split import Saveable, Split, everything, split
from moe_jax.parallel.mesh import own_copies, varying_axes
from moe_jax.parallel.schedules import Kind, PipelineSchedule
from moe_jax.parallel.ticks import IDLE, NONE, OVERLAPPED, Channel, Part, TickTable, tick_table

PIPE = "pipe"
Tree = Any


@dataclass(frozen=True)
class Stages:
    """The model as the executor sees it."""

    first: Callable[[Tree, Tree], Array]
    """(shared, c) -> x, the input of the first layer. c is (constants, context)."""
    layer: Callable[[Tree, Array, Tree], tuple[Array, Array, Tree]]
    """(p, x, (own, c)) -> (y, loss, others): a layer with parameters p and constants `own`."""
    last: Callable[[Tree, Array, Tree], tuple[Array, Tree]]
    """(shared, y, c) -> (loss, results), from the last layer's output."""


class Arguments(NamedTuple):
    """The arrays of one update."""

    shared: Tree
    """Parameters of `first` and `last`."""
    layers: Tree
    """Parameters of all layers, with a leading layer axis."""
    own: Tree
    """Constants of all layers, with a leading layer axis."""
    constants: Tree
    """Constants of all micro-batches, such as a teacher's parameters."""
    contexts: Tree
    """What each micro-batch has of its own, with a leading micro-batch axis."""


class Result(NamedTuple):
    """Sums over all micro-batches."""

    loss: Array
    """Of `last` and of all layers."""
    shared: Tree
    """Gradients."""
    layers: Tree
    """Gradients, with a leading layer axis."""
    others: Tree
    """Of every layer, with a leading layer axis."""
    results: Tree
    """Of `last`."""


class Buffers(NamedTuple):
    """What a device holds from tick to tick."""

    activations: Array
    """Messages that wait for their forward, [slots, …]."""
    gradients: Array
    """Messages that wait for their backward, [slots, …]."""
    saved: Tree
    """Between a forward and its last backward, [slots, …]."""
    pending: Tree
    """Between a backward to the input and the one to the weights, [slots, …]."""
    result: Result


class Step(NamedTuple):
    """A device's cell of parallel.ticks.Part."""

    microbatch: Array
    chunk: Array
    inbox: Array
    saved: Array
    pending: Array


class Row(NamedTuple):
    """A device's cell of the table."""

    kind: Array
    forward: Step
    backward: Step
    slots: tuple[Array, ...]
    """Of each channel: where the message that comes in is stored."""


def make_gradient(
    schedule: PipelineSchedule,
    stages: Stages,
    mesh: Mesh,
    contexts: Tree,
    saveable: Saveable = everything,
) -> Callable[[Arguments], Result]:
    """The gradient of an update by this schedule, over the axis `pipe` of the mesh.

    `contexts` is the layout of Arguments.contexts: a spec, or a tree of them. All axes of the mesh
    are manual inside. Each device runs the stages on its own rows, and the losses that `layer` and
    `last` return are sums over the whole batch, which they take themselves (lax.psum).
    """
    placement = piece_numbers(schedule)
    axes = tuple(mesh.axis_names)

    def of_device(arguments: Arguments) -> Result:
        return DeviceProgram.of(schedule, stages, saveable, axes, arguments).run()

    whole: Any = P()
    own: Any = P(PIPE)
    spec = Arguments(whole, own, own, whole, contexts)
    out = Result(whole, whole, own, own, whole)
    local = jax.shard_map(
        of_device, mesh=mesh, in_specs=(spec,), out_specs=out, axis_names=set(axes)
    )

    def gradient(arguments: Arguments) -> Result:
        def placed(tree: Tree) -> Tree:
            return jax.tree.map(lambda a: to_places(a, placement), tree)

        def collected(tree: Tree) -> Tree:
            return jax.tree.map(lambda a: from_places(a, placement), tree)

        placed_arguments = arguments._replace(
            layers=placed(arguments.layers), own=placed(arguments.own)
        )
        result = local(placed_arguments)
        return result._replace(layers=collected(result.layers), others=collected(result.others))

    return gradient


def piece_numbers(schedule: PipelineSchedule) -> np.ndarray:
    """int[G, chunks]: the number of the piece that each device has as each of its chunks."""
    chunks = len(schedule.positions) // schedule.devices
    numbers = np.zeros((schedule.devices, chunks), np.int32)
    for (device, chunk), number in schedule.positions.items():
        numbers[device, chunk] = number
    return numbers


def to_places(layers: Array, placement: np.ndarray) -> Array:
    """[layers, …] of the model -> [G · chunks, layers of a piece, …] of the devices."""
    pieces = layers.reshape(placement.max() + 1, -1, *layers.shape[1:])
    order = placement.reshape(-1)
    # One piece a device in order is the common case, and takes no gather.
    return pieces if np.array_equal(order, np.arange(len(order))) else pieces[order]


def from_places(places: Array, placement: np.ndarray) -> Array:
    """The sum of the copies of each piece, in the model's order: the transpose of to_places."""
    order = placement.reshape(-1)
    if not np.array_equal(order, np.arange(len(order))):
        empty = jnp.zeros((placement.max() + 1, *places.shape[1:]), places.dtype)
        places = empty.at[order].add(places)
    return places.reshape(-1, *places.shape[2:])


@dataclass(frozen=True)
class Piece:
    """The layers of a piece in a scan, so that one layer is compiled for all."""

    layer: Split

    def forward(self, p: Tree, x: Array, own: Tree, c: Tree) -> tuple[Array, Array, Tree, Tree]:
        """(y, loss, others of every layer, saved)"""

        def step(x: Array, layer: tuple[Tree, Tree]) -> tuple[Array, Tree]:
            (y, loss, others), saved = self.layer.forward(layer[0], x, (layer[1], c))
            return y, (loss, others, saved)

        y, (losses, others, saved) = lax.scan(step, x, (p, own))
        return y, losses.sum(), others, saved

    def backward_input(
        self, p: Tree, own: Tree, c: Tree, saved: Tree, dy: Array
    ) -> tuple[Array, Tree]:
        """(dx, kept)"""

        def step(dy: Array, layer: tuple[Tree, Tree, Tree]) -> tuple[Array, Tree]:
            p, own, saved = layer
            return self.layer.backward_input(p, (own, c), saved, dy)

        return lax.scan(step, dy, (p, own, saved), reverse=True)

    def backward_weight(self, p: Tree, own: Tree, c: Tree, saved: Tree, kept: Tree) -> Tree:
        """dp of every layer"""

        def step(_: None, layer: tuple[Tree, Tree, Tree, Tree]) -> tuple[None, Tree]:
            p, own, saved, kept = layer
            return None, self.layer.backward_weight(p, (own, c), saved, kept)

        return lax.scan(step, None, (p, own, saved, kept))[1]


class Outbox(NamedTuple):
    """What a device sends at the end of a tick: an output, and the gradient of an input."""

    activation: Array
    gradient: Array


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
        # Their gradients then stay local until the end, where they are summed once. What is the
        # same on several devices keeps its type, and so do losses: the cotangent of a loss that
        # all devices have together must not be counted by each of them.
        arguments = arguments._replace(
            shared=own_copies(arguments.shared, axes), layers=own_copies(arguments.layers, axes)
        )
        c = (arguments.constants, _at(arguments.contexts, _zero()))
        x = jax.eval_shape(lambda a, c: own_copies(stages.first(a, c), axes), arguments.shared, c)
        p, own = (_at(_at(tree, _zero()), 0) for tree in (arguments.layers, arguments.own))

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
        )

    def run(self) -> Result:
        """All ticks, then the sums over devices."""
        rows = jax.tree.map(lambda a: a[:, lax.axis_index(PIPE)], _rows(self.table))
        buffers, _ = lax.scan(lambda b, row: (self._tick(b, row), None), self._empty(), rows)
        return self._summed(buffers.result)

    def _tick(self, buffers: Buffers, row: Row) -> Buffers:
        carry = (buffers, Outbox(*[_zeros(self.x)] * 2))
        for kind in np.unique(self.table.kinds):  # what the schedule never does is not compiled
            if kind != IDLE:
                carry = _when(row.kind == kind, partial(self._do, kind, row), carry)
        buffers, outbox = carry
        for channel, slot in zip(self.table.channels, row.slots, strict=True):
            buffers = self._receive(buffers, channel, slot, getattr(outbox, channel.payload))
        return buffers

    def _do(self, kind: int, row: Row, carry: tuple[Buffers, Outbox]) -> tuple[Buffers, Outbox]:
        """One step of a kind."""
        buffers, (y, dx) = carry
        if kind in (Kind.FORWARD, OVERLAPPED):
            buffers, y = self._forward(buffers, row.forward)
        if kind in (Kind.BACKWARD, OVERLAPPED):
            buffers, dx, kept = self._backward_input(buffers, row.backward)
            buffers = self._backward_weight(buffers, row.backward, kept)
        if kind == Kind.BACKWARD_INPUT:
            buffers, dx, kept = self._backward_input(buffers, row.backward)
            pending = _put(buffers.pending, row.backward.pending, kept)
            buffers = buffers._replace(pending=pending)
        if kind == Kind.BACKWARD_WEIGHT:
            kept = _at(buffers.pending, row.backward.pending)
            buffers = self._backward_weight(buffers, row.backward, kept)
        return buffers, Outbox(y, dx)

    def _forward(self, buffers: Buffers, step: Step) -> tuple[Buffers, Array]:
        p, own, c = self._inputs(step)
        # Only the first piece's forward has no message.
        x = lax.cond(
            step.inbox == NONE,
            lambda: own_copies(self.stages.first(self.arguments.shared, c), self.axes),
            lambda: _at(buffers.activations, step.inbox),
        )
        y, loss, others, saved = self.piece.forward(p, x, own, c)
        result = buffers.result
        result = result._replace(
            loss=result.loss + loss, others=_add_at(result.others, step.chunk, others)
        )
        saved = _put(buffers.saved, step.saved, (saved, y))
        return buffers._replace(saved=saved, result=result), y

    def _backward_input(self, buffers: Buffers, step: Step) -> tuple[Buffers, Array, Tree]:
        p, own, c = self._inputs(step)
        saved, y = _at(buffers.saved, step.saved)
        dy = _at(buffers.gradients, jnp.maximum(step.inbox, 0))
        # Only the last piece's backward has no message. Only then is y the model's output.
        dy, result = _when(
            step.inbox == NONE, lambda carry: self._last(carry[1], y, c), (dy, buffers.result)
        )
        dx, kept = self.piece.backward_input(p, own, c, saved, dy)
        result = _when(self._is_first(step), lambda r: self._pull_first(r, dx, c), result)
        return buffers._replace(result=result), dx, kept

    def _last(self, result: Result, y: Array, c: Tree) -> tuple[Array, Result]:
        def last(shared: Tree, y: Array) -> tuple[Array, Tree]:
            return self.stages.last(shared, y, c)

        gradient = jax.value_and_grad(last, argnums=(0, 1), has_aux=True)
        (loss, results), (shared, dy) = gradient(self.arguments.shared, y)
        result = result._replace(
            loss=result.loss + loss,
            shared=_sum(result.shared, shared),
            results=_sum(result.results, results),
        )
        return dy, result

    def _pull_first(self, result: Result, dx: Array, c: Tree) -> Result:
        def first(shared: Tree) -> Array:
            return own_copies(self.stages.first(shared, c), self.axes)

        (shared,) = jax.vjp(first, self.arguments.shared)[1](dx)
        return result._replace(shared=_sum(result.shared, shared))

    def _backward_weight(self, buffers: Buffers, step: Step, kept: Tree) -> Buffers:
        p, own, c = self._inputs(step)
        saved, _ = _at(buffers.saved, step.saved)
        gradient = self.piece.backward_weight(p, own, c, saved, kept)
        result = buffers.result
        layers = _add_at(result.layers, step.chunk, gradient)
        return buffers._replace(result=result._replace(layers=layers))

    def _inputs(self, step: Step) -> tuple[Tree, Tree, Tree]:
        """Parameters and constants of the chunk, and the context of the micro-batch."""
        a = self.arguments
        c = (a.constants, _at(a.contexts, step.microbatch))
        return _at(a.layers, step.chunk), _at(a.own, step.chunk), c

    def _receive(self, buffers: Buffers, channel: Channel, slot: Array, sent: Array) -> Buffers:
        devices = self.table.kinds.shape[1]
        if channel.hop:
            pairs = [(device, (device + channel.hop) % devices) for device in range(devices)]
            sent = lax.ppermute(sent, PIPE, pairs)
        name = f"{channel.payload}s"
        box = getattr(buffers, name)
        # A device that receives nothing writes what is there.
        value = jnp.where(slot == NONE, _at(box, jnp.maximum(slot, 0)), sent)
        return buffers._replace(**{name: _put(box, jnp.maximum(slot, 0), value)})

    def _is_first(self, step: Step) -> Array:
        """Whether the chunk is the model's first piece."""
        return jnp.asarray(self.placement == 0)[lax.axis_index(PIPE), step.chunk]

    def _empty(self) -> Buffers:
        """Slots and sums of zeros."""
        a = self.arguments
        p, own, c = self._inputs(Step(*[_zero()] * 5))
        shapes = jax.eval_shape(self.piece.forward, p, self.x, own, c)
        y, loss, others, saved = shapes
        kept = jax.eval_shape(self.piece.backward_input, p, own, c, saved, y)[1]
        loss_of_last, results = jax.eval_shape(self.stages.last, a.shared, y, c)
        slots = self.table.slots
        chunks = self.placement.shape[1]
        return Buffers(
            activations=_zeros(y, slots.activation),
            gradients=_zeros(y, slots.gradient),
            saved=_zeros((saved, y), slots.saved),
            pending=_zeros(kept, slots.pending),
            result=Result(
                loss=_zeros(loss) + _zeros(loss_of_last),
                shared=_zeros(_shapes(a.shared)),
                layers=_zeros(_shapes(a.layers)),
                others=_zeros(others, chunks),
                results=_zeros(results),
            ),
        )

    def _summed(self, result: Result) -> Result:
        """Over the devices of the pipeline, and gradients over the shares of the batch as well."""
        shares = tuple(axis for axis in self.axes if axis != PIPE)

        def equal(leaf: Array) -> Array:
            # It is the same on all of them, and pmax says so to the type.
            axes = tuple(axis for axis in shares if axis in varying_axes(leaf))
            return lax.pmax(leaf, axes) if axes else leaf

        def summed(leaf: Array) -> Array:
            return lax.psum(equal(leaf), PIPE)

        return Result(
            loss=summed(result.loss),
            shared=lax.psum(result.shared, self.axes),
            layers=lax.psum(result.layers, shares) if shares else result.layers,
            others=jax.tree.map(equal, result.others),
            results=jax.tree.map(summed, result.results),
        )


def _when(predicate: Array, function: Callable[[Tree], Tree], carry: Tree) -> Tree:
    """function(carry) if the predicate holds, else carry.

    A loop of at most one turn, and not lax.cond: XLA updates the carry of a loop in place, and
    would copy all slots and sums of gradients in each branch of a conditional.
    """

    def turn(state: tuple[Array, Tree]) -> tuple[Array, Tree]:
        old = state[1]
        new = jax.tree.map(lambda a, like: own_copies(a, varying_axes(like)), function(old), old)
        return jnp.zeros_like(state[0]), new

    return lax.while_loop(lambda state: state[0], turn, (predicate, carry))[1]


def _rows(table: TickTable) -> Row:
    """The table as arrays [ticks, G]."""

    def step(part: Part) -> Step:
        return Step(*(jnp.asarray(getattr(part, name)) for name in Step._fields))

    slots = tuple(jnp.asarray(channel.slots) for channel in table.channels)
    return Row(jnp.asarray(table.kinds), step(table.forward), step(table.backward), slots)


def _at(tree: Tree, index: Array | int) -> Tree:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def _put(tree: Tree, index: Array, values: Tree) -> Tree:
    return jax.tree.map(
        lambda a, value: lax.dynamic_update_index_in_dim(a, value, index, 0), tree, values
    )


def _add_at(tree: Tree, index: Array, values: Tree) -> Tree:
    return jax.tree.map(lambda a, value: a.at[index].add(value), tree, values)


def _sum(tree: Tree, values: Tree) -> Tree:
    return jax.tree.map(jnp.add, tree, values)


def _zero() -> Array:
    """Index 0, with the type of an index that each device of the pipeline reads from its table."""
    return own_copies(jnp.zeros((), jnp.int32), (PIPE,))


def _shapes(tree: Tree) -> Tree:
    return jax.eval_shape(lambda: tree)


def _zeros(shapes: Tree, *leading: int) -> Tree:
    """Zeros of the same shapes and types, each device's own over the pipeline as well."""
    # At least one slot, so that a schedule without messages needs no case of its own.
    leading = tuple(max(1, number) for number in leading)

    def zeros(leaf: Any) -> Array:
        empty = jnp.zeros((*leading, *leaf.shape), leaf.dtype)
        return own_copies(empty, {PIPE, *varying_axes(leaf)})

    return jax.tree.map(zeros, shapes)
