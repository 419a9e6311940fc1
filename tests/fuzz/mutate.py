"""Seeded mutators: bytes of a file, and types of the values inside of it."""

import copy
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np

LONG = "line one\nline two\r\x00\x1b[31m\u202e\"'{[" + "x" * 20_000
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**300,
    0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"), float("-inf"),
    "", "0", "262", "llama", "../../x", "\ud800", LONG,
    [], [0], [-1], ["a"], [None], [[]], [[[[0]]]], [1, "a", None], [0] * 3000, ["b\n"] * 500,
    {}, {"a": 1}, {"rope_type": "linear"}, {"type": [1]}, {LONG: LONG}, {"": {"": {"": []}}},
]  # fmt: skip
"""Values that stand in for any other: each type, and the ends of its range."""


def deep(levels: int) -> Any:
    """A list in a list in a list …"""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def damaged(data: bytes, random: Random, reach: int | None = None) -> bytes:
    """`data` with bytes flipped, cut off, put in, doubled or moved; mostly in its first `reach`."""
    reach = min(reach or len(data), len(data)) if random.random() < 0.8 else len(data)
    place = random.randrange(reach) if reach else 0
    size = random.choice((1, 1, 2, 4, 8, 100))
    match random.randrange(7):
        case 0:
            return data[:place]
        case 1:
            return data + random.randbytes(size)
        case 2:
            return data[:place] + random.randbytes(size) + data[place:]
        case 3:
            return data[:place] + data[place + size :]
        case 4:
            other = random.randrange(len(data) + 1)
            return data[:place] + data[other : other + 100 * size] + data[place:]
        case _:
            return flipped(data, random, reach)


def flipped(data: bytes, random: Random, reach: int) -> bytes:
    """One to four bytes replaced, by extreme ones as often as by any."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4) if reach else 0):
        extreme = random.choice((0, 1, 48, 57, 91, 123, 125, 127, 128, 254, 255))
        changed[random.randrange(reach)] = random.choice((extreme, random.randrange(256)))
    return bytes(changed)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside of a JSON value, the whole one left out."""
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        yield from places(inner, (*path, key))


def retyped(value: Any, random: Random, odd: list[Any] | None = None) -> Any:
    """A copy of a JSON value with one or two values inside replaced, removed or put in."""
    changed = copy.deepcopy(value)
    if random.random() < 0.03:
        return random.choice(ODD)
    for _ in range(random.randint(1, 2)):
        paths = list(places(changed))
        if not paths:
            return random.choice(ODD)
        # Long lists have most places. Every second change is near the top.
        near = [path for path in paths if len(path) <= 2] or paths
        _change(changed, random.choice(random.choice((near, paths))), random, odd or ODD)
    return changed


def _change(root: Any, path: tuple, random: Random, odd: list[Any]) -> None:
    for key in path[:-1]:
        root = root[key]
    action = random.random()
    if action < 0.1:
        del root[path[-1]]
    elif action < 0.2 and isinstance(root, dict):
        root[str(random.choice(odd))] = random.choice(odd)
    else:
        root[path[-1]] = copy.deepcopy(random.choice(odd))


def gguf_field(value: Any) -> bytes:
    """The type and the bytes of a metadata value, as a GGUF file has them."""
    match value:
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<Iq", 11, max(-(2**63), min(value, 2**63 - 1)))
        case float():
            return struct.pack("<Id", 12, value)
        case str():
            return struct.pack("<I", 8) + gguf_string(value)
        case np.ndarray():
            kind = {"i": 11, "u": 10, "f": 12, "b": 7}[value.dtype.kind]
            wide = value.astype({"i": "<i8", "u": "<u8", "f": "<f8", "b": "?"}[value.dtype.kind])
            return struct.pack("<IIQ", 9, kind, len(wide)) + wide.tobytes()
        case _:
            texts = [gguf_string(str(text)) for text in value or ()]
            return struct.pack("<IIQ", 9, 8, len(texts)) + b"".join(texts)


def gguf_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def gguf_file(fields: dict[str, Any], tensors: dict[str, Any]) -> bytes:
    """A GGUF file of these fields; tensors as gguf.header.TensorInfo has them."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(gguf_string(name) + gguf_field(value) for name, value in fields.items())
    data = b""
    for name, info in tensors.items():
        sizes = info.shape[::-1]
        head += gguf_string(name) + struct.pack("<I", len(sizes)) + struct.pack(
            f"<{len(sizes)}QIQ", *sizes, info.kind, len(data)
        )  # fmt: skip
        data += info.data.tobytes()
        data += bytes(-len(data) % 32)
    return head + bytes(-len(head) % 32) + data
