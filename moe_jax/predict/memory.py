"""Bytes on each device by kind, from XLA's own buffers at the moment when it needs the most.

    parameters, optimizer    arguments of the program, and exact
    gradients                a buffer with a parameter's own sizes, summed by the backward pass
    communication            what a collective reads or writes into
    casts                    parameters in the compute dtype that are kept
    update                   new parameters and moments that lie beside the old ones
    activations              what outlives the turn of the innermost loop that is running
    temporaries              what does not
    gaps                     bytes of XLA's heap that nothing has at that moment
    other                    the batch, counters, keys, and metrics

Kinds but the first two are told apart by the instruction that makes a buffer. They add up to XLA's
total, byte by byte.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moe_jax.predict.hlo_text import Instruction, Program, dimensions, parse
from moe_jax.predict.lower import Compiled
from moe_jax.predict.schedule import COLLECTIVES

KINDS = (
    *("parameters", "optimizer", "gradients", "update", "casts", "activations"),
    *("communication", "temporaries", "gaps", "other"),
)
CONTEXT = 500 << 20
"""Bytes of the CUDA context and its kernels on a data-centre card. It is an assumption."""
NCCL = 1 << 30
"""Bytes of NCCL's buffers on each device, of all communicators. It is an assumption: a channel has
6 MiB, and there are 16 to 32 of them for each communicator."""


Place = tuple[int, int]
"""(first byte, bytes) in XLA's heap for temporaries."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    kinds: Mapping[str, int]
    """Of the program, by KINDS."""
    context: int
    """Of the CUDA context. It is a stated term."""
    nccl: int
    """Of NCCL. It is a stated term."""
    card: int
    """Of the card."""

    @property
    def state(self) -> int:
        """Parameters with their casts, gradients and optimizer."""
        names = ("parameters", "casts", "gradients", "optimizer", "update")
        return sum(self.kinds.get(name, 0) for name in names)

    @property
    def program(self) -> int:
        """All that XLA allocates."""
        return sum(self.kinds.values())

    @property
    def total(self) -> int:
        return self.program + self.context + self.nccl

    @property
    def fits(self) -> bool:
        return self.total <= self.card


def memory_of(compiled: Compiled, card_bytes: int, devices: int) -> Memory:
    """The bytes of a program on a card."""
    kinds = dict.fromkeys(KINDS, 0)
    kinds["parameters"] = compiled.parameters
    kinds["optimizer"] = compiled.optimizer
    own = compiled.parameters + compiled.optimizer
    kinds["other"] = compiled.arguments - own + compiled.outputs
    for kind, size in temporary_kinds(compiled).items():
        kinds[kind] += size
    return Memory(kinds, CONTEXT, NCCL if devices > 1 else 0, card_bytes)


def temporary_kinds(compiled: Compiled) -> dict[str, int]:
    """Bytes of XLA's heap by kind when most of it is used. They add up to compiled.temporaries."""
    shared = fullest(heap_places(compiled.buffers), live_ranges(compiled.live))
    names = [name for place in shared.values() for name in place]
    classes = _Classes(parse(compiled.text), frozenset(compiled.shapes), names)
    kinds: dict[str, int] = {}
    for place, counted in _without_overlap(shared):
        kind = classes.of(shared[place])
        kinds[kind] = kinds.get(kind, 0) + counted
    kinds["gaps"] = compiled.temporaries - sum(kinds.values())
    return kinds


