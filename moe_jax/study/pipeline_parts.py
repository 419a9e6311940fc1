"""The parts of a pipelined update as programs: F, Bi and W of a piece, embedding, head."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.parallel.executor import Arguments, Stages
from moe_jax.parallel.executor.piece import Piece, Work
from moe_jax.parallel.executor.slots import Stack, add, at
from moe_jax.parallel.gradient_split import split

DEVICES = 2
"""Each has half of the layers."""
REPEATS = 5
"""Times that a part runs in its program. Memory that it needs is then there, as in the executor."""
Program = Callable[[], Any]


class Operands(NamedTuple):
    """What the parts read, in one slot."""

    arguments: Arguments
    """With half of the layers, [1, layers of a piece, …]."""
    saved: Any = None
    kept: Any = None
    x: Any = None
    """An activation, [1, …], and a gradient as well."""

    def work(self, slot: Array) -> Work:
        a = self.arguments
        c = (a.constants, at(a.contexts, slot))
        return Work(Stack(a.layers, slot), Stack(a.own, slot), c)


def parts_of(stages: Stages, arguments: Arguments, saveable: Any) -> dict[str, Program]:
    """The parts as programs of their own, by their names in Parts."""
    half = jax.tree.map(lambda a: a[None, : len(a) // DEVICES], (arguments.layers, arguments.own))
    contexts = jax.tree.map(lambda a: a[:1], arguments.contexts)
    operands = Operands(arguments._replace(layers=half[0], own=half[1], contexts=contexts))
    slot = jnp.zeros((), jnp.int32)
    work = operands.work(slot)
    x = stages.first(arguments.shared, work.c)
    p, of_layer = work.layer(slot)
    piece = Piece(split(stages.layer, p, x, of_layer, saveable))
    parts = parts_of_a_piece(piece) | parts_of_the_ends(stages)
    saved, kept = jax.tree.map(
        lambda a: jnp.zeros((1, len(work.indices), *a.shape), a.dtype),
        piece.shapes_of_layer(work, x)[2:],
    )
    operands = operands._replace(saved=saved, kept=kept, x=x[None])
    saved, y = jax.jit(parts["forward"])((saved, x), operands, slot)
    operands = operands._replace(saved=saved, x=y[None])
    kept, _ = jax.jit(parts["backward_input"])((kept, y), operands, slot)
    operands = operands._replace(kept=kept)
    shared = arguments.shared
    starts = {
        "first": x,
        "forward": (saved, x),
        "backward_input": (kept, y),
        "backward_weight": half[0],
        "last": (shared, y),
        "pull_first": shared,
    }
    return {name: repeated(parts[name], carry, operands) for name, carry in starts.items()}


Part = Callable[[Any, Operands, Array], Any]
"""(carry, operands, slot) -> carry. The carry is what the executor's loop has in its own."""


def parts_of_a_piece(piece: Piece) -> dict[str, Part]:
    """Of the layers. An output is the next turn's input, and the gradient of an input likewise."""

    def forward(carry: Any, o: Operands, slot: Array) -> Any:
        saved, x = carry
        done = piece.forward(o.work(slot), x, Stack(saved, slot))
        return done.saved, done.y

    def backward_input(carry: Any, o: Operands, slot: Array) -> Any:
        kept, dy = carry
        saved = Stack(o.saved, slot)
        dx, kept = piece.backward_input(o.work(slot), saved, dy, Stack(kept, slot))
        return kept, dx

    def backward_weight(sums: Any, o: Operands, slot: Array) -> Any:
        saved, kept = Stack(o.saved, slot), Stack(o.kept, slot)
        return piece.backward_weight(o.work(slot), saved, kept, sums)

    return {
        "forward": forward,
        "backward_input": backward_input,
        "backward_weight": backward_weight,
    }


def parts_of_the_ends(stages: Stages) -> dict[str, Part]:
    """Of embedding, head and loss."""

    def first(x: Array, o: Operands, slot: Array) -> Array:
        return stages.first(o.arguments.shared, o.work(slot).c)

    def pull_first(sums: Any, o: Operands, slot: Array) -> Any:
        c = o.work(slot).c
        pull = jax.vjp(lambda shared: stages.first(shared, c), o.arguments.shared)[1]
        return add(sums, pull(at(o.x, slot))[0])

    def last(carry: Any, o: Operands, slot: Array) -> Any:
        gradient = jax.value_and_grad(stages.last, (0, 1), has_aux=True)
        _, (shared, dy) = gradient(o.arguments.shared, at(o.x, slot), o.work(slot).c)
        return add(carry[0], shared), dy

    return {"first": first, "pull_first": pull_first, "last": last}


def repeated(part: Part, carry: Any, operands: Operands) -> Program:
    """REPEATS times the part. Each call goes on from the carry of the last one."""

    @partial(jax.jit, donate_argnums=0)
    def program(carry: Any, operands: Operands) -> Any:
        def turn(i: Array, carry: Any) -> Any:
            return part(carry, operands, i >> 30)  # 0. XLA does not know that all turns are alike

        return lax.fori_loop(0, REPEATS, turn, carry)

    held = [jax.tree.map(jnp.copy, carry)]

    def run() -> Any:
        held[0] = program(held[0], operands)
        return held[0]

    return run
