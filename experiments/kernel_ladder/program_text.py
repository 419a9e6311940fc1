"""FLOPs and launches, counted in the text of a program that XLA has compiled and scheduled."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

NO_KERNEL = frozenset(
    ["parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "after-all"]
)
"""Instructions of a scheduled program that launch nothing."""

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(?P<name>[^\s]+) = (?P<type>.*?) (?P<op>[a-z][\w-]*)\(")


@dataclass(frozen=True)
class Counted:
    """One compiled program."""

    flops: float
    """Of all its matrix products, but for those in loops."""
    kernels: int
    """Launches, but for those in loops."""
    turn_flops: tuple[float, ...]
    """FLOPs of one turn of each loop, in the order of the program."""
    turn_kernels: tuple[int, ...]
    """Launches of one turn of each loop."""
    temporary_bytes: int
    """Memory beside inputs and outputs."""


def count_text(text: str, temporary_bytes: int) -> Counted:
    """Counts in a scheduled program's text."""
    computations = _computations(text)
    entry = next(name for name in computations if name.startswith("ENTRY "))
    bodies = re.findall(r"= .* while\(.*body=%([^\s,]+)", "\n".join(computations[entry]))
    return Counted(
        flops=_flops(computations, entry),
        kernels=_kernels(computations[entry]),
        turn_flops=tuple(_flops(computations, body) for body in bodies),
        turn_kernels=tuple(_kernels(computations[body]) for body in bodies),
        temporary_bytes=temporary_bytes,
    )


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name. The entry's name begins with `ENTRY `."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%([^\s]+) \(.*\{$", line):
            lines = found.setdefault((start[1] or "") + start[2], [])
        elif line.startswith(" "):
            lines.append(line)
    return found


def _kernels(lines: list[str]) -> int:
    found = [match["op"] for line in lines if (match := INSTRUCTION.match(line))]
    return sum(op not in NO_KERNEL for op in found)


def _flops(computations: Mapping[str, list[str]], name: str) -> float:
    """2 x numbers of the result x depth of the contraction, of each product and of each fusion's.

    Raises ValueError for a product in a library's call, whose depth the text does not show.
    """
    total = 0.0
    types: dict[str, str] = {}
    for line in computations[name]:
        match = INSTRUCTION.match(line)
        if not match:
            continue
        types[match["name"]] = match["type"]
        if match["op"] == "dot":
            left = re.search(r" dot\(%([^\s,)]+)", line)
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
            assert left
            assert axes
            sizes = _sizes(types[left[1]])
            depth = np.prod([sizes[int(axis)] for axis in axes[1].split(",") if axis])
            total += 2.0 * float(depth) * float(np.prod(_sizes(match["type"])))
        elif match["op"] == "fusion":
            called = re.search(r"calls=%([^\s,]+)", line)
            assert called
            total += _flops(computations, called[1])
        elif match["op"] == "custom-call" and re.search(r'target="__cu(blas|dnn)', line):
            raise ValueError(f"a product in a library's call is not counted: {line.strip()[:80]}")
    return total


def _sizes(text: str) -> list[int]:
    found = re.match(r"\w+\[([\d,]*)\]", text)
    assert found, text
    return [int(size) for size in found[1].split(",") if size]
