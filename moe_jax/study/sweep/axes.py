"""The axes of a sweep: fields and their values, written FIELD=SPACE on the command line.

FIELD+FIELD=A+X,B+Y searches fields that depend on each other: one choice sets all of them.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, get_args

from moe_jax import cli
from moe_jax.base.errors import UserError
from moe_jax.config import require


@dataclass(frozen=True)
class Axis:
    """What is searched together: either `choices`, or a range of one field from `low` to `high`."""

    field: str
    """Dotted name, as `optim.learning_rate`, or several joined by +."""
    space: str
    """The text after the equals sign."""
    choices: tuple[str, ...] = ()
    low: float = 0
    """An int makes a range of ints, a float a range of floats."""
    high: float = 0
    log: bool = False
    """Whether the range is sampled uniformly in the logarithm."""

    @property
    def count(self) -> int | None:
        """Number of values. None: the axis is a range of real numbers."""
        if self.choices:
            return len(self.choices)
        return int(self.high) - self.low + 1 if isinstance(self.low, int) else None

    def assignments(self, value: Any) -> dict[str, str]:
        """field -> its value, for a value of the axis."""
        fields = self.field.split("+")
        parts = str(value).split("+") if len(fields) > 1 else [str(value)]
        return dict(zip(fields, parts, strict=True))

    def distribution(self) -> Any:
        """The axis as Optuna has it."""
        # Optuna is an optional extra and slow to import: --help and mistakes do without it.
        from optuna import distributions

        if self.choices:
            return distributions.CategoricalDistribution(self.choices)
        if isinstance(self.low, int):
            return distributions.IntDistribution(self.low, int(self.high), log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)


def parse_axis(text: str, config: Any) -> Axis:
    """Reads `FIELD=SPACE`. UserError: bad syntax, unknown field, or values of the wrong type."""
    name, _, space = text.partition("=")
    name = name.replace("-", "_")
    require(
        "out" not in name.split("+"),
        f"--search '{text}': the sweep gives every trial its own out folder",
    )
    require(
        name != "" and space != "", f"--search '{text}': write FIELD=A,B,… or FIELD=[int:|log:]A..B"
    )
    fields = name.split("+")
    for field in fields:
        cli.to_argv(type(config), {field: "true"})  # raises for an unknown field
    if len(fields) > 1:
        return _parse_joint(name, space, config)
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


def _parse_joint(name: str, space: str, config: Any) -> Axis:
    """The axis of several fields, whose values are checked together."""
    fields = name.split("+")
    where = f"--search {name}={space}"
    require(len(set(fields)) == len(fields), f"{where}: a field is named twice")
    axis = Axis(name, space, tuple(dict.fromkeys(space.split(","))))
    for choice in axis.choices:
        count = len(choice.split("+"))
        require(
            count == len(fields),
            f"{where}: '{choice}' has {count} values for {len(fields)} fields: join them by +",
        )
        cli.check(config, cli.to_argv(type(config), axis.assignments(choice)))
    return axis


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