def kept_arrays(compiled: Compiled, layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """(type, sizes) of what the scan over so many layers keeps for the backward pass.

    They are stacked by layer. A parameter is none of them, but a copy of one is.
    """
    shared = fullest(heap_places(compiled.buffers), live_ranges(compiled.live))
    names = [name for place in shared.values() for name in place]
    program = parse(compiled.text)
    makers = {i.name: i for body in program.computations.values() for i in body}
    found = []
    for name in names:
        i = makers.get(_instruction_name(name))
        if i is not None and i.opcode == "while" and _is_forward(i):
            found += [array for array in _array_of(i, name) if array[1][:1] == (layers,)]
    return found


def fullest(
    places: Mapping[str, Place], ranges: Mapping[str, tuple[int, int]]
) -> dict[Place, list[str]]:
    """The values by their places at the moment when they cover the most bytes."""
    known = {name: ranges[name] for name in places if name in ranges}

    def at(moment: int) -> dict[Place, list[str]]:
        found: dict[Place, list[str]] = {}
        for name, (begin, end) in known.items():
            if begin <= moment <= end:
                found.setdefault(places[name], []).append(name)
        return found

    # Only a value that begins makes it more. Small ones are left out to save time.
    large = max((size for _, size in places.values()), default=0) // 1000
    moments = {begin for name, (begin, _) in known.items() if places[name][1] >= large}
    return max(map(at, sorted(moments)), key=_covered, default={})


def _covered(shared: Mapping[Place, list[str]]) -> int:
    return sum(counted for _, counted in _without_overlap(shared))


def _without_overlap(shared: Mapping[Place, list[str]]) -> list[tuple[Place, int]]:
    """Each place with the bytes of it that no place before it has."""
    found = []
    end = 0
    # By their beginning, the largest first.
    for begin, size in sorted(shared, key=lambda place: (place[0], -place[1])):
        found.append(((begin, size), max(0, begin + size - max(begin, end))))
        end = max(end, begin + size)
    return found


VALUE = re.compile(r" value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\)")


def heap_places(text: str) -> dict[str, Place]:
    """The places of values in XLA's heap, from its dump of buffers."""
    places = {}
    heap = False
    base = 0
    size = 0
    for line in text.splitlines():
        if found := re.match(r"allocation \d+: size (\d+), (.*)", line):
            base += size if heap else 0
            heap = "preallocated-temp" in found[2]
            size = int(found[1])
        elif heap and (found := VALUE.match(line)):
            places[found[1].removesuffix("{}")] = (base + int(found[3]), int(found[2]))
    return places


def live_ranges(text: str) -> dict[str, tuple[int, int]]:
    """From when until when each value is needed, from XLA's dump of live ranges."""
    found = re.findall(r"^    (\S+):(\d+)-(\d+)$", text, re.MULTILINE)
    return {name.removesuffix("{}"): (int(begin), int(end)) for name, begin, end in found}


class _Classes:
    """Tells kinds of buffers apart."""

    def __init__(
        self, program: Program, shapes: frozenset[tuple[int, ...]], live: list[str]
    ) -> None:
        # In any order of axes, because XLA transposes.
        self.shapes = {tuple(sorted(shape)) for shape in shapes}
        # Experts in another layout, as the tensor axis wants it, have as many numbers.
        self.experts = {(*shape[:2], math.prod(shape)) for shape in shapes if len(shape) == 4}
        self.instructions: dict[str, Instruction] = {}
        self.homes: dict[str, str] = {}
        for name, body in program.computations.items():
            for i in body:
                self.instructions[i.name] = i
                self.homes[i.name] = name
        depths = _depths(program)
        homes = [self.homes.get(_instruction_name(name), program.entry) for name in live]
        self.innermost = max(homes, key=lambda home: depths.get(home, 0), default=program.entry)
        self.nested = depths.get(self.innermost, 0) > 0

    def of(self, names: list[str]) -> str:
        """The kind of a buffer that these values share."""
        makers = [self.instructions.get(_instruction_name(name)) for name in names]
        known = [i for i in makers if i is not None]
        if any(i.opcode == "conditional" for i in known):
            return "update"
        if any(self._is_gradient(name) for name in names):
            return "gradients"
        if any(_is_collective(i) for i in known):
            return "communication"
        if any(self._outlives(i) for i in known):
            return "casts" if any(self._is_cast(name) for name in names) else "activations"
        return "temporaries"

    def _is_gradient(self, name: str) -> bool:
        i = self.instructions.get(_instruction_name(name))
        if i is None or _is_forward(i):
            return False
        # In a narrower type only if its maker says so: parameters are cast to such types, too.
        types = ("f32", "bf16", "f16") if "transpose(" in i.attributes else ("f32",)
        return any(
            dtype in types and len(sizes) > 1 and tuple(sorted(sizes)) in self.shapes
            for dtype, sizes in _array_of(i, name)
        )

    def _is_cast(self, name: str) -> bool:
        i = self.instructions.get(_instruction_name(name))
        arrays = [] if i is None else _array_of(i, name)
        for dtype, sizes in arrays:
            if dtype not in ("bf16", "f16") or len(sizes) < 2:
                continue
            assert i is not None
            # A kept activation may have the sizes of a matrix. So its maker counts as well.
            converted = i.scope.endswith("convert_element_type")
            if converted and tuple(sorted(sizes)) in self.shapes:
                return True
            if sizes[1] > 1 and (*sizes[:2], math.prod(sizes)) in self.experts:
                return True
        return False

    def _outlives(self, i: Instruction) -> bool:
        if self.nested and self.homes[i.name] != self.innermost:
            return True
        return _is_forward(i)


def _array_of(i: Instruction, name: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, sizes) of the one array of the result that a value's name says."""
    place = re.search(r"\{(\d+)\}$", name)
    return dimensions(i.shape)[int(place[1]) if place else 0 :][:1]


def _is_forward(i: Instruction) -> bool:
    return "jvp(" in i.attributes and "transpose(" not in i.attributes


def _depths(program: Program) -> dict[str, int]:
    """How many loops are around each computation."""
    depths = {program.entry: 0}
    missing = [program.entry]
    while missing:
        name = missing.pop()
        for i in program.computations[name]:
            if i.called and i.opcode in ("while", "call") and i.called not in depths:
                depths[i.called] = depths[name] + (i.opcode == "while")
                missing.append(i.called)
    return depths


def _instruction_name(value: str) -> str:
    return re.sub(r"\{[\d,]*\}$", "", value)


def _is_collective(i: Instruction) -> bool:
    return i.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES
