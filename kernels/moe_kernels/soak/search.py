"""Random cases until the time is up, and the reduction of those that fail."""

import dataclasses
import time

import numpy as np

from moe_kernels.soak.case import Case, draw_case
from moe_kernels.soak.check import attempt


def shrink(case: Case) -> Case:
    """The smallest failing case that halving or decrementing one size after the other reaches."""
    smaller = True
    while smaller:
        smaller = False
        for name in ("tokens", "width", "hidden", "per_token"):
            value = getattr(case, name)
            for lower in {value // 2, value - 1}:
                candidate = dataclasses.replace(case, **{name: lower})
                if lower >= 1 and attempt(candidate):
                    case = candidate
                    smaller = True
                    break
    return case


def soak(
    minutes: float, seed: int, largest: int, shrinking: bool = True
) -> tuple[int, list[dict[str, str]]]:
    """(cases run, failures). Each failure is printed as it happens.

    Without `shrinking` a failure is given as it is: its reduction may outlast the minutes.
    """
    random = np.random.default_rng(seed)
    failures: list[dict[str, str]] = []
    cases = 0
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        case = draw_case(random, largest)
        fault = attempt(case)
        cases += 1
        if fault:
            least = shrink(case) if shrinking else case
            line = f'python -m moe_kernels.soak --case "{least}"'
            failures.append({"fault": fault, "case": str(case), "reproduction": line})
            print(f"FAILED {fault}\n  {case}\n  {line}", flush=True)
        elif cases % 20 == 0:
            print(f"{cases} cases, {len(failures)} failures", flush=True)
    return cases, failures
