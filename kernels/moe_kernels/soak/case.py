"""A random case: its sizes, its text, and its arrays."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_kernels.launch import next_power_of_two

DTYPES = ("float32", "bfloat16", "float16")
SKEWS = ("uniform", "zipf", "one", "few")


@dataclass(frozen=True)
class Case:
    """Everything that a run depends on."""

    tokens: int
    width: int
    hidden: int
    experts: int
    per_token: int
    dtype: str
    skew: str
    """How popular the experts are: all alike, by Zipf's law, one of them, or a quarter of them."""
    unassigned: bool
    """Whether one assignment in five has no expert."""
    seed: int

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(self).items())


class Inputs(NamedTuple):
    """Arrays of one case: x [T, D], weights [T, K], gate_up [E, D, 2F], down [E, F, D], d_out as x,
    experts [T, K], E where an assignment has none."""

    x: Any
    weights: Any
    gate_up: Any
    down: Any
    d_out: Any
    experts: np.ndarray


def parse_case(text: str) -> Case:
    """The inverse of str(case). Raises ValueError that names what is wrong."""
    values = dict(part.split("=", 1) for part in text.split() if "=" in part)
    names = {field.name for field in dataclasses.fields(Case)}
    if values.keys() != names:
        raise ValueError(f"--case needs exactly {sorted(names)}, but has {sorted(values)}")
    if values["dtype"] not in DTYPES or values["skew"] not in SKEWS:
        raise ValueError(f"--case: dtype is one of {DTYPES} and skew one of {SKEWS}")
    others = {
        "dtype": values["dtype"],
        "skew": values["skew"],
        "unassigned": values["unassigned"] == "True",
    }
    return Case(**{k: int(v) for k, v in values.items() if k not in others}, **others)


def draw_case(random: np.random.Generator, largest: int) -> Case:
    """Sizes are log-uniform up to `largest`, and a third of them powers of two.

    Whole tiles and ragged ones then both come often.
    """

    def size(limit: int) -> int:
        value = int(np.exp(random.uniform(0, np.log(limit + 1))))
        return next_power_of_two(value) if random.random() < 1 / 3 else max(1, value)

    experts = size(16 if largest < 1000 else 256)
    return Case(
        tokens=size(largest),
        width=size(largest),
        hidden=size(largest // 2),
        experts=experts,
        per_token=int(random.integers(1, min(experts, 8) + 1)),
        dtype=str(random.choice(DTYPES)),
        skew=str(random.choice(SKEWS)),
        unassigned=bool(random.random() < 0.25),
        seed=int(random.integers(2**31)),
    )


def make_inputs(case: Case) -> Inputs:
    """Numbers near one. A token's experts differ from each other."""
    random = np.random.default_rng(case.seed)
    t, d, f, e = dataclasses.astuple(case)[:4]

    def normal(*shape: int, divisor: float = 1.0) -> Any:
        return jnp.asarray(random.standard_normal(shape) / divisor, case.dtype)

    popularity = {  # log-probabilities up to a constant
        "uniform": np.zeros(e),
        "zipf": -2 * np.log(np.arange(1, e + 1)),
        "one": np.where(np.arange(e) == e // 2, 50.0, 0.0),
        "few": np.where(np.arange(e) < max(1, e // 4), 5.0, 0.0),
    }[case.skew]
    # The K largest of log-probability + Gumbel noise are a sample without replacement.
    experts = np.argsort(-(popularity + random.gumbel(size=(t, e))), axis=1)[:, : case.per_token]
    if case.unassigned:
        experts = np.where(random.random(experts.shape) < 0.2, e, experts)
    return Inputs(
        x=normal(t, d),
        weights=jnp.asarray(random.random(experts.shape), jnp.float32),
        gate_up=normal(e, d, 2 * f, divisor=d**0.5),
        down=normal(e, f, d, divisor=f**0.5),
        d_out=normal(t, d),
        experts=experts.astype(np.int32),
    )
