"""What fits on one small device, and how fast it is there: by formula, and compiled where it fits.

    training           parameters, moments and gradients: what no program can do without
    in tiers           the same of all but the routed experts, and the least budget for these
    decoding           experts in bfloat16, all else as it was trained
    in tiers           all but the experts, and the experts of a token in one layer

    decoding, tokens/s      at most memory rate / bytes that a token reads
    in tiers, tokens/s      the same, and at the worst all experts of a token come from below

Activations, the KV cache and what the host does are in none of these. So a device that has less
memory is too small, and one that has more may still be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe_jax.base.result import Measurement
from moe_jax.config import PlacementConfig, TrainConfig
from moe_jax.config.presets import PRESETS
from moe_jax.model.count import count_parameters
from moe_jax.predict.hardware import Card, find_card
from moe_jax.predict.memory import CONTEXT
from moe_jax.train.engines.tiered.chunks import Sizes
from moe_jax.train.engines.tiered.rows import row_shapes
from moe_jax.train.state import abstract_state, tree_bytes

GIB = 2**30
DECODED = 2
"""Bytes of an expert's parameter when it is decoded, in bfloat16."""
ANY_BUDGET = "1000TB"


@dataclass(frozen=True)
class Device:
    """One device, with the links that matter to it."""

    name: str
    text: str
    memory: int
    reserved: int
    """Bytes of the memory that no program gets."""
    memory_rate: float
    """Bytes a second."""
    below_rate: float
    """Bytes a second from where experts lie that do not fit."""
    below: str
    card: Card | None = None
    """What is compiled for."""


def gpu(name: str, text: str) -> Device:
    """A card of the table."""
    card = find_card(name)
    return Device(
        name=name,
        text=text,
        memory=card.memory_bytes,
        reserved=CONTEXT,
        memory_rate=card.memory_rate,
        below_rate=card.host_link.rate,
        below="host memory",
        card=card,
    )


LAPTOP = Device(
    name="laptop",
    text="a laptop CPU (assumed: 16 GiB, 50 GB/s of memory, 3 GB/s of disk, 4 GiB for the system)",
    memory=16 * GIB,
    reserved=4 * GIB,
    memory_rate=50e9,
    below_rate=3e9,
    below="disk",
)


def devices() -> tuple[Device, ...]:
    """All that the table has."""
    gpus = (("rtx4090", "one RTX 4090"), ("l4", "one L4"), ("t4", "one T4"))
    return (*(gpu(*one) for one in gpus), LAPTOP)


@dataclass(frozen=True)
class Needs:
    """Bytes that a preset needs, and that a token reads."""

    parameters: int
    """Their number."""
    train: int
    tiered_train: int
    below_train: int
    """Of the experts' rows that lie below the device, with tiers."""
    decode: int
    tiered_decode: int
    read: int
    """By a token, with everything on the device."""
    read_experts: int
    """A part of `read`."""


def needs_of(config: TrainConfig) -> Needs:
    """By formula, from the shapes of the state."""
    model = config.model
    state = abstract_state(config)
    parameters = tree_bytes(state.parameters)
    whole = tree_bytes(state) + parameters
    shapes = row_shapes(config)
    routed = model.moe_layers * model.moe.experts
    tiered = replace(config, placement=PlacementConfig(device_budget=ANY_BUDGET))
    trunk = parameters - routed * shapes.parameter_bytes
    counts = count_parameters(model)
    itemsize = parameters // (counts.total + counts.mtp)
    expert = DECODED * shapes.parameter_bytes // itemsize
    read_experts = model.moe_layers * model.moe.experts_per_token * expert
    return Needs(
        parameters=counts.total + counts.mtp,
        train=whole,
        tiered_train=whole - routed * shapes.record_bytes + Sizes(tiered, shapes).working,
        below_train=routed * shapes.record_bytes,
        decode=trunk + routed * expert,
        tiered_decode=trunk + model.moe.experts_per_token * expert,
        # A token looks one row of the embedding up.
        read=trunk
        - itemsize * (counts.mtp + (0 if model.tied_embedding else counts.embedding))
        + read_experts,
        read_experts=read_experts,
    )


def by_formula(device: Device, preset: str) -> list[Measurement]:
    """The bytes and the bounds of a preset on a device."""
    needs = needs_of(PRESETS[preset].resolved())
    name = f"{device.name}.{preset}"
    room = device.memory - device.reserved
    rows = [Measurement(f"{name}.parameters", needs.parameters, "parameters")]
    for what in ("train", "tiered_train", "decode", "tiered_decode"):
        size = getattr(needs, what)
        rows += [
            Measurement(f"{name}.{what}_bytes", size, "bytes at least, by formula"),
            Measurement(f"{name}.{what}_fits", int(size <= room), "1: it may fit. 0: it cannot"),
        ]
    fastest = device.memory_rate / needs.read
    seconds = 1 / fastest + needs.read_experts / device.below_rate
    unit = "tokens/s of one text at most, PREDICTED"
    below = f"{unit}, all its experts from {device.below}"
    rows += [
        Measurement(f"{name}.decode_at_most", fastest, unit),
        Measurement(f"{name}.tiered_decode_from_below", 1 / seconds, below),
    ]
    return rows


def section(rows: Sequence[Measurement]) -> str:
    """All measurements as the tables of docs/hardware.md."""
    known = {row.name: row for row in rows}
    return "\n\n".join(_table(device, known) for device in devices())


def _table(device: Device, known: Mapping[str, Measurement]) -> str:
    lines = [
        f"### {device.text[0].upper()}{device.text[1:]}, {device.memory / GIB:.1f} GiB",
        "",
        "| preset | parameters | train | train, experts in tiers | decode | decode, in tiers |",
        "|---|---|---|---|---|---|",
    ]
    for preset in PRESETS:
        name = f"{device.name}.{preset}"
        cells = (
            preset,
            _short(_value(known, f"{name}.parameters")),
            _trained(known, name),
            _size(known, f"{name}.tiered_train"),
            _decoded(known, name, "decode"),
            _decoded(known, name, "tiered_decode"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _value(known: Mapping[str, Measurement], name: str) -> float:
    value = known[name].value
    assert value is not None
    return value


def _short(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _bytes(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _size(known: Mapping[str, Measurement], name: str) -> str:
    size = _bytes(_value(known, f"{name}_bytes"))
    return f"from {size}" if _value(known, f"{name}_fits") else f"no: {size}"


def _trained(known: Mapping[str, Measurement], name: str) -> str:
    rate = known.get(f"{name}.train_tokens_per_second")
    if rate is None or rate.value is None:
        return _size(known, f"{name}.train")
    size = _bytes(_value(known, f"{name}.train_compiled_bytes"))
    low, high = rate.interval or (0.0, 0.0)
    fits = "" if _value(known, f"{name}.train_compiled_fits") else "no: "
    return f"{fits}{size}, {_short(rate.value)} tokens/s ({_short(low)} to {_short(high)})"


def _decoded(known: Mapping[str, Measurement], name: str, what: str) -> str:
    size = _size(known, f"{name}.{what}")
    if not _value(known, f"{name}.{what}_fits"):
        return size
    most = _short(_value(known, f"{name}.decode_at_most"))
    if what == "decode":
        return f"{size}, at most {most} tokens/s"
    least = _short(_value(known, f"{name}.tiered_decode_from_below"))
    return f"{size}, at most {least} to {most} tokens/s"
