"""Workers that share a PostgreSQL database and no folder, with a real server of the test's own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.stand_in import finish, rows, start_sweep

pytestmark = pytest.mark.slow
SEARCH = "--search model.moe.experts=8,16,32 --search optim.learning-rate=1e-3,2e-3"


def program(name: str) -> str | None:
    """A program of PostgreSQL, which Debian keeps outside the search path."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(debian[-1]) if debian else shutil.which(name)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Iterator[str]:
    """The address of an empty database."""
    pytest.importorskip("optuna")
    pytest.importorskip("psycopg")
    initdb = program("initdb")
    server = program("postgres")
    if initdb is None or server is None:
        pytest.skip("no PostgreSQL server is installed")
    folder = tmp_path_factory.mktemp("database")
    root = os.geteuid() == 0
    if root:  # the server refuses to run as root
        for path in (folder, *folder.parents[:2]):
            path.chmod(0o755)
        shutil.chown(folder, "nobody")
    user = "nobody" if root else None
    data = str(folder / "data")
    initialise = [initdb, "-D", data, "-U", "moe", "-A", "trust", "--no-sync", "-E", "UTF8"]
    subprocess.run(initialise, user=user, cwd=folder, check=True, capture_output=True)
    port = free_port()
    command = [server, "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-F"]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, user=user, cwd=folder, stdout=log, stderr=log)
    try:
        yield wait_for(f"postgresql://moe@127.0.0.1:{port}/postgres", process, folder / "log")
    finally:
        process.send_signal(signal.SIGINT)  # ends its connections first
        process.wait(30)
        log.close()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> str:
    import psycopg

    for _ in range(100):
        assert process.poll() is None, log.read_text()
        try:
            psycopg.connect(address).close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return address
    raise AssertionError(log.read_text())


@pytest.fixture
def machines(tmp_path) -> tuple[Path, Path]:
    """Two folders in place of two machines without a common disk."""
    folders = (tmp_path / "one", tmp_path / "other")
    for folder in folders:
        folder.mkdir()
    return folders


def wait_until(reached, worker: subprocess.Popen[str]) -> None:
    while not reached():
        assert worker.poll() is None, worker.communicate()
        time.sleep(0.02)


def test_machines_share_the_trials(database, machines):
    line = f"{SEARCH} --sampler grid --storage {database} --study share --optim.decay 0.3"
    workers = [start_sweep(folder, line) for folder in machines]
    said = [finish(worker) for worker in workers]
    tables = [rows(folder / "out") for folder in machines]
    assert [row["folder"] for row in tables[0]] == [f"trial-{n:04d}" for n in range(6)]
    assert len({(r["model.moe.experts"], r["optim.learning_rate"]) for r in tables[0]}) == 6
    assert all(row["state"] == "complete" for row in tables[0])
    ran = [{path.parent.name for path in f.glob("out/*/runs.txt")} for f in machines]
    assert ran[0] | ran[1] == {row["folder"] for row in tables[0]}
    assert not ran[0] & ran[1], "no trial ran on both"
    assert ran[0]
    assert ran[1]
    # Each reports the best trial, also where the other one ran it.
    for text in said:
        assert "experts=32, optim.learning_rate=1e-3 gave 0.03125 bits, the lowest of 6" in text
    runs = sum(len(list(folder.glob("out/*/runs.txt"))) for folder in machines)
    finish(start_sweep(machines[0], line))
    assert runs == sum(len(list(folder.glob("out/*/runs.txt"))) for folder in machines)


def test_the_trial_of_a_killed_worker_runs_on_another_machine(database, machines):
    line = f"--search batch=4,8 --sampler grid --storage {database} --study killed --optim.decay 1"
    worker = start_sweep(machines[0], line)
    runs = machines[0] / "out" / "trial-0000" / "runs.txt"
    wait_until(lambda: runs.exists() and "start" in runs.read_text(), worker)
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    finish(start_sweep(machines[1], line))
    table = rows(machines[1] / "out")
    assert sorted(row["batch"] for row in table) == ["4", "8"]
    assert all(row["state"] == "complete" for row in table)
    assert "end" in (machines[1] / "out" / "trial-0000" / "runs.txt").read_text()


def test_a_database_holds_many_sweeps_and_refuses_another_search_of_one_name(database, tmp_path):
    line = f"--search batch=4 --storage {database}"
    finish(start_sweep(tmp_path, f"{line} --study name"))
    finish(start_sweep(tmp_path, f"{line} --steps 9"))  # without a name it is its own
    said = finish(start_sweep(tmp_path, f"{line} --study name --steps 9"), code=2)
    assert "study name holds a sweep with arguments" in said
    assert "use another --study" in said
    assert said.count("\n") == 1


def test_a_database_that_is_not_there_is_one_line(database, tmp_path):
    address = f"postgresql://moe@127.0.0.1:{free_port()}/postgres"
    said = finish(start_sweep(tmp_path, f"--search batch=4 --storage {address}"), code=2)
    assert said.startswith(f"error: --storage {address}: ")
    assert said.count("\n") == 1
