"""Random cases through the kernels for as long as you like, against float64 in NumPy.

    python kernels/soak.py --minutes 10 [--json FILE] [--seed N] [--interpret]
    python kernels/soak.py --case "tokens=3 width=8 ... seed=5"

Each case draws sizes, skew, dtype and whether some assignments have no expert, makes fresh inputs,
runs gate, schedule and experts, forward and backward, twice, and checks that both runs agree bit
for bit and with the oracle, output and every gradient by name. Nothing may be left unwritten:
outputs start as NaN in the interpreter, and on a GPU the free memory is filled with NaN before
every case. A failure is shrunk to the smallest case that still fails, printed as a command. Without
a GPU the kernels run in Triton's interpreter. Exits with 1 after failures.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float32", "bfloat16", "float16")
SKEWS = ("uniform", "zipf", "one", "few")
TOLERANCE = {"float32": (1e-5, 1e-6), "bfloat16": (2e-2, 4e-3), "float16": (2e-2, 4e-3)}
"""Largest and root mean square of the error, in units of `magnitude`."""
ENOUGH = 1000
"""Numbers of an array from which on both are asked for. Of a few, all can come from sums that
cancel: the largest may then be four times as large, and the root mean square is not judged."""


@dataclass(frozen=True)
class Case:
    """All that a run depends on."""

    tokens: int
    width: int
    hidden: int
    experts: int
    per_token: int
    dtype: str
    skew: str
    nobody: bool
    """Whether one assignment in five has no expert."""
    seed: int

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(self).items())


class Inputs(NamedTuple):
    """Of one case."""

    x: Any
    weights: Any
    gate_up: Any
    down: Any
    d_out: Any
    experts: np.ndarray


def parse_case(text: str) -> Case:
    """The inverse of str(case). Raises ValueError naming what is wrong."""
    found = dict(part.split("=", 1) for part in text.split() if "=" in part)
    names = {field.name for field in dataclasses.fields(Case)}
    if found.keys() != names:
        raise ValueError(f"--case needs exactly {sorted(names)}, found {sorted(found)}")
    if found["dtype"] not in DTYPES or found["skew"] not in SKEWS:
        raise ValueError(f"--case: dtype is one of {DTYPES} and skew one of {SKEWS}")
    texts = {"dtype": found["dtype"], "skew": found["skew"], "nobody": found["nobody"] == "True"}
    return Case(**{k: int(v) for k, v in found.items() if k not in texts}, **texts)


def draw_case(random: np.random.Generator, largest: int) -> Case:
    """Sizes are log-uniform up to `largest`, powers of two in a third of the cases, and whole
    multiples of nothing in the others."""

    def size(limit: int) -> int:
        value = int(np.exp(random.uniform(0, np.log(limit + 1))))
        return 1 << (value - 1).bit_length() if random.random() < 1 / 3 else max(1, value)

    experts = size(16 if largest < 1000 else 256)
    return Case(
        tokens=size(largest),
        width=size(largest),
        hidden=size(largest // 2),
        experts=experts,
        per_token=int(random.integers(1, min(experts, 8) + 1)),
        dtype=str(random.choice(DTYPES)),
        skew=str(random.choice(SKEWS)),
        nobody=bool(random.random() < 0.25),
        seed=int(random.integers(2**31)),
    )


def make_inputs(case: Case) -> Inputs:
    """Numbers near one; a token's experts differ from each other."""
    random = np.random.default_rng(case.seed)
    t, d, f, e = case.tokens, case.width, case.hidden, case.experts

    def normal(*shape: int, divisor: float = 1.0) -> Any:
        return jnp.asarray(random.standard_normal(shape) / divisor, case.dtype)

    popularity = {
        "uniform": np.zeros(e),
        "zipf": -2 * np.log(np.arange(1, e + 1)),
        "one": np.where(np.arange(e) == e // 2, 50.0, 0.0),
        "few": np.where(np.arange(e) < max(1, e // 4), 5.0, 0.0),
    }[case.skew]
    order = np.argsort(-(popularity + random.gumbel(size=(t, e))), axis=1)[:, : case.per_token]
    if case.nobody:
        order = np.where(random.random(order.shape) < 0.2, e, order)
    return Inputs(
        normal(t, d),
        jnp.asarray(random.random(order.shape), jnp.float32),
        normal(e, d, 2 * f, divisor=d**0.5),
        normal(e, f, d, divisor=f**0.5),
        normal(t, d),
        order.astype(np.int32),
    )


def oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    """Output and gradients by the formulas, expert after expert, in float64."""
    x, weights, gate_up, down, d_out = [np.asarray(a, np.float64) for a in inputs[:5]]
    found = {name: np.zeros(getattr(inputs, name).shape) for name in inputs._fields[:4]}
    found["out"] = np.zeros_like(x)
    for e in range(len(down)):
        token, k = np.nonzero(inputs.experts == e)
        w = weights[token, k][:, None]
        gate, up = np.split(x[token] @ gate_up[e], 2, axis=1)
        slope = 1 / (1 + np.exp(-gate))
        hidden = gate * slope * up
        np.add.at(found["out"], token, w * (hidden @ down[e]))
        d_hidden = d_out[token] @ down[e].T
        found["weights"][token, k] = (d_hidden * hidden).sum(1)
        d_gate = w * d_hidden * up * (slope + gate * slope * (1 - slope))
        dz = np.concatenate([d_gate, w * d_hidden * gate * slope], axis=1)
        np.add.at(found["x"], token, dz @ gate_up[e].T)
        found["gate_up"][e] = x[token].T @ dz
        found["down"][e] = (w * hidden).T @ d_out[token]
    return found


def run_kernels(inputs: Inputs) -> dict[str, np.ndarray]:
    """The same through the kernels; `decoded` is the output without gradients."""
    from moe_kernels.experts import mixture

    from moe_jax.moe.plan import make_plan

    @jax.jit
    def both(arrays: tuple[Any, Any, Any, Any], d_out: Any, experts: Any) -> Any:
        plan = make_plan(experts, len(arrays[-1]), kernels=True)
        run = partial(mixture, plan=plan)
        out, pull = jax.vjp(run, *arrays)
        return {"decoded": run(*arrays), "out": out, "plan": plan}, pull(d_out)

    found, gradients = both(inputs[:4], inputs.d_out, jnp.asarray(inputs.experts))
    found |= dict(zip(inputs._fields[:4], gradients, strict=True))
    plan = found.pop("plan")
    return jax.tree.map(np.asarray, found | {f"plan {k}": v for k, v in arrays_of(plan).items()})


def arrays_of(plan: Any) -> dict[str, Any]:
    """Those of a plan, by name."""
    return {k: v for k, v in vars(plan).items() if not isinstance(v, int)}


def expected_of(inputs: Inputs) -> dict[str, np.ndarray]:
    """What run_kernels should give: the oracle's numbers, and the plan as plain jnp makes it."""
    from moe_jax.moe.plan import make_plan

    plan = arrays_of(make_plan(jnp.asarray(inputs.experts), len(inputs.down)))
    expected = oracle(inputs)
    named = {f"plan {k}": np.asarray(v) for k, v in plan.items()}
    return expected | {"decoded": expected["out"]} | named


def gate_faults(case: Case) -> Iterator[str]:
    """What is wrong with the gate's choices, which must be the reference's."""
    from moe_kernels.gate import Choice, gate
    from moe_kernels.gate.reference import gate as reference

    random = np.random.default_rng(case.seed)
    logits = jnp.asarray(random.standard_normal((case.tokens, case.experts)), jnp.float32)
    logits = jnp.round(4 * logits) / 4 if case.nobody else logits  # with ties
    choice = Choice(case.per_token, "sigmoid" if case.seed % 2 else "softmax")
    found, right = gate(logits, None, choice), reference(logits, None, choice)
    scores = np.take_along_axis(np.asarray(right[2]), np.asarray(found.experts), axis=1)
    best = np.take_along_axis(np.asarray(right[2]), np.asarray(right[0]), axis=1)
    if not np.allclose(scores, best, rtol=1e-6, atol=0):  # which of two equal ones may differ
        yield "gate: not the largest scores"
    if not np.allclose(found.weights, right[1], rtol=1e-5, atol=1e-7):
        yield "gate: weights differ"


def faults(case: Case) -> Iterator[str]:
    """What is wrong with the kernels' results; the first run's outputs are those that are read."""
    inputs = make_inputs(case)
    poison_memory()
    yield from gate_faults(case)
    found, again = run_kernels(inputs), run_kernels(inputs)
    expected = expected_of(inputs)
    most, rms = TOLERANCE[case.dtype]
    for name, value in found.items():
        if value.tobytes() != again[name].tobytes():
            yield f"{name} differs from run to run"
        right = expected[name]
        if name.startswith("plan "):
            if not np.array_equal(value, right):
                yield f"{name} is not the plan's"
            continue
        error = np.abs(value.astype(np.float64) - right) / magnitude(right)
        mean = np.sqrt((error**2).mean())
        enough = error.size >= ENOUGH
        good = error.max() <= most and mean <= rms if enough else error.max() <= 4 * most
        if not good:  # NaN is a fault
            yield f"{name}: largest error {error.max():.2g}, rms {mean:.2g}"


def magnitude(right: np.ndarray) -> np.ndarray:
    """The largest of a number itself and of the root mean squares of the whole array and of the
    lines through the number: a row of large inputs has large errors wherever its sums cancel."""
    squares = right**2
    scale = np.maximum(squares, squares.mean())
    for axis in range(right.ndim):
        scale = np.maximum(scale, squares.mean(axis, keepdims=True))
    return np.sqrt(np.where(scale > 0, scale, 1.0))


def poison_memory() -> None:
    """On a GPU: fills what the allocator will hand out next with NaN."""
    if jax.default_backend() == "gpu":
        held = [jnp.full((1 << size,), jnp.nan).block_until_ready() for size in range(8, 27)]
        del held


def attempt(case: Case) -> str | None:
    """The fault of a case, None where there is none. An exception is a fault as well."""
    try:
        return next(faults(case), None)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def shrink(case: Case) -> Case:
    """The smallest case found, by halving one size after the other, that still fails."""
    smaller = True
    while smaller:
        smaller = False
        for name, least in (("tokens", 1), ("width", 1), ("hidden", 1), ("per_token", 1)):
            value = getattr(case, name)
            for lower in {value // 2, value - 1}:
                candidate = dataclasses.replace(case, **{name: lower})
                if lower >= least and attempt(candidate):
                    case, smaller = candidate, True
                    break
    return case


def soak(minutes: float, seed: int, largest: int) -> tuple[int, list[dict[str, str]]]:
    """(cases run, failures), one line for each as it happens."""
    random, failures, cases = np.random.default_rng(seed), [], 0
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        case = draw_case(random, largest)
        fault = attempt(case)
        cases += 1
        if fault:
            small = shrink(case)
            line = f'python kernels/soak.py --case "{small}"'
            failures.append({"fault": fault, "case": str(case), "reproduction": line})
            print(f"FAILED {fault}\n  {case}\n  {line}", flush=True)
        elif cases % 20 == 0:
            print(f"{cases} cases, {len(failures)} failures", flush=True)
    return cases, failures


def main(argv: Sequence[str]) -> int:
    """Runs one case, or cases until the time is up."""
    parser = argparse.ArgumentParser(description="Random cases through the kernels.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for cases and failures")
    parser.add_argument("--case", help="run this case alone")
    parser.add_argument("--interpret", action="store_true", help="in NumPy, also on a GPU")
    options = parser.parse_args(argv)
    if options.interpret or jax.default_backend() != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    where = "Triton's interpreter" if interpreted else jax.devices()[0].device_kind
    if options.case:
        try:
            fault = attempt(parse_case(options.case))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"{where}: {fault or 'no fault'}")
        return 1 if fault else 0
    if options.minutes <= 0:
        print(f"--minutes {options.minutes} must be above 0", file=sys.stderr)
        return 2
    print(f"{options.minutes} minutes in {where}, seed {options.seed}", flush=True)
    cases, failures = soak(options.minutes, options.seed, 160 if interpreted else 3000)
    print(f"{cases} cases, {len(failures)} failures")
    if options.json:
        content = {"cases": cases, "failures": len(failures), "found": failures, "where": where}
        unfinished = options.json.with_suffix(".partial")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(options.json)
    return 1 if failures or not cases else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
