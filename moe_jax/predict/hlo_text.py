"""The text of a compiled XLA program as instructions with their operands, in scheduled order."""

import re
from dataclasses import dataclass, field

BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "bf16": 16}
"""Types whose names do not end in their bits. `pred` takes a byte."""
ARRAY = re.compile(r"\b(pred|token|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]")
OPERAND = re.compile(r"%([\w.\-]+)")
SCOPE = re.compile(r'\bop_name="([^"]*)"')
CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    """As it is written, such as `(bf16[8,4]{1,0}, s32[])`."""
    opcode: str
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    """The rest of the line."""
    root: bool

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return shape_bytes(self.shape)

    @property
    def called(self) -> str | None:
        """The computation of a fusion, a call or an asynchronous operation, or a loop's body."""
        match = CALLED.search(self.attributes)
        return match[1] if match else None

    @property
    def scope(self) -> str:
        """The names of jax.named_scope and of JAX's functions around it, with slashes between."""
        match = SCOPE.search(self.attributes)
        return match[1] if match else ""

    def frontend(self, name: str) -> str | None:
        """A frontend attribute."""
        match = re.search(rf'frontend_attributes=\{{[^}}]*\b{name}="([^"]*)"', self.attributes)
        return match[1] if match else None


@dataclass
class Program:
    """The computations of a module by name. A computation is its instructions in order."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    def loop_body(self, scope: str) -> str:
        """The computation that the loop in jax.named_scope(scope) runs. KeyError: there is none."""
        for body in self.computations.values():
            for i in body:
                if i.opcode == "while" and i.called and i.scope.endswith(f"/{scope}/while"):
                    return i.called
        raise KeyError(f"the program has no loop in the scope {scope}")


def dimensions(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, sizes) of every array in a shape."""
    return [(t, tuple(map(int, d.split(","))) if d else ()) for t, d in ARRAY.findall(shape)]


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape."""
    total = 0
    for name, sizes in dimensions(shape):
        digits = re.search(r"\d+", name)
        bits = BITS[name] if name in BITS else int(digits[0]) if digits else 8
        for size in sizes:
            bits *= size
        total += (bits + 7) // 8
    return total


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    program = Program()
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = program.computations.setdefault(header[2], [])
                program.entry = header[2] if header[1] else program.entry
        elif line.startswith("}"):
            current = None
        elif " = " in line:
            current.append(_instruction(line))
    return program


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    shape, rest = _split(right, right.index(" ") if right[0] != "(" else _closing(right, 0) + 1)
    opcode, rest = _split(rest.strip(), rest.strip().index("("))
    end = _closing(rest, 0)
    name = left.removeprefix("ROOT ").removeprefix("%")
    operands = tuple(OPERAND.findall(rest[: end + 1]))
    return Instruction(name, shape, opcode, operands, rest[end + 1 :], left.startswith("ROOT "))


def _split(text: str, at: int) -> tuple[str, str]:
    return text[:at], text[at:]


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text) - 1
