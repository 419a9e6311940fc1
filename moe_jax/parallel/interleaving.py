"""Two independent programs as one, in which each computes while the other's rows travel.

A program is equations (parallel.equations). Some of them are transfers: collectives that send many
bytes. XLA's scheduler may start a transfer early and wait for it late, and yet it puts one program
behind the other where nothing holds it back. So the two take turns here: a program computes until
it has the operands of its next transfer. Then that transfer starts, and the other program goes on
from the result of its own last one. An optimization barrier around both values fixes this order:

    a: computes | transfer .......... | computes | transfer ......
    b: transfer ......... | computes  | transfer ........ | computes
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from moe_jax.parallel.equations import dependents, evaluate
from moe_jax.parallel.mesh import all_at_once

TRANSFERS = ("all_to_all", "all_gather", "reduce_scatter", "ppermute")
"""Collectives that send rows. Sums of a few numbers wait for each other as they come."""
SMALL = 1 / 8
"""A transfer of less than this share of the largest one is no turn."""


@dataclass
class Run:
    """A program under way."""

    equations: list[core.JaxprEqn]
    values: dict[core.Var, Any]
    """What is known, at first the inputs."""
    last: list[core.Var]
    """Results of its last transfer, at first all of a micro-batch that it reads."""
    ends: list[core.Var]
    """Its results."""
    sent: bool = False
    """Whether it has transferred anything yet."""


Place = tuple[dict[core.Var, Any], core.Var]
"""Where a value is."""


def interleaved(one: Run, other: Run) -> None:
    """Evaluates both programs, turn by turn. `one` begins."""
    prepared = [*_prepare(one), *_prepare(other)]
    least = SMALL * max(map(_bytes, (*one.equations, *other.equations)), default=0)
    while one.equations:
        operands = _advance(one, least)
        if other.equations and (one.equations or other.sent):
            places = [(one.values, v) for v in operands]
            _tie(places + [(other.values, v) for v in other.last] + prepared)
            prepared = []
        if one.equations:
            transfer = one.equations.pop(0)
            evaluate([transfer], one.values, [])
            one.last = list(transfer.outvars)
            one.sent = True
        if other.equations:
            one, other = other, one


def _advance(run: Run, least: float) -> list[core.Var]:
    """Evaluates up to the next transfer: its operands. At the end they are the results."""
    number = next(
        (i for i, equation in enumerate(run.equations) if _bytes(equation) > max(least, 0.0)),
        len(run.equations),
    )
    evaluate(run.equations[:number], run.values, [])
    run.equations = run.equations[number:]
    return _variables(run.equations[0].invars) if run.equations else run.ends


def _prepare(run: Run) -> list[Place]:
    """Evaluates what does not depend on the micro-batch, such as matrices in the compute dtype.

    It is there before the first transfer starts. Otherwise the scheduler puts these copies under
    the transfer, and products are left over.
    """
    later = dependents(run.equations, run.last)
    first = [e for e in run.equations if not later.intersection(e.outvars)]
    run.equations = [e for e in run.equations if later.intersection(e.outvars)]
    evaluate(first, run.values, [])
    read = {v for e in run.equations for v in e.invars if isinstance(v, core.Var)}
    made = [v for e in first for v in e.outvars if v in read and _is_float(v.aval)]
    return [(run.values, v) for v in made]


def _tie(places: list[Place]) -> None:
    tied = all_at_once([values[v] for values, v in places])
    for (values, v), value in zip(places, tied, strict=True):
        values[v] = value


def _is_float(shape: Any) -> bool:
    return jnp.issubdtype(shape.dtype, jnp.floating)


def _bytes(equation: core.JaxprEqn) -> int:
    """Bytes of the operands of a transfer, 0 for any other equation."""
    if equation.primitive.name not in TRANSFERS:
        return 0
    shapes: list[Any] = [v.aval for v in equation.invars]
    return sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes)


def _variables(atoms: Sequence[Any]) -> list[core.Var]:
    return [atom for atom in atoms if isinstance(atom, core.Var)]
