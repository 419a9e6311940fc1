"""What every schedule must satisfy. A schedule is checked when it is made."""

from collections import Counter

from moe_jax.base.errors import require
from moe_jax.parallel.schedules.operations import Kind, Operation, PipelineSchedule, Place, Step
from moe_jax.parallel.schedules.timing import run_orders


def check(schedule: PipelineSchedule) -> None:
    """UserError: a table that does not train every micro-batch exactly once, or never ends."""
    name = schedule.name
    require(schedule.stages >= 1, f"{name}: {schedule.stages} stages: there must be at least 1")
    require(
        schedule.microbatches >= 1,
        f"{name}: {schedule.microbatches} micro-batches: there must be at least 1",
    )
    _check_paths(schedule)
    for device, order in enumerate(schedule.orders):
        for step in order:
            _check_step(name, device, step)
        _check_order(schedule, device, [operation for step in order for operation in step])
    # Last: it needs every operation to be there once.
    run_orders(schedule, lambda device, step: 1.0)


def _check_paths(schedule: PipelineSchedule) -> None:
    name = schedule.name
    paths = schedule.paths
    require(bool(paths and paths[0]), f"{name}: there is no path")
    require(
        schedule.microbatches % len(paths) == 0,
        f"{name}: {schedule.microbatches} micro-batches do not divide into {len(paths)} paths",
    )
    require(len({len(path) for path in paths}) == 1, f"{name}: its paths differ in length")
    places = [place for path in paths for place in path]
    twice = [place for place, times in Counter(places).items() if times > 1]
    require(not twice, f"{name}: two pieces of the model have one place: {twice[:1]}")
    devices = range(schedule.devices)
    chunks = len(places) // len(devices) if devices else 0
    expected = {Place(device, chunk) for device in devices for chunk in range(chunks)}
    require(
        set(places) == expected,
        f"{name}: its paths do not fill {len(devices)} devices with equally many chunks each",
    )


def _check_step(name: str, device: int, step: Step) -> None:
    kinds = [operation.kind for operation in step]
    ones = [[kind] for kind in Kind]
    require(
        kinds in [*ones, [Kind.FORWARD, Kind.BACKWARD]],
        f"{name}: device {device} does {', '.join(map(str, step)) or 'nothing'} at once: "
        "a step is one operation, or a forward and a whole backward",
    )


def _check_order(schedule: PipelineSchedule, device: int, operations: list[Operation]) -> None:
    """Every operation once, and F < Bi < W of each micro-batch and chunk."""
    where = f"{schedule.name}: device {device}"
    number = {operation: index for index, operation in enumerate(operations)}
    for operation, times in Counter(operations).items():
        require(times == 1, f"{where} does the {operation} {times} times")
    expected = 0
    for microbatch in range(schedule.microbatches):
        for place in schedule.path_of(microbatch):
            if place.device == device:
                expected += _check_item(where, number, microbatch, place.chunk)
    require(
        len(operations) == expected,
        f"{where} has {len(operations) - expected} operations on chunks where their "
        "micro-batches do not go",
    )


def _check_item(where: str, number: dict[Operation, int], microbatch: int, chunk: int) -> int:
    """The operations of a micro-batch and a chunk: F and B, or F, Bi and W. Returns how many."""
    found = [number.get(Operation(kind, microbatch, chunk)) for kind in Kind]
    forward, whole, to_input, to_weight = found
    item = f"micro-batch {microbatch}, chunk {chunk}"
    require(forward is not None, f"{where} never does the forward of {item}")
    parts = [forward, whole] if whole is not None else [forward, to_input, to_weight]
    require(None not in parts, f"{where} never does a backward of {item}")
    once = whole is None or (to_input is None and to_weight is None)
    require(once, f"{where} does a backward of {item} twice, whole and in parts")
    require(parts == sorted(parts), f"{where} does the operations of {item} in a wrong order")  # pyright: ignore
    return len(parts)
