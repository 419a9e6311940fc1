"""Settings of several processes, and where `auto` finds them."""

import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import ProcessesConfig
from moe_jax.parallel.processes.found import ALONE, Place, find_place, first_node


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "processes.count is 0: use auto, or a number from 1"),
        ({"count": 2}, "processes.index is None: processes.count=2 processes have the numbers"),
        ({"count": 2, "index": 2, "coordinator": "a:1"}, "have the numbers from 0 to 1"),
        ({"count": 2, "index": 0}, "processes.count=2 needs processes.coordinator: HOST:PORT"),
        ({"count": 2, "index": 0, "coordinator": "node01"}, "'node01' is no HOST:PORT"),
        ({"count": 2, "index": 0, "coordinator": "a:70000"}, "'a:70000' is no HOST:PORT"),
        ({"index": 0}, "processes.index is set and processes.count is 1: several processes need"),
        ({"count": "auto", "coordinator": "a:1"}, "coordinator is set and processes.count is auto"),
        ({"timeout": 0.5}, "processes.timeout is 0.5: it must be at least 1"),
        ({"patience": 0.0}, "processes.patience is 0.0: it must be positive"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=message):
        ProcessesConfig(**settings)


@pytest.mark.parametrize("address", ["node01:9000", "10.0.0.1:1", "[::1]:65535"])
def test_addresses(address):
    config = ProcessesConfig(count=2, index=1, coordinator=address)
    assert find_place(config, {}) == Place(2, 1, address)


AUTO = ProcessesConfig(count="auto")
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
}
MASTER = {"MASTER_ADDR": "node5", "MASTER_PORT": "29500"}
RANKS = {"RANK": "1", "WORLD_SIZE": "2", **MASTER}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", **MASTER}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SLURM, Place(4, 3, "gpu07:61586", local=1)),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, Place(2, 1, "gpu07:61586")),
        # A launcher that leaves each task its own GPU.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, Place(4, 3, "gpu07:61586")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, Place(4, 3, "gpu07:61586", local=1)),
        (RANKS, Place(2, 1, "node5:29500")),
        (RANKS | {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Place(2, 1, "node5:29500", 1)),
        (MPI, Place(2, 1, "node5:29500")),
        (RANKS | {"WORLD_SIZE": "1", "RANK": "0"}, ALONE),
    ],
)
def test_places_that_launchers_give(environment, place):
    assert find_place(AUTO, environment) == place


def test_one_process_looks_at_no_variable():
    assert find_place(ProcessesConfig(), SLURM) == ALONE


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "has none of SLURM_PROCID, OMPI_COMM_WORLD_RANK, RANK: start the command with srun"),
        (SLURM | {"SLURM_NTASKS": "four"}, "SLURM_NTASKS is 'four': it must be a number"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST '' names no machine"),
        (RANKS | {"RANK": "2"}, "says process 2 of 2: numbers go from 0 to 1"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "the environment lacks MASTER_ADDR"),
        (RANKS | {"MASTER_ADDR": "a b"}, "the coordinator in the environment 'a b:29500' is no"),
    ],
)
def test_wrong_variables_are_named(environment, message):
    with pytest.raises(UserError, match=message):
        find_place(AUTO, environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[003,007-015],host2", "node003"),
        ("rack[1-2]-n4,host2", "rack1-n4"),
    ],
)
def test_the_first_machine_of_slurms_list(nodes, first):
    assert first_node(nodes) == first
