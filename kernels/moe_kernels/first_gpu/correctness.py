"""Fixed cases, and random ones for the rest of the time, against float64."""

import time

from moe_kernels.first_gpu.context import Context, Outcome
from moe_kernels.launch import fp8_support
from moe_kernels.soak.case import SKEWS, Case
from moe_kernels.soak.check import attempt, fp8_fault
from moe_kernels.soak.fixed import SIZES, at_most, fixed_case
from moe_kernels.soak.search import soak

DTYPES = ("bfloat16", "float32", "float16")
"""What models run first."""
DRY_LARGEST = 9
"""Largest size of a case in the interpreter."""
LARGEST = 3000


def correctness(context: Context) -> Outcome:
    """Every fixed case while time remains, without shrinking: faults are read afterwards."""
    fp8 = [("FP8 whole blocks", fixed_case("whole blocks"))] if has_fp8() else []
    cases = [*plain_cases()[: len(SIZES)], *fp8, *plain_cases()[len(SIZES) :]]
    if context.settings.dry_run:
        cases = [(name, at_most(case, DRY_LARGEST)) for name, case in cases[:2]]
    faults: dict[str, str] = {}
    done = 0
    for name, case in cases:
        if context.left() < 0:
            break
        start = time.monotonic()
        fault = fp8_fault(case) if name.startswith("FP8") else attempt(case)
        done += 1
        if fault:
            faults[name] = f"{fault} ({case})"
        print(f"{name}: {fault or 'right'}, {time.monotonic() - start:.1f} s", flush=True)
    context.report({"name": "fixed_cases", "value": done, "unit": "cases"})
    context.report({"name": "fixed_case_faults", "value": len(faults), "unit": "cases"})
    reason = f"{len(faults)} of {done} cases have a fault" if faults else ""
    if not reason and done < len(cases):
        reason = f"{len(cases) - done} of {len(cases)} cases left out"
    return Outcome(done > 0 and not faults, reason, {"faults": faults})


def plain_cases() -> list[tuple[str, Case]]:
    """bfloat16 first, which is what models run, then every skew, then the other dtypes."""
    sizes = {dtype: [(f"{n} {dtype}", fixed_case(n, dtype)) for n in SIZES] for dtype in DTYPES}
    skews = [
        (f"whole blocks {skew}", fixed_case("whole blocks", skew=skew, unassigned=True))
        for skew in SKEWS
    ]
    first, *others = DTYPES
    return [*sizes[first], *skews, *(case for dtype in others for case in sizes[dtype])]


def has_fp8() -> bool:
    """Whether the FP8 kernels run here, compiled."""
    return fp8_support().name == "gpu"


def random_cases(context: Context) -> Outcome:
    """The soak until the time is up, without shrinking."""
    dry = context.settings.dry_run
    minutes = min(context.left(), 1.0 if dry else float("inf")) / 60
    # The seed is the clock's: each run on a GPU is a chance to try other cases.
    seed = int(time.time())
    cases, failures = soak(minutes, seed, DRY_LARGEST if dry else LARGEST, shrinking=False)
    context.report({"name": "random_cases", "value": cases, "unit": "cases"})
    context.report({"name": "random_case_faults", "value": len(failures), "unit": "cases"})
    reason = f"{len(failures)} of {cases} cases have a fault" if failures else ""
    return Outcome(cases > 0 and not failures, reason, {"seed": seed, "faults": failures[:20]})
