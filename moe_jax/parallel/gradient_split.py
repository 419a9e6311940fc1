"""One function's forward, gradient of the input, and gradient of the parameters as three programs.

The gradient of a stage has two halves that a pipeline may run at different times: the gradient of
its input, which the stage before waits for, and that of its parameters, which nobody waits for
(zero-bubble schedules, arXiv:2401.10241). Two calls of `jax.vjp` would repeat the chain of
cotangents in the second half. Here the whole gradient is traced once, and its equations are dealt
out to three programs:

    outputs, saved = forward(p, x, c)
    dx, kept       = backward_input(p, c, saved, dy)
    dp             = backward_weight(p, c, saved, kept)

Each equation goes to the first program that needs its result, and later programs read the result.
So no product is computed twice, and the function needs no marks at its linear layers. There are two
exceptions. Values of p and c alone (casts, attention masks) are computed anew, because storing them
for every micro-batch would take more memory. A loop, a branch or a scan is one equation. Where it
yields parts of both halves it runs in both, each time without the results that nobody reads.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from moe_jax.parallel.equations import dependents, evaluate, inlined, reduced_to
from moe_jax.parallel.interleaving import Run, interleaved

Saveable = Callable[[core.JaxprEqn], bool]
"""Whether outputs of this equation of the forward pass may be saved. Others are recomputed."""


def everything(equation: core.JaxprEqn) -> bool:
    """Saves whatever the gradient reads."""
    return True


def nothing(equation: core.JaxprEqn) -> bool:
    """Saves the input alone, and recomputes the forward pass."""
    return False


def products_with_parameters(equation: core.JaxprEqn) -> bool:
    """Saves products without batch axes (jax.checkpoint_policies has the same policy)."""
    if equation.primitive.name != "dot_general":
        return False
    _, (left, right) = equation.params["dimension_numbers"]
    return not left and not right


SAVEABLE: dict[str, Saveable] = {
    "none": everything,
    "dots": products_with_parameters,
    "full": nothing,
}
"""By `model.remat`."""


@dataclass(frozen=True)
class Split:
    """The three programs of a function."""

    forward: Callable[[Any, Any, Any], tuple[Any, list[Array]]]
    """(p, x, c) -> ((y, loss, others), saved)"""
    backward_input: Callable[[Any, Any, Sequence[Array], Any], tuple[Any, list[Array]]]
    """(p, c, saved, dy) -> (dx, kept)"""
    backward_weight: Callable[[Any, Any, Sequence[Array], Sequence[Array]], Any]
    """(p, c, saved, kept) -> dp"""
    overlapped: Callable[[tuple[Any, Any, Any], tuple[Any, Any, Sequence[Array], Any]], Any]
    """(operands of a forward, operands of another's backward_input) -> the results of both, in
    turns (parallel.interleaving)."""
    equations: tuple[list[core.JaxprEqn], ...]
    """What the three run, for counting."""


def split(
    function: Callable[[Any, Any, Any], tuple[Any, Array, Any]],
    p: Any,
    x: Any,
    c: Any,
    saveable: Saveable = everything,
) -> Split:
    """The programs of function(p, x, c) -> (y, loss, others).

    p are parameters, x the input, c values without gradient: trees of arrays or of their shapes.
    `loss` is a scalar that is added to what is minimised, so its cotangent is 1. Nothing is
    differentiated through `others`. dy is like y.
    """
    y = jax.eval_shape(function, p, x, c)[0]
    joint = Joint.of(_gradient_of(function), (p, x, c, y))
    known = joint.known(saveable)
    to_input = joint.part(joint.dx, known)
    computed = {v for equation in to_input.equations for v in equation.outvars}
    available = (computed & joint.varying) | set(joint.dy) | known
    to_weight = joint.part(joint.dp, available)
    saved = _unique(v for v in [*to_input.reads, *to_weight.reads] if v in known)
    kept = [v for v in to_weight.reads if v in available - known]
    forward = joint.part([*joint.outputs, *saved], set())

    def start_forward(p: Any, x: Any, c: Any) -> Run:
        ends = _variables(joint.outputs[: len(joint.dy)])
        return Run(forward.equations, joint.values(p=p, x=x, c=c), joint.inputs["x"], ends)

    def end_forward(run: Run) -> tuple[Any, list[Array]]:
        out = evaluate(run.equations, run.values, [*joint.outputs, *saved])
        outputs, saved_values = _in_two(out, len(joint.outputs))
        return jax.tree.unflatten(joint.trees[0], outputs), saved_values

    def start_to_input(p: Any, c: Any, saved_values: Sequence[Array], dy: Any) -> Run:
        values = joint.values(p=p, c=c, dy=dy) | dict(zip(saved, saved_values, strict=True))
        return Run(to_input.equations, values, [*joint.dy, *saved], _variables(joint.dx))

    def end_to_input(run: Run) -> tuple[Any, list[Array]]:
        out = evaluate(run.equations, run.values, [*joint.dx, *kept])
        dx, kept_values = _in_two(out, len(joint.dx))
        return jax.tree.unflatten(joint.trees[1], dx), kept_values

    def run_overlapped(one: tuple[Any, ...], other: tuple[Any, ...]) -> Any:
        runs = start_forward(*one), start_to_input(*other)
        interleaved(*reversed(runs))  # the backward has rows to send at once
        return end_forward(runs[0]), end_to_input(runs[1])

    def run_to_weight(
        p: Any, c: Any, saved_values: Sequence[Array], kept_values: Sequence[Array]
    ) -> Any:
        known_values = dict(zip([*saved, *kept], [*saved_values, *kept_values], strict=True))
        out = evaluate(to_weight.equations, joint.values(p=p, c=c) | known_values, joint.dp)
        return jax.tree.unflatten(joint.trees[2], out)

    parts = (forward.equations, to_input.equations, to_weight.equations)
    return Split(
        forward=lambda *operands: end_forward(start_forward(*operands)),
        backward_input=lambda *operands: end_to_input(start_to_input(*operands)),
        backward_weight=run_to_weight,
        overlapped=run_overlapped,
        equations=parts,
    )


def _gradient_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """(p, x, c, dy) -> ((y, loss, others), dx, dp)"""

    def gradient(p: Any, x: Any, c: Any, dy: Any) -> Any:
        def of(p: Any, x: Any) -> Any:
            y, loss, others = function(p, x, c)
            return (y, loss), others

        (y, loss), pull, others = jax.vjp(of, p, x, has_aux=True)
        dp, dx = pull((dy, jnp.ones_like(loss)))
        return (y, loss, others), dx, dp

    return gradient


class Sliced(NamedTuple):
    """Some of the equations, and the variables that they read from outside."""

    equations: list[core.JaxprEqn]
    reads: list[core.Var]


@dataclass(frozen=True)
class Joint:
    """A forward pass and its gradient as one list of equations, with the names of its variables."""

    equations: list[core.JaxprEqn]
    constants: dict[core.Var, Any]
    inputs: dict[str, list[core.Var]]
    """Of p, x, c and dy."""
    outputs: list[Any]
    dx: list[Any]
    dp: list[Any]
    trees: tuple[Any, ...]
    """Tree structures of outputs, dx and dp."""
    varying: set[core.Var]
    """Variables that depend on x or dy."""
    backward: set[core.Var]
    """Variables that depend on dy."""

    @classmethod
    def of(cls, gradient: Callable[..., Any], arguments: tuple[Any, ...]) -> "Joint":
        traced, shapes = jax.make_jaxpr(gradient, return_shape=True)(*arguments)
        leaves = jax.tree.leaves(arguments)
        closed = jax.make_jaxpr(lambda *leaves: inlined(traced, leaves))(*leaves)
        jaxpr = closed.jaxpr
        inputs = dict(zip(["p", "x", "c", "dy"], _cut(jaxpr.invars, arguments), strict=True))
        outputs, dx, dp = _cut(jaxpr.outvars, shapes)
        return cls(
            equations=list(jaxpr.eqns),
            constants=dict(zip(jaxpr.constvars, closed.consts, strict=True)),
            inputs=inputs,
            outputs=outputs,
            dx=dx,
            dp=dp,
            trees=tuple(jax.tree.structure(tree) for tree in shapes),
            varying=dependents(jaxpr.eqns, [*inputs["x"], *inputs["dy"]]),
            backward=dependents(jaxpr.eqns, inputs["dy"]),
        )

    @property
    def dy(self) -> list[core.Var]:
        return self.inputs["dy"]

    def known(self, saveable: Saveable) -> set[core.Var]:
        """Variables of the forward pass that may be saved. x is always among them."""
        outputs = {v for e in self.equations if saveable(e) for v in e.outvars}
        return ((outputs & self.varying) - self.backward) | set(self.inputs["x"])

    def part(self, wanted: Iterable[Any], available: set[core.Var]) -> Sliced:
        """The equations that compute `wanted` from p, c, dy and what is `available`.

        An equation with several results is reduced to those that are wanted of it.
        """
        needed = {v for v in wanted if isinstance(v, core.Var)}
        equations: list[core.JaxprEqn] = []
        for equation in reversed(self.equations):
            used = [v in needed and v not in available for v in equation.outvars]
            if any(used):
                reduced = reduced_to(equation, used)
                equations.append(reduced)
                needed |= {v for v in reduced.invars if isinstance(v, core.Var)}
        return Sliced(equations[::-1], [v for v in self._order() if v in needed & available])

    def _order(self) -> list[core.Var]:
        """All variables in the order in which they come to be."""
        inputs = [v for group in self.inputs.values() for v in group]
        return [*inputs, *(v for equation in self.equations for v in equation.outvars)]

    def values(self, **trees: Any) -> dict[core.Var, Any]:
        """The values of the variables of those trees p, x, c, dy that are given."""
        values = dict(self.constants)
        for name, tree in trees.items():
            values |= zip(self.inputs[name], jax.tree.leaves(tree), strict=True)
        return values


def _cut(variables: Sequence[Any], trees: Sequence[Any]) -> list[list[Any]]:
    """The variables of each of several trees, which follow each other."""
    rest = iter(variables)
    return [[next(rest) for _ in jax.tree.leaves(tree)] for tree in trees]


def _in_two(values: Sequence[Any], number: int) -> tuple[list[Any], list[Any]]:
    """The first `number` values, and the rest."""
    return list(values[:number]), list(values[number:])


def _variables(atoms: Iterable[Any]) -> list[core.Var]:
    return [atom for atom in atoms if isinstance(atom, core.Var)]


def _unique(variables: Iterable[core.Var]) -> list[core.Var]:
    return list(dict.fromkeys(variables))
