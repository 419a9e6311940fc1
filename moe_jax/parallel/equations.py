"""The equations of a traced function (jaxpr): evaluated, followed, and reduced to used results."""

from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend import core
from jax.extend.core import primitives
from jax.interpreters import partial_eval

from moe_jax.parallel.mesh import own_copies


def dependents(equations: Iterable[core.JaxprEqn], variables: Iterable[core.Var]) -> set[core.Var]:
    """The variables, and all that are computed from them."""
    found = set(variables)
    for equation in equations:
        if any(v in found for v in equation.invars if isinstance(v, core.Var)):
            found |= set(equation.outvars)
    return found


def evaluate(
    equations: Iterable[core.JaxprEqn], values: dict[core.Var, Any], wanted: Sequence[Any]
) -> list[Any]:
    """The values of `wanted`, from those of the variables that the equations begin with.

    Called functions are evaluated in place, so that a trace of this has none.
    """

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in equations:
        out = _bind(equation, [read(atom) for atom in equation.invars])
        values |= zip(equation.outvars, out, strict=True)
    return [read(atom) for atom in wanted]


def _bind(equation: core.JaxprEqn, arguments: Sequence[Any]) -> Sequence[Any]:
    called = CALLS.get(equation.primitive.name)
    if called is not None:
        return inlined(equation.params[called], arguments)
    if equation.primitive.name == "pvary":
        # A value may have more axes here than in the trace: kernels' results have none there, and
        # what a pipeline has stored between two programs has its axis.
        return [own_copies(argument, equation.params["axes"]) for argument in arguments]
    parameters = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        out = equation.primitive.bind(*arguments, **parameters)
    return out if equation.primitive.multiple_results else [out]


CALLS = {"jit": "jaxpr", "custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
"""Primitives that call a function, and its name among their parameters. Derivatives are taken
before equations are looked at, so that those with a rule of their own are calls like others."""


def inlined(closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates with every called function in its place: an equation is then one operation."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, arguments, strict=True)
    return evaluate(closed.jaxpr.eqns, values, closed.jaxpr.outvars)


def reduced_to(equation: core.JaxprEqn, used: list[bool]) -> core.JaxprEqn:
    """The equation without the results that are not used, where its kind allows that."""
    if all(used):
        return equation
    if equation.primitive is primitives.while_p:
        return _reduced_while(equation, used)
    if equation.primitive.name == "optimization_barrier":
        return equation.replace(
            invars=_of(equation.invars, used), outvars=_of(equation.outvars, used)
        )
    rule = partial_eval.dce_rules.get(equation.primitive)
    reduced = equation if rule is None else rule(used, equation)[1]
    assert reduced is not None, "an equation that is used was removed"
    return reduced


def _of(values: Sequence[Any], used: Sequence[bool]) -> list[Any]:
    return [value for value, is_used in zip(values, used, strict=True) if is_used]


def _reduced_while(equation: core.JaxprEqn, used: list[bool]) -> core.JaxprEqn:
    """A loop that carries what the used results and its condition depend on, and nothing else."""
    condition = equation.params["cond_jaxpr"]
    body = equation.params["body_jaxpr"]
    condition_constants = equation.params["cond_nconsts"]
    body_constants = equation.params["body_nconsts"]
    _, in_condition = partial_eval.dce_jaxpr(condition.jaxpr, [True])
    carried = [a or b for a, b in zip(used, in_condition[condition_constants:], strict=True)]
    while True:  # until no carried value depends on one that is not carried
        smaller, read = partial_eval.dce_jaxpr(
            body.jaxpr, carried, [*[True] * body_constants, *carried]
        )
        more = [a or b for a, b in zip(carried, read[body_constants:], strict=True)]
        if more == carried:
            break
        carried = more
    new_condition, _ = partial_eval.dce_jaxpr(
        condition.jaxpr, [True], [*[True] * condition_constants, *carried]
    )
    constants = equation.invars[: condition_constants + body_constants]
    carry = equation.invars[condition_constants + body_constants :]
    return equation.replace(
        invars=[*constants, *_of(carry, carried)],
        outvars=_of(equation.outvars, carried),
        params={
            **equation.params,
            "cond_jaxpr": core.ClosedJaxpr(new_condition, condition.consts),
            "body_jaxpr": core.ClosedJaxpr(smaller, body.consts),
        },
    )
