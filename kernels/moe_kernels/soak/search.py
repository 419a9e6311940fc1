"""Random cases until the time is up, and the reduction of those that fail."""

import dataclasses
import time

import numpy as np

from moe_kernels.soak.case import Case, draw_case
from moe_kernels.soak.check import attempt

REPORT_SECONDS = 15.0
"""Time between two lines of progress."""


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
    said = time.monotonic()
    end = said + 60 * minutes
    while time.monotonic() < end:
        case = draw_case(random, largest)
        fault = attempt(case)
        cases += 1
        if fault:
            least = shrink(case) if shrinking else case
            line = f'python -m moe_kernels.soak --case "{least}"'
            failures.append({"fault": fault, "case": str(case), "reproduction": line})
            print(f"FAILED {fault}\n  {case}\n  {line}", flush=True)
        if time.monotonic() - said > REPORT_SECONDS:
            said = time.monotonic()
            left = max(0, round(end - said))
            print(f"{cases} cases, {len(failures)} failures, {left} s left", flush=True)
    return cases, failures
