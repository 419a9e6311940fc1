"""One case through the kernels, compared with the oracle."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_kernels import experts_fp8
from moe_kernels.errors import first_line
from moe_kernels.experts import mixture
from moe_kernels.gate import GateConfig, gate
from moe_kernels.gate import reference as gate_reference
from moe_kernels.quantise.reference import calc_diff
from moe_kernels.schedule import block_count, choose_block_rows, schedule
from moe_kernels.soak.case import Case, Inputs, make_inputs
from moe_kernels.soak.oracle import ARRAYS, experts_oracle, schedule_oracle

TOLERANCE = {"float32": (1e-5, 1e-6), "bfloat16": (2e-2, 4e-3), "float16": (2e-2, 4e-3)}
"""Largest and root mean square of the error, in units of `magnitude`, up to DEPTH terms a sum."""
DEPTH = 512
"""Rounding errors of a sum in float32 grow as the square root of its terms. The tolerances hold up
to this depth and grow from there."""
FP8_DIFFERENCE = 5e-3
"""Largest calc_diff of the whole FP8 layer against float64. Normal numbers have 0.0019."""
ENOUGH = 1000
"""Size of an array from which both tolerances are asked for. All numbers of a smaller one can come
from sums that cancel: its largest error may be four times as large, and its root mean square is not
judged."""


def attempt(case: Case) -> str | None:
    """The first fault of a case, None where there is none. An exception is a fault as well."""
    try:
        return next(faults(case), None)
    except Exception as error:  # noqa: BLE001 - a soak records every failure and goes on
        return first_line(error)


def faults(case: Case) -> Iterator[str]:
    """What is wrong with the kernels' results, one line each."""
    inputs = make_inputs(case)
    poison_memory()
    yield from gate_faults(case)
    results = run_kernels(inputs)
    again = run_kernels(inputs)
    expected = expected_results(inputs)
    for name, value in results.items():
        if value.tobytes() != again[name].tobytes():
            yield f"{name} differs from run to run"
        if name.startswith("plan "):
            if not np.array_equal(value, expected[name]):
                yield f"{name} is not the plan's"
        else:
            yield from error_faults(name, value, expected[name], case)


def fp8_fault(case: Case) -> str | None:
    """What is wrong with the FP8 layer, whose four roundings may cost FP8_DIFFERENCE."""
    inputs = make_inputs(case)
    num_experts = len(inputs.down)
    plan = schedule(
        jnp.asarray(inputs.experts),
        num_experts,
        choose_block_rows(inputs.experts.size, num_experts),
    )
    try:
        out = experts_fp8.mixture(*inputs[:4], plan)
        difference = calc_diff(out, jnp.asarray(experts_oracle(inputs)["out"]))
    except Exception as error:  # noqa: BLE001 - as in attempt
        return first_line(error)
    return None if difference < FP8_DIFFERENCE else f"FP8: calc_diff {difference:.2g}"


def run_kernels(inputs: Inputs) -> dict[str, np.ndarray]:
    """Results of schedule and experts by name. `decoded` is the output without gradients."""
    num_experts = len(inputs.down)

    @jax.jit
    def run(arrays: tuple[Any, ...], d_out: Any, experts: Any) -> Any:
        plan = schedule(experts, num_experts, choose_block_rows(experts.size, num_experts))
        layer = partial(mixture, plan=plan)
        out, pull = jax.vjp(layer, *arrays)
        gradients = dict(zip(ARRAYS, pull(d_out), strict=True))
        return {"decoded": layer(*arrays), "out": out} | gradients, plan

    results, plan = run(inputs[:4], inputs.d_out, jnp.asarray(inputs.experts))
    arrays = {k: v for k, v in vars(plan).items() if not isinstance(v, int)}
    return jax.tree.map(np.asarray, results | {f"plan {k}": v for k, v in arrays.items()})


def expected_results(inputs: Inputs) -> dict[str, np.ndarray]:
    """The oracle's results under the names of run_kernels."""
    assignments = inputs.experts.size
    num_experts = len(inputs.down)
    block_rows = choose_block_rows(assignments, num_experts)
    blocks = block_count(assignments, num_experts, block_rows)
    plan = schedule_oracle(inputs.experts, num_experts, block_rows, blocks)
    expected = experts_oracle(inputs)
    named = {f"plan {k}": v for k, v in plan.items()}
    return expected | {"decoded": expected["out"]} | named


def gate_faults(case: Case) -> Iterator[str]:
    """What is wrong with the gate's selection and weights, which must be the reference's."""
    random = np.random.default_rng(case.seed)
    logits = jnp.asarray(random.standard_normal((case.tokens, case.experts)), jnp.float32)
    logits = jnp.round(4 * logits) / 4 if case.unassigned else logits  # with ties
    config = GateConfig(case.per_token, "sigmoid" if case.seed % 2 else "softmax")
    output = gate(logits, None, config)
    experts, weights, scores = gate_reference.gate(logits, None, config)
    # Scores are compared and not experts: the two exponentials differ in the last place, so either
    # of two nearly equal experts is right.
    chosen = np.take_along_axis(np.asarray(scores), np.asarray(output.experts), axis=1)
    best = np.take_along_axis(np.asarray(scores), np.asarray(experts), axis=1)
    if not np.allclose(chosen, best, rtol=1e-6, atol=0):
        yield "gate: not the largest scores"
    if not np.allclose(output.weights, weights, rtol=1e-5, atol=1e-7):
        yield "gate: weights differ"


def error_faults(name: str, value: np.ndarray, right: np.ndarray, case: Case) -> Iterator[str]:
    """One line where the errors of an array exceed the tolerances of the case."""
    largest, rms = tolerance(case)
    error = np.abs(value.astype(np.float64) - right) / magnitude(right)
    mean = np.sqrt((error**2).mean())
    if error.size >= ENOUGH:
        good = error.max() <= largest and mean <= rms
    else:
        good = error.max() <= 4 * largest
    if not good:  # and not "if bad": a comparison with NaN is false
        yield f"{name}: largest error {error.max():.2g}, rms {mean:.2g}"


def tolerance(case: Case) -> tuple[float, float]:
    """TOLERANCE at the depth of the case's longest sum.

    In 16 bits the results are rounded to 16 bits, which hides the sums' errors.
    """
    largest, rms = TOLERANCE[case.dtype]
    # Sums run over D, F and, for the matrices' gradients, an expert's rows.
    depth = max(case.width, case.hidden, case.tokens)
    growth = max(1.0, (depth / DEPTH) ** 0.5) if case.dtype == "float32" else 1.0
    return growth * largest, growth * rms


def magnitude(right: np.ndarray) -> np.ndarray:
    """The scale of an error: the largest of the number itself, the array's root mean square, and
    those of the lines through the number. A row of large inputs has large errors wherever its sums
    cancel."""
    squares = right**2
    scale = np.maximum(squares, squares.mean())
    for axis in range(right.ndim):
        scale = np.maximum(scale, squares.mean(axis, keepdims=True))
    return np.sqrt(np.where(scale > 0, scale, 1.0))


def poison_memory() -> None:
    """Fills the memory that a GPU's allocator hands out next with NaN.

    A number that a kernel forgets to write is NaN then. The interpreter does so by itself.
    """
    if jax.default_backend() == "gpu":
        # All sizes at once, so that each takes another part of memory, then freed together.
        arrays = [jnp.full((1 << size,), jnp.nan).block_until_ready() for size in range(8, 27)]
        del arrays
