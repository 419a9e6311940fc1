"""Where the settings of a group of processes come from: flags, SLURM, or the environment."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.base.errors import UserError, quote, require
from moe_jax.config.processes import OWNER, ProcessesConfig, check_address


class Place(NamedTuple):
    """This process's place in its group."""

    count: int
    index: int
    coordinator: str
    """HOST:PORT of process 0. Empty for a single process."""
    local: int | None = None
    """The one GPU of the machine that this process uses. None: all that it sees."""


ALONE = Place(1, 0, "")

SLURM_PORTS = 2**12
"""Ports from 61440 up, by the job's number, so that two jobs on one machine rarely meet."""


def find_place(config: ProcessesConfig, environment: Mapping[str, str]) -> Place:
    """The place that the settings or, for `auto`, the variables give.

    UserError: no launcher's variables are there, or one of them is no number.
    """
    if config.count != "auto":
        return (
            ALONE
            if config.count == 1
            else Place(config.count, config.index or 0, config.coordinator)
        )
    for marker, read in LAUNCHERS.items():
        if marker in environment:
            place = read(environment)
            break
    else:
        raise UserError(
            f"{OWNER}.count is auto, and the environment has none of {', '.join(LAUNCHERS)}: start "
            f"the command with srun or mpirun, or give {OWNER}.count, .index and .coordinator"
        )
    require(
        0 <= place.index < place.count,
        f"the environment says process {place.index} of {place.count}: numbers go from 0 to "
        f"{place.count - 1}",
    )
    if place.count == 1:
        return ALONE
    check_address("the coordinator in the environment", place.coordinator)
    return place


def _slurm(environment: Mapping[str, str]) -> Place:
    """One task of a job step. Several tasks on a machine take one GPU each."""
    job = _number(environment, "SLURM_JOB_ID")
    count = _number(environment, "SLURM_NTASKS")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = f"{first_node(nodes)}:{2**16 - SLURM_PORTS + job % SLURM_PORTS}"
    machines = _number(environment, "SLURM_STEP_NUM_NODES", _number(environment, "SLURM_NNODES", 1))
    local = _number(environment, "SLURM_LOCALID", 0) if count > machines else None
    return Place(count, _number(environment, "SLURM_PROCID"), address, _own_gpu(local, environment))


def _open_mpi(environment: Mapping[str, str]) -> Place:
    count = _number(environment, "OMPI_COMM_WORLD_SIZE")
    local = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK", 0)
    several = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", 1) > 1
    own = _own_gpu(local if several else None, environment)
    return Place(count, _number(environment, "OMPI_COMM_WORLD_RANK"), _master(environment), own)


def _variables(environment: Mapping[str, str]) -> Place:
    count = _number(environment, "WORLD_SIZE")
    several = _number(environment, "LOCAL_WORLD_SIZE", 1) > 1
    local = _number(environment, "LOCAL_RANK", 0) if several else None
    own = _own_gpu(local, environment)
    return Place(count, _number(environment, "RANK"), _master(environment), own)


LAUNCHERS = {"SLURM_PROCID": _slurm, "OMPI_COMM_WORLD_RANK": _open_mpi, "RANK": _variables}
"""Readers, by the variable that shows which launcher there is."""


def first_node(nodes: str) -> str:
    """The first machine of SLURM's compressed list: `gpu[003-010,12],login` -> `gpu003`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^\[,]*))?", nodes)
    if match is None:
        raise UserError(f"the environment's SLURM_STEP_NODELIST {quote(nodes)} names no machine")
    return "".join(part or "" for part in match.groups())


def _master(environment: Mapping[str, str]) -> str:
    return f"{_text(environment, 'MASTER_ADDR')}:{_number(environment, 'MASTER_PORT')}"


def _own_gpu(local: int | None, environment: Mapping[str, str]) -> int | None:
    """None also where the launcher has already left this process a single GPU."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return None if visible is not None and "," not in visible else local


def _text(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    require(value != "", f"{OWNER}.count is auto, and the environment lacks {name}")
    return value


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environment:
        return default
    value = _text(environment, name)
    require(
        re.fullmatch(r"\d{1,9}", value, re.ASCII) is not None,
        f"the environment's {name} is {quote(value)}: it must be a number",
    )
    return int(value)
