"""Which matrices a compiled program copies in its loops, turn by turn."""

from collections.abc import Collection

from moe_jax.predict.hlo_text import Instruction, Program, dimensions, parse, shape_bytes
from moe_jax.predict.schedule import turns
from moe_jax.predict.work import FREE, product_flops


def copied_in_loops(text: str, matrices: Collection[tuple[int, int]]) -> int:
    """Bytes of the stacked matrices [n, rows, columns] that loops write and no product computes.

    `text` is `compiled.as_text()`, and `matrices` are (rows, columns). Slices, casts and copies
    count with every turn. Updates in place do not count: gradients get to their place by them. A
    loop whose number of turns is decided at run time counts as none.
    """
    program = parse(text)
    return _copied(program, program.entry, matrices, inside=False)


def _copied(
    program: Program, name: str, matrices: Collection[tuple[int, int]], *, inside: bool
) -> int:
    total = 0
    body = program.computations[name]
    by_name = {i.name: i for i in body}
    for i in body:
        if i.opcode in ("while", "call") and i.called:
            within = inside or i.opcode == "while"
            total += turns(i) * _copied(program, i.called, matrices, inside=within)
        elif inside and not _moves_nothing(program, i, by_name):
            total += sum(
                shape_bytes(f"{kind}[{','.join(map(str, sizes))}]")
                for kind, sizes in dimensions(i.shape)
                if len(sizes) > 2 and sizes[-2:] in matrices
            )
    return total


def _moves_nothing(program: Program, i: Instruction, by_name: dict[str, Instruction]) -> bool:
    if i.opcode in FREE or i.opcode.endswith(("-start", "-done")):
        return True
    inner = program.computations[i.called] if i.opcode == "fusion" and i.called else [i]
    if any(j.opcode == "dynamic-update-slice" for j in inner):
        return True
    return product_flops(program, i, by_name) > 0
