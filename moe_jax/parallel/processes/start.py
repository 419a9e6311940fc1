"""The start and the end of a group of processes: meeting, JAX's runtime, farewell."""

import io
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.base import process
from moe_jax.base.errors import UserError, brief, quote, require
from moe_jax.config.processes import ProcessesConfig
from moe_jax.parallel.processes.found import Place, find_place
from moe_jax.parallel.processes.hub import BEATS, Hub
from moe_jax.parallel.processes.peers import ALONE, FAREWELL, Group, Peers
from moe_jax.parallel.processes.tunnel import open_tunnel
from moe_jax.parallel.processes.wire import LostError, Wire, connect, host_and_port, listen

JAX_TIMEOUT = 100
"""JAX's own seconds of silence, its default. The connections here are quicker."""


@contextmanager
def connected(config: ProcessesConfig, same: Mapping[str, Any]) -> Iterator[Peers]:
    """The processes of a run, all of them started, for the block.

    `same`: settings that every process must have been given alike. Inside the block an error of one
    process ends all of them. A single process does nothing. UserError: the processes do not find
    each other, or were given different commands.
    """
    place = find_place(config, os.environ)
    if place.count == 1:
        require(
            jax.process_count() == 1,
            f"{jax.process_count()} processes were started with jax.distributed: give "
            "processes.count, .index and .coordinator instead, which start it",
        )
        yield ALONE
        return
    require(not process.in_group(), "this process has trained with others already: start new ones")
    process.join(place.index)
    hub = _open_hub(place, config) if place.index == 0 else None
    group = hub.group if hub is not None else _join(place, config)
    try:
        if hub is not None:
            hub.wait_for_all(config.patience)
        require_same(group, same)
        _start_jax(group, place, config)
        yield group
    except BaseException as error:
        group.leave(error)
        raise
    group.exchange(FAREWELL)
    jax.distributed.shutdown()
    if hub is not None:
        hub.close()


def _open_hub(place: Place, config: ProcessesConfig) -> Hub:
    try:
        server = listen(host_and_port(place.coordinator)[1])
    except OSError as error:
        raise UserError(
            f"process 0 cannot wait at {place.coordinator} ({error.strerror or error}): choose "
            "another port with --processes.coordinator"
        ) from error
    return Hub(server, place.count, config.timeout)


def _join(place: Place, config: ProcessesConfig) -> Group:
    wire = Wire(connect(place.coordinator, config.patience), config.timeout)
    try:
        return join_group(wire, place.index, place.count, config.timeout)
    except LostError as reason:
        raise UserError(f"process 0 at {place.coordinator} is lost ({reason})") from reason


def join_group(wire: Wire, index: int, count: int, timeout: float) -> Group:
    """Presents this process to process 0, and starts threads that listen and give signs of life.

    LostError: process 0 does not take it.
    """
    group = Group(index, count, wire.send)
    wire.send({"hello": index, "count": count})

    def listen_to_first() -> None:
        try:
            while True:
                group.handle(wire.receive())
        except LostError as reason:
            group.lost(0, reason)

    def beat() -> None:
        with suppress(LostError):  # the other thread notices it
            while True:
                wire.send({"beat": 1})
                time.sleep(timeout / BEATS)

    for target in (listen_to_first, beat):
        threading.Thread(target=target, daemon=True).start()
    return group


def require_same(group: Group, same: Mapping[str, Any]) -> None:
    """UserError: a process was given other settings than process 0, or has another version."""
    given = group.exchange("settings", dict(same) | {"version of JAX": jax.__version__})
    for index, settings in enumerate(given):
        for name in {**given[0], **settings}:
            first = given[0].get(name)
            its = settings.get(name)
            require(
                first == its,
                f"process {index} was started with {name}={brief(its)}, and process 0 with "
                f"{brief(first)}: give all processes the same command",
            )


def _start_jax(group: Group, place: Place, config: ProcessesConfig) -> None:
    """Starts jax.distributed, and lets all devices compute a sum once."""
    port = group.from_first("port", free_port() if group.index == 0 else None)
    address = f"127.0.0.1:{port}"
    if group.index != 0:
        host = place.coordinator.rpartition(":")[0]
        address = f"127.0.0.1:{open_tunnel(f'{host}:{port}', config.patience)}"
    # A proxy for the web leads to no machine of the group. JAX would warn of it in every process.
    os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112, gRPC reads small letters
    jax.config.update("jax_check_proxy_envs", False)
    # base.signals handles SIGTERM. JAX's service would take it away.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            place.count,
            place.index,
            local_device_ids=None if place.local is None else [place.local],
            cluster_detection_method="deactivate",
            initialization_timeout=int(config.patience),
            heartbeat_timeout_seconds=max(JAX_TIMEOUT, int(4 * config.timeout)),
        )
    except RuntimeError as error:
        raise UserError(f"jax.distributed does not start: {quote(str(error))}") from error
    _move_stdout()
    _require_sum()
    group.exchange("started")


def _require_sum() -> None:
    """The first collective opens the connections between devices."""
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("all",), devices=jax.devices())
    ones = np.ones(count, np.float32)
    parts = jax.make_array_from_callback(
        (count,), NamedSharding(mesh, P("all")), lambda index: ones[index]
    )
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(parts)
    require(float(total) == count, f"a sum over {count} devices gives {float(total)}")


def _move_stdout() -> None:
    """Gives Python's stdout a descriptor of its own. What libraries in C print goes nowhere.

    Gloo, which sums over CPU devices, prints a line whenever some of them are connected.
    """
    old = sys.stdout
    if not isinstance(old, io.TextIOWrapper) or old.fileno() != 1:
        return  # a notebook's, or a test's
    old.flush()
    own = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    how = {"encoding": old.encoding, "errors": old.errors, "line_buffering": old.line_buffering}
    sys.stdout = io.TextIOWrapper(os.fdopen(own, "wb"), **how)


def free_port() -> int:
    """A port that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
