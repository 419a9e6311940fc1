"""The axes of a sweep: one searched field each, written FIELD=SPACE on the command line."""

import math
import re
from dataclasses import dataclass
from typing import Any, get_args

from moe_jax import cli
from moe_jax.base.errors import UserError
from moe_jax.config import TrainConfig, require


@dataclass(frozen=True)
class Axis:
    """One searched field: either `choices`, or a range from `low` to `high`."""

    field: str
    """Dotted name, as `optim.learning_rate`."""
    space: str
    """The text after the equals sign."""
    choices: tuple[str, ...] = ()
    low: float = 0
    """An int makes a range of ints, a float a range of floats."""
    high: float = 0
    log: bool = False
    """Whether the range is sampled uniformly in the logarithm."""

    def distribution(self) -> Any:
        """The axis as Optuna has it."""
        # Optuna is an optional extra and slow to import: --help and mistakes do without it.
        from optuna import distributions

        if self.choices:
            return distributions.CategoricalDistribution(self.choices)
        if isinstance(self.low, int):
            return distributions.IntDistribution(self.low, int(self.high), log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)


def parse_axis(text: str, config: TrainConfig) -> Axis:
    """Reads `FIELD=SPACE`. UserError: bad syntax, unknown field, or values of the wrong type."""
    name, _, space = text.partition("=")
    name = name.replace("-", "_")
    require(name != "out", f"--search '{text}': the sweep gives every trial its own out folder")
    require(
        name != "" and space != "", f"--search '{text}': write FIELD=A,B,… or FIELD=[int:|log:]A..B"
    )
    cli.to_argv(type(config), {name: "true"})  # raises for an unknown field
    hint = cli.types(type(config))[name]
    # `int | None` has int among its arguments, plain `int` has none.
    numeric = {hint, *get_args(hint)} & {int, float}
    # Only numbers have ranges: a path may hold `..`, and a data source a colon.
    if numeric and (":" in space or ".." in space):
        return _parse_range(name, space, numeric.pop())
    choices = tuple(dict.fromkeys(space.split(",")))
    for choice in choices:
        cli.check(config, cli.to_argv(type(config), {name: choice}))
    return Axis(name, space, choices)


def _parse_range(name: str, space: str, kind: type) -> Axis:
    """The axis of a range, for a field of this type."""
    where = f"--search {name}={space}"
    match = re.fullmatch(r"(?:(int|log):)?([^:]+?)\.\.([^:]+)", space)
    if match is None:
        raise UserError(f"{where}: write a range as A..B, int:A..B or log:A..B")
    prefix, *bounds = match.groups()
    written = "..".join(bounds)
    require(
        prefix is not None or kind is float,
        f"{where}: {name} is an int, so write int:{written} (or log:{written})",
    )
    number = int if prefix == "int" else kind
    try:
        low, high = map(number, bounds)
    except ValueError:
        raise UserError(f"{where}: '{written}' is not a pair of {number.__name__}s") from None
    # NaN compares as false, so it is refused here, too.
    require(math.isfinite(low) and low < high < math.inf, f"{where}: {low} is not below {high}")
    require(prefix != "log" or low > 0, f"{where}: a log range starts above 0, not at {low}")
    return Axis(name, space, low=low, high=high, log=prefix == "log")
