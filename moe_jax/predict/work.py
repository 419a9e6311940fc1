"""FLOPs of products, and bytes that are read and written, of an instruction of a program."""

import math
import re
from typing import Literal, NamedTuple

from moe_jax.predict.hlo_text import Instruction, Program, dimensions, shape_bytes

Kind = Literal["product", "kernel", "attention", "attention gradient", "rest"]
"""`kernel` is a Triton kernel of ours with products, `rest` all that only moves numbers."""
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota", "broadcast"),
}
"""They move no bytes, or were made a part of what uses them."""
SLICES = ("slice", "dynamic-slice", "gather")
PASSING = ("bitcast", "reshape", "convert", "copy", "transpose")
"""Inside a fusion: one number in, one number out."""
ATTENTION = "__cudnn$fmha"
"""What the names of cuDNN's attention begin with."""
BACKWARD_PRODUCTS = 2.5
"""Products of attention's backward pass over those of its forward pass: five for two."""


class Work(NamedTuple):
    """What an instruction does."""

    kind: Kind
    flops: int = 0
    """Of its products."""
    bytes: int = 0
    """Read and written, each number once."""
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    """(batch, rows, columns, depth) of a product, as far as they can be read."""


def work_of(program: Program, i: Instruction, by_name: dict[str, Instruction]) -> Work:
    """The work of an instruction that is no collective and no loop."""
    moved = traffic(program, i, by_name)
    if i.opcode == "custom-call" and ATTENTION in i.attributes:
        kind: Kind = "attention gradient" if "SoftmaxBackward" in i.attributes else "attention"
        return Work(kind, _attention_flops(i, by_name, kind), moved)
    flops = product_flops(program, i, by_name)
    if not flops:
        return Work("rest", 0, moved)
    if i.frontend("flops"):
        return Work("kernel", flops, moved)
    return Work("product", flops, moved, _product_shape(program, i, by_name))


def _attention_flops(i: Instruction, by_name: dict[str, Instruction], kind: Kind) -> int:
    """4 B H L keys A, half of it under a causal mask, and 2.5 times as much backward."""
    batch, length, heads, width = dimensions(by_name[i.operands[0]].shape)[0][1]
    keys = dimensions(by_name[i.operands[1]].shape)[0][1][1]
    flops = 4 * batch * heads * length * keys * width
    flops = flops // 2 if "CAUSAL" in i.attributes else flops
    return round(BACKWARD_PRODUCTS * flops) if kind == "attention gradient" else flops


def _product_shape(
    program: Program, i: Instruction, by_name: dict[str, Instruction]
) -> tuple[int, int, int, int]:
    """Of the largest product in the instruction, (0, 0, 0, 0) where it cannot be read."""
    if i.opcode == "dot":
        return _dot_shape(i, by_name)
    if i.opcode in ("fusion", "call") and i.called:
        inner = program.computations[i.called]
        names = {j.name: j for j in inner}
        shapes = [_product_shape(program, j, names) for j in inner if j.opcode not in FREE]
        return max(shapes, key=math.prod, default=(0, 0, 0, 0))
    if i.opcode == "custom-call" and "__cublas" in i.attributes:
        out = dimensions(i.shape)[0][1]
        depth = product_flops(program, i, by_name) // (2 * math.prod(out))
        return math.prod(out[:-2]), out[-2], out[-1], depth
    return (0, 0, 0, 0)


def _dot_shape(i: Instruction, by_name: dict[str, Instruction]) -> tuple[int, int, int, int]:
    left, right = (dimensions(by_name[name].shape)[0][1] for name in i.operands[:2])
    batch = math.prod(left[axis] for axis in _axes("lhs_batch_dims", i))
    depth = math.prod(left[axis] for axis in _axes("lhs_contracting_dims", i))
    own = batch * depth
    return batch, math.prod(left) // own, math.prod(right) // own, depth


def _axes(name: str, i: Instruction) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", i.attributes)
    return [int(axis) for axis in found[1].split(",") if axis] if found else []


def product_flops(program: Program, i: Instruction, by_name: dict[str, Instruction]) -> int:
    """FLOPs of the matrix products in an instruction, 0 if there are none."""
    if i.opcode in FREE:
        return 0
    if stated := i.frontend("flops"):
        return int(stated)
    if i.opcode == "dot":
        return _dot_flops(i, by_name)
    if i.opcode == "custom-call" and "__cublas" in i.attributes:
        left, right = (dimensions(by_name[name].shape)[0][1] for name in i.operands[:2])
        out = dimensions(i.shape)[0][1]
        # Whatever is transposed: |left| |right| / |out| is the square of the contraction.
        return 2 * round(math.sqrt(math.prod(left) * math.prod(right) * math.prod(out)))
    if i.opcode in ("fusion", "call") and i.called:
        inner = program.computations[i.called]
        names = {j.name: j for j in inner}
        return sum(product_flops(program, j, names) for j in inner)
    return 0


def _dot_flops(i: Instruction, by_name: dict[str, Instruction]) -> int:
    left = dimensions(by_name[i.operands[0]].shape)[0][1]
    depth = math.prod(left[axis] for axis in _axes("lhs_contracting_dims", i))
    return 2 * math.prod(dimensions(i.shape)[0][1]) * depth


def traffic(program: Program, i: Instruction, by_name: dict[str, Instruction]) -> int:
    """Bytes read and written. Of a sliced or gathered operand, only what is taken of it."""
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0
    if stated := i.frontend("bytes"):
        return int(stated)
    if i.opcode in SLICES:
        return 2 * i.bytes
    if i.opcode == "dynamic-update-slice":
        return 2 * by_name[i.operands[1]].bytes
    if i.opcode == "fusion" and i.called:
        return _fusion_traffic(program.computations[i.called])
    return i.bytes + sum(by_name[name].bytes for name in i.operands)


def _fusion_traffic(inner: list[Instruction]) -> int:
    by_name = {j.name: j for j in inner}
    users: dict[str, list[Instruction]] = {}
    for j in inner:
        for operand in j.operands:
            users.setdefault(operand, []).append(j)
    read = sum(_read(j, users, by_name) for j in inner if j.opcode == "parameter")
    root = next(j for j in inner if j.root)
    outputs = [by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    return read + sum(_written(j, by_name) for j in outputs)


def _read(
    i: Instruction, users: dict[str, list[Instruction]], by_name: dict[str, Instruction]
) -> int:
    """Bytes that a fusion reads of a parameter, or of a value that is the same numbers."""
    total = 0
    for user in users.get(i.name, []):
        if user.opcode in SLICES and user.operands[0] == i.name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == i.name:
            continue  # updated in place
        elif user.opcode in PASSING and not user.root:
            total += _read(user, users, by_name)
        else:
            return i.bytes
    return min(total, i.bytes)


def _written(i: Instruction, by_name: dict[str, Instruction]) -> int:
    while i.opcode in PASSING and i.operands[0] in by_name:
        before = by_name[i.operands[0]]
        if before.opcode != "dynamic-update-slice" and before.opcode not in PASSING:
            break
        i = before
    if i.opcode == "dynamic-update-slice":
        return by_name[i.operands[1]].bytes
    return shape_bytes(i.shape)
