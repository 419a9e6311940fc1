"""What all trials share: text, compiled programs, undisturbed runs, and copies of stopped runs."""

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.campaign.server import Program, Server
from tests.campaign.shim import Call, Faults, build, read_log

STEPS = 12
EVERY = 3
LIMIT = 180
"""Seconds after which a program counts as hanging."""
TRAIN = "experiments/train.py"
SIZES = (
    *("--model.width", "20", "--model.layers", "1", "--model.dense-layers", "0"),
    *("--model.moe.experts", "6", "--model.moe.experts-per-token", "2"),
    *("--model.moe.expert-hidden", "14", "--model.attention.heads", "4"),
    *("--model.attention.kv-heads", "2", "--model.attention.head-dim", "8"),
)
LENGTH = (
    *("--steps", str(STEPS), "--batch", "2", "--samples", "0", "--evaluate-every", "6"),
    *("--checkpoint.every", str(EVERY), "--checkpoint.keep", "3", "--data.length", "48"),
    *("--data.tokenizer", "bytes", "--data.validation-fraction", "0.3"),
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "tiered": ("--placement.device-budget", "130kB"),
    "student": ("--distill.teacher", "TEACHER", "--distill.alpha", "0.5"),
    "cached student": ("--distill.teacher", "TEACHER", "--distill.cache", "samples:4"),
}
"""Kinds of runs, by the options that they add."""


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to."""

    folder: Path
    """It holds run/ and cache/."""
    losses: dict[int, tuple[float, float]]
    digest: dict[str, Any]
    calls: list[Call]
    """Its calls on its files, with paths relative to `folder`."""


@dataclass
class Bench:
    """The folder of a campaign, with the process that starts its programs."""

    folder: Path
    server: Server
    library: Path | None
    _runs: dict[str, Undisturbed] = field(default_factory=dict)

    @cached_property
    def texts(self) -> Path:
        """Eight small files."""
        texts = self.folder / "texts"
        texts.mkdir()
        for index in range(8):
            lines = [f"def f{index}_{n}(x):\n    return x + {n}" for n in range(60)]
            (texts / f"module{index}.py").write_text("\n".join(lines))
        return texts

    @cached_property
    def teacher(self) -> Path:
        """A dense run of six steps."""
        place = self.folder / "teacher"
        remove(place)
        place.mkdir()
        dense = ("--model.dense-layers", "1", "--model.dense-hidden", "24", "--steps", "6")
        self.finish(place, [*self.options("plain", place), *dense])
        return place / "run"

    def options(self, variant: str, place: Path) -> list[str]:
        """The command line of a run in place/run with its caches in place/cache."""
        own = list(VARIANTS[variant])
        if "TEACHER" in own:
            own[own.index("TEACHER")] = str(self.teacher)
        source = f"files:{self.texts}/*.py"
        folders = ["--data.source", source, "--data.cache", f"{place}/cache"]
        return [*LENGTH, *SIZES, *folders, *own, "--out", f"{place}/run"]

    def start(
        self,
        place: Path,
        options: Sequence[str],
        faults: Faults | None = None,
        script: str = TRAIN,
    ) -> Program:
        """Starts a script. Its output goes to numbered files beside `place`, which may be full."""
        outputs = programs(place)
        outputs.mkdir(exist_ok=True)
        number = len(list(outputs.glob("*.out")))
        settings = faults.environment() if faults else {}
        return self.server.start(script, options, outputs / f"program{number}", settings)

    def finish(
        self,
        place: Path,
        options: Sequence[str],
        faults: Faults | None = None,
        script: str = TRAIN,
    ) -> Program:
        """Runs a script to its end, which must be a good one."""
        program = self.start(place, options, faults, script).wait(LIMIT)
        said = program.error_output()[-2000:]
        assert program.code == 0, f"an undisturbed start ended with {program.code}: {said}"
        return program

    def run(self, variant: str) -> Undisturbed:
        """The undisturbed run of a variant."""
        if variant not in self._runs:
            place = self.folder / "undisturbed" / variant.replace(" ", "-")
            remove(place)  # of a start that failed
            place.mkdir(parents=True)
            log = place / "calls"
            self.finish(place, self.options(variant, place), watch(place, log))
            self._runs[variant] = Undisturbed(
                folder=place,
                losses=losses(place / "run"),
                digest=self.digest(place),
                calls=relative_calls(log, place),
            )
        return self._runs[variant]

    def digest(self, place: Path) -> dict[str, Any]:
        """Step and hashes of the newest checkpoint of place/run."""
        program = self.start(place, [str(place / "run")], script="tests/campaign/digest.py")
        said = program.wait(LIMIT).output()
        error = program.error_output()[-500:]
        assert program.code == 0, f"the checkpoint of a run with rc 0 does not load: {error}"
        line = next(x for x in said.splitlines() if x.startswith("digest "))
        return json.loads(line.removeprefix("digest "))

    @contextmanager
    def trial_folder(self, name: str) -> Iterator[Path]:
        """A new folder. It stays if the block fails."""
        place = self.folder / "trials" / name
        remove(place)
        remove(programs(place))
        place.mkdir(parents=True)
        yield place
        remove(place)
        remove(programs(place))

    def stopped(self, variant: str, place: Path, newest: int, report: bool = False) -> list[str]:
        """Puts a copy of the run, as a kill after checkpoint `newest` leaves it, into `place`.

        With `report`, a copy of the finished run if `newest` is the last. Returns the command line
        that continues it.
        """
        whole = self.run(variant)
        for name in ("run", "cache"):
            shutil.copytree(whole.folder / name, place / name, symlinks=True)
        run = place / "run"
        for step in range(newest + 1, STEPS + 1):
            shutil.rmtree(run / "checkpoints" / str(step), ignore_errors=True)
        if not report or newest < STEPS:
            for name in ("plots", "samples.txt", "result.json"):
                remove(run / name)
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[: min(newest + 1, STEPS)]))
        return self.options(variant, place)


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """A bench in an empty folder. Its programs share one cache of compiled programs."""
    folder = folder.resolve()
    library = build(folder)
    environment = {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # without it programs restart themselves
        "XDG_CACHE_HOME": str(folder / "home-cache"),
    }
    with Server(library, environment) as server:
        yield Bench(folder, server, library)


def programs(place: Path) -> Path:
    """The folder with the outputs of the programs that were started for a trial."""
    return place.with_name(f"{place.name}.programs")


def watch(place: Path, log: Path) -> Faults:
    """No faults, but a log of the calls on place/run and place/cache."""
    return Faults(path=f"{place}/[rc][ua]*", log=str(log))


def relative_calls(log: Path, place: Path) -> list[Call]:
    """The calls in a log, with paths relative to `place`."""
    start = f"{place}/"
    return [Call(c.group, c.path.removeprefix(start), c.library, c.fault) for c in read_log(log)]


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step in metrics.jsonl, without lines that are no JSON."""
    found = {}
    path = run / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            x = json.loads(line)
            found[int(x["step"])] = (x["loss"], x["gradient_norm"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def remove(path: Path) -> None:
    """Removes a file or folder that may be missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def choice(
    rng: random.Random, calls: Sequence[Call], without: tuple[str, ...] = ()
) -> tuple[str, int]:
    """A random call: its group, and how many of the group come before it.

    Every group is as likely as any other, though a run makes ten times more calls of some.
    """
    groups = sorted({call.group for call in calls} - set(without))
    group = rng.choice(groups)
    return group, rng.randrange(sum(call.group == group for call in calls))
