"""Mutations: bytes changed, files cut, values of JSON replaced by values of other types."""

import copy
import json
import random
from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any

EXTREME_BYTES = (0, 1, 9, 10, 32, 34, 127, 128, 255)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "a", "-1", "0", "1e9", "nan", "\0", "\n", "é", "\ud800", "x" * 20_000, "../../etc"),
    *([], [[]], [None], [1, 2, 3], [0] * 2000, ["a"] * 70, {}, {"": None}, {"a": {"a": {"a": 1}}}),
)
"""What stands in place of a right value: other types, ends of ranges, and long or odd text."""


def deep(depth: int = 3000) -> str:
    """JSON that is deeper than a recursive reader can go."""
    return "[" * depth + "]" * depth


def mutate_bytes(data: bytes, rng: random.Random, head: int = 4096) -> bytes:
    """Bytes changed (mostly among the first `head`), cut out, repeated, or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not changed:
            break
        reach = len(changed) if rng.random() < 0.3 else min(head, len(changed))
        place = rng.randrange(reach)
        match rng.randrange(6):
            case 0 | 1:
                changed[place] = rng.choice((*EXTREME_BYTES, rng.randrange(256)))
            case 2:
                changed[place] ^= 1 << rng.randrange(8)
            case 3:
                del changed[place : place + rng.choice((1, 4, 8, 100))]
            case 4:
                changed[place:place] = changed[place : place + rng.choice((1, 4, 8, 100))]
            case _:
                wide = rng.choice((b"\xff" * 8, b"\0" * 8, b"\0\0\0\0\0\0\0\x40"))
                changed[place : place + 8] = wide
    if rng.random() < 0.2:
        del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a tree of JSON."""
    if isinstance(tree, MutableMapping):
        pairs = list(tree.items())
    elif isinstance(tree, MutableSequence):
        # The first and last of a long list stand for all.
        numbers = {*range(min(3, len(tree))), *range(max(0, len(tree) - 1), len(tree))}
        pairs = [(number, tree[number]) for number in sorted(numbers)]
    else:
        return
    for key, value in pairs:
        yield tree, key
        yield from places(value)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """One or two values replaced, removed or added. Sometimes bytes instead."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng, head=len(data))
    if rng.random() < 0.03:
        return deep().encode()
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        spots = list(places(tree))
        if not spots or rng.random() < 0.05:
            tree = copy.deepcopy(rng.choice(VALUES))
            break
        container, key = rng.choice(spots)
        if rng.random() < 0.15:
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """A file of JSON lines: one line mutated, doubled, moved or removed."""
    lines = data.split(b"\n")
    number = rng.randrange(max(1, len(lines) - 1))
    match rng.randrange(5):
        case 0:
            del lines[number]
        case 1:
            lines.insert(rng.randrange(len(lines)), lines[number])
        case 2:
            lines[number] = mutate_bytes(lines[number], rng)
        case _:
            lines[number] = mutate_json(lines[number], rng)
    return b"\n".join(lines)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Bytes of the file, or values of its header with the length brought up to date."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length], rng)
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**63))
    return size.to_bytes(8, "little") + header + data[8 + length :]


def mutate_first_line(data: bytes, rng: random.Random) -> bytes:
    """A line of JSON and then bytes: the one or the other."""
    header, newline, body = data.partition(b"\n")
    if rng.random() < 0.6:
        return mutate_json(header, rng) + newline + body
    return header + newline + mutate_bytes(body, rng)
