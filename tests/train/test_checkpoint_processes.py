"""A checkpoint that two processes wrote: one manifest, and restored in one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moe_jax.base.errors import UserError
from moe_jax.config import CheckpointConfig
from moe_jax.parallel.processes.start import free_port
from moe_jax.train.checkpoint import MANIFEST, Checkpoints
from moe_jax.train.checkpoint.manifest import manifest_fault, read_manifest
from tests.train.checkpoint_worker import VALUES

HERE = SingleDeviceSharding(jax.devices()[0])
WORKER = Path(__file__).with_name("checkpoint_worker.py")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder after both processes have ended well."""
    folder = tmp_path_factory.mktemp("two")
    port = free_port()
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.checkpoint_worker", str(folder), f"{port}", f"{i}"],
            env=environment,
            cwd=WORKER.parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in (0, 1)
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert printed == ["", ""], "neither is louder than a process alone"
    return folder


def like(sharding, **changed):
    return {
        name: jax.ShapeDtypeStruct(value.shape, jnp.float32, sharding=sharding)
        for name, value in VALUES.items()
    } | changed


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=HERE)


def restore(folder, wanted):
    said = []
    saved = Checkpoints(folder, CheckpointConfig())
    try:
        return saved.restore(wanted, said.append), said
    finally:
        saved.close()


def test_one_manifest_names_the_parts_of_both(written):
    steps = [p for p in (written / "checkpoints").iterdir() if p.name.isdigit()]
    assert sorted(p.name for p in steps) == ["2", "3"]
    for step in steps:
        assert manifest_fault(step) is None
        names = read_manifest(step)
        assert sum(name.startswith("state/split/") for name in names) == 3  # .zarray and 2 parts
        assert len(list(step.rglob(MANIFEST))) == 1


@pytest.mark.parametrize("devices", [1, 2])
def test_one_process_restores_it_on_its_own_devices(written, devices):
    mesh = jax.make_mesh((devices,), ("y",), devices=jax.devices()[:devices])
    found, said = restore(written, like(NamedSharding(mesh, P())))
    assert said == []
    assert found.step == 3
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found.state[name], 3 * value)


def test_a_lost_part_of_one_process_is_a_damaged_checkpoint(written, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    parts = sorted((folder / "checkpoints/3/state/split").glob("[0-9]*"))
    parts[1].unlink()
    found, (line,) = restore(folder, like(HERE))
    assert line.startswith("checkpoint 3 is damaged (state/split/")
    assert found.step == 2


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"new": array(2)}, "it has no new"),
        (
            {"split": array(4, 7)},
            r"its split is float32\[4, 6\], and .*\[4, 7\]",
        ),
        (
            {"whole": array(5, dtype=jnp.bfloat16)},
            r"its whole is float32\[5\], and .* bfloat16",
        ),
        ({"whole": None}, "it has whole, and this run has not"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_refused_by_name(written, tmp_path, changed, reason):
    """And never filled with fresh values, cast, cut or left out."""
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    with pytest.raises(UserError, match=f"no checkpoint in .* can be used: {reason}"):
        restore(folder, like(HERE, **changed))
