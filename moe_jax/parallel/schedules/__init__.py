"""Eight pipeline schedules as data. `build` makes one by its name. docs/pipeline.md explains them.

A schedule is a short pure function from (P, M, v) to the order of every device. To add one, write
the function, give it a name in SCHEDULES, and add what is published of it to published.py.
"""

from collections.abc import Callable

from moe_jax.base.errors import UserError, near_name, quote, require
from moe_jax.parallel.schedules.classic import gpipe, interleaved, one_forward_one_backward
from moe_jax.parallel.schedules.dualpipe import dualpipe, dualpipev
from moe_jax.parallel.schedules.operations import Kind, Operation, PipelineSchedule, Place
from moe_jax.parallel.schedules.zero_bubble import zb_h1, zb_h2, zb_v

__all__ = ["SCHEDULES", "Kind", "Operation", "PipelineSchedule", "Place", "build"]

SCHEDULES: dict[str, Callable[[int, int, int], PipelineSchedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-v": zb_v,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
"""Name -> function of (stages, microbatches, chunks)."""


def build(name: str, stages: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """The schedule `name` of a model in P `stages` with M `microbatches` in one update.

    `chunks` is v of `interleaved`: the pieces of a stage. zb-v, dualpipe and dualpipev have two
    chunks a device whatever it says. The P stages lie on P devices, those of dualpipev on P/2.
    UserError: an unknown name, or numbers that the schedule cannot use.
    """
    if name not in SCHEDULES:
        raise UserError(
            f"no schedule {quote(name)}{near_name(name, SCHEDULES)}: "
            f"choose one of {', '.join(SCHEDULES)}"
        )
    for word, value in (("stages", stages), ("microbatches", microbatches), ("chunks", chunks)):
        require(value >= 1, f"{word} is {value}: it must be at least 1")
    return SCHEDULES[name](stages, microbatches, chunks)
