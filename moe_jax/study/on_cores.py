"""Work that several processes do together, each on a core of its own. Linux only."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax

from moe_jax.base.console import working
from moe_jax.base.errors import require
from moe_jax.config.processes import ProcessesConfig
from moe_jax.parallel.processes import Peers, connected
from moe_jax.parallel.processes.start import free_port


def two_cores() -> tuple[int, int]:
    """The first two cores that this program may use. UserError: there is one."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    require(len(cores) >= 2, f"two cores are needed, and this program may use {len(cores)}")
    return cores[0], cores[1]


def on_cores(work: Callable[..., Any], cores: Sequence[int], *arguments: Any) -> list[Any]:
    """work(peers, *arguments) in one process for each core, and their results in this order.

    Each process has one CPU device, and jax.distributed connects them. `work`, its arguments and
    its results must be picklable. RuntimeError: a process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    coordinator = f"localhost:{free_port()}"
    mine = os.sched_getaffinity(0)
    started = []
    try:
        for index, core in enumerate(cores):
            here, there = context.Pipe(duplex=False)
            config = ProcessesConfig(len(cores), index, coordinator)
            process = context.Process(target=_process, args=(there, config, work, arguments))
            # A process has its parent's cores from its first thread on.
            os.sched_setaffinity(0, {core})
            process.start()
            os.sched_setaffinity(0, mine)
            there.close()  # so that the other end notices when the process ends
            started.append((process, here))
        with working(f"in {len(cores)} processes"):
            return [_result(index, *one) for index, one in enumerate(started)]
    finally:
        os.sched_setaffinity(0, mine)
        for process, _ in started:
            process.kill()
            process.join()


def _result(index: int, process: Any, connection: Connection) -> Any:
    try:
        result = connection.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"process {index} ended with code {process.exitcode}") from None
    process.join()
    return result


def _process(
    connection: Connection, config: ProcessesConfig, work: Callable[..., Any], arguments: tuple
) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    with connected(config, {}) as peers:
        result = work(peers, *arguments)
    connection.send(result)


def timed(peers: Peers, function: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of a call of `function`, which all processes begin together: the mean of `repeats`.

    Its results are waited for.
    """
    peers.exchange("begin")
    begun = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(function())
    return (time.perf_counter() - begun) / repeats
