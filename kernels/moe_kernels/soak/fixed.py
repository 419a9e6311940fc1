"""Fixed cases, chosen for what they hold: the first that a new machine should run."""

import dataclasses

from moe_kernels.soak.case import Case

SIZES = {  # T, D, F, E, K
    "odd": (727, 577, 859, 5, 2),
    "one token": (1, 512, 256, 16, 4),
    "K = E": (300, 256, 128, 4, 4),
    "E = 1": (300, 256, 128, 1, 1),
    "whole blocks": (2048, 512, 256, 16, 4),
    "E is no power of two": (1000, 512, 352, 60, 4),
    "many experts": (512, 256, 128, 256, 8),
}


def fixed_case(
    name: str, dtype: str = "bfloat16", skew: str = "zipf", unassigned: bool = False
) -> Case:
    """The case of SIZES under this name."""
    return Case(*SIZES[name], dtype=dtype, skew=skew, unassigned=unassigned, seed=1)


def at_most(case: Case, largest: int) -> Case:
    """The case with no size above `largest`, for the interpreter."""
    sizes = ("tokens", "width", "hidden", "experts", "per_token")
    return dataclasses.replace(case, **{n: min(getattr(case, n), largest) for n in sizes})
