"""The very step of a run, compiled for GPUs that are absent, with XLA's own account of its memory.

The program is that of train.engines: nothing of it is replaced. One program serves all devices, so
compiling takes as long for 2,048 GPUs as for 8.
"""

import dataclasses
import gzip
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import moe_kernels
from moe_kernels.launch import lowering_for, missing_package

import moe_jax
from moe_jax.base.console import working
from moe_jax.base.errors import UserError, require
from moe_jax.base.files import write_atomically
from moe_jax.base.machine import compiling_for, peak_resident_bytes
from moe_jax.config import TrainConfig, fields
from moe_jax.objectives.next_token import next_token
from moe_jax.parallel.exchange import exchanging
from moe_jax.parallel.mesh import AXES
from moe_jax.parallel.rules import device_bytes
from moe_jax.predict.absent import OPTIONS, absent_devices
from moe_jax.predict.hardware import Card
from moe_jax.train.engines import engine_kind
from moe_jax.train.engines.dense import DenseEngine

CUDNN = 91000
"""Version of cuDNN that a program is compiled for: 9.10."""
VERSION = 1
"""Of the files in the cache."""
UNUSED = ("out", "preset", "data.cache")
"""Settings that no program depends on."""
ABOVE = ("study", "predict", "cli.py", "runs", "audit", "bench", "soak", "first_gpu")
"""Folders that no program is made of."""


@dataclass(frozen=True)
class Compiled:
    """A compiled step, and what is known of it beside its text."""

    text: str
    """The scheduled program."""
    buffers: str
    """XLA's list of buffers with their places."""
    live: str
    """XLA's list of the buffers that are there at its peak."""
    arguments: int
    """Bytes of the state and the batch on each device."""
    temporaries: int
    """Bytes beside them."""
    outputs: int
    """Bytes of results that take no argument's place."""
    parameters: int
    """Bytes of the parameters on each device, a part of `arguments`."""
    optimizer: int
    """Bytes of the optimizer's moments on each device, a part of `arguments`."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the parameters on one device."""
    mesh: Mapping[str, int]
    """Sizes of the axes above 1, outermost first."""
    lower_seconds: float
    compile_seconds: float
    host_bytes: int
    """Largest size of the process that compiled."""


def compile_step(config: TrainConfig, card: Card, devices: int, folder: Path | None) -> Compiled:
    """The step of `config`, resolved, on so many cards. Programs are kept in `folder`.

    UserError: settings that the engine refuses, or that a program cannot show.
    """
    check_visible(config)
    with (
        lowering_for(card.arch),
        compiling_for(card.capability),
        assumed_cudnn(card.arch),
    ):
        kind = engine_kind(config)
        assert issubclass(kind, DenseEngine)  # check_visible has refused the others
        engine = kind(config, absent_devices(card, devices))
        engine.check()
        path = None if folder is None else folder / f"{program_hash(config, card, devices)}.json.gz"
        found = None if path is None else _read(path)
        if found is None:
            found = _compiled(engine)
            if path is not None:
                write_atomically(path, gzip.compress(json.dumps(_plain(found)).encode()))
    return found


def check_visible(config: TrainConfig) -> None:
    """UserError: a part of the run is not in the compiled program, or there is no program yet."""
    require(
        not config.placement.tiered,
        f"placement.device_budget={config.placement.device_budget}: experts in tiers move between "
        "host and device outside of the compiled program, which cannot show their time; unset it",
    )
    require(
        not config.distill.teacher,
        f"distill.teacher={config.distill.teacher}: a teacher is not in the program, unset it",
    )


@contextmanager
def assumed_cudnn(arch: int) -> Iterator[None]:
    """Lets JAX trace cuDNN's attention for the compute capability `arch` (times ten).

    JAX asks the device and the library that are here. XLA compiles it without either.
    """
    from jax._src.cudnn import fused_attention_stablehlo as attention

    answers: dict[str, Callable[..., Any]] = {
        "check_cudnn_version": lambda: CUDNN,
        "check_compute_capability": lambda least: arch >= round(10 * float(least)),
    }
    found = {name: getattr(attention, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(attention, name, answer)
        yield
    finally:
        for name, original in found.items():
            setattr(attention, name, original)


def _compiled(engine: DenseEngine) -> Compiled:
    state = engine.abstract_state()
    leaves = jax.tree.leaves(state.parameters)
    begin = time.perf_counter()
    with jax.set_mesh(engine.mesh), exchanging(engine.config.parallel.exchange):
        lowered = engine.lower(engine.abstract_batch(), next_token)
    lower_seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        options = {**OPTIONS, "xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        begin = time.perf_counter()
        with working("compiling for absent GPUs"):
            compiled: Any = lowered.compile(compiler_options=options)
        seconds = time.perf_counter() - begin
        buffers = _dumped(folder, "buffer-assignment")
        live = _dumped(folder, "live-range")
    memory = compiled.memory_analysis()
    assert memory is not None
    return Compiled(
        text=compiled.as_text(),
        buffers=buffers,
        live=live,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        parameters=device_bytes((state.parameters, state.router)),
        optimizer=device_bytes(state.optimizer),
        shapes=tuple({leaf.sharding.shard_shape(leaf.shape) for leaf in leaves}),
        mesh={axis: size for axis in AXES if (size := engine.mesh.shape[axis]) > 1},
        lower_seconds=lower_seconds,
        compile_seconds=seconds,
        host_bytes=peak_resident_bytes(),
    )


def _dumped(folder: str, name: str) -> str:
    found = sorted(Path(folder).glob(f"*jit_step*{name}.txt"))
    if not found:
        raise UserError(f"XLA wrote no {name}: this version of jaxlib is not known here")
    return found[-1].read_text()


def program_hash(config: TrainConfig, card: Card, devices: int) -> str:
    """Of all that the program comes from: sources, settings, versions, options and the card."""
    settings = {name: value for name, value in fields(config).items() if name not in UNUSED}
    versions = (VERSION, jax.__version__, CUDNN, missing_package())
    parts = (settings, versions, sorted(OPTIONS.items()), card.target, devices)
    return hashlib.sha256((repr(parts) + source_hash()).encode()).hexdigest()[:32]


@cache
def source_hash(above: tuple[str, ...] = ABOVE) -> str:
    """Of the sources that a step is made of: this package without `above`, and the kernels."""
    found = hashlib.sha256()
    for package in (moe_jax, moe_kernels):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            if path.relative_to(root).parts[0] not in above:
                found.update(path.read_bytes())
    return found.hexdigest()


def _plain(compiled: Compiled) -> dict[str, Any]:
    return {field.name: getattr(compiled, field.name) for field in dataclasses.fields(compiled)}


def _read(path: Path) -> Compiled | None:
    """A program from the cache. None: it is not there, or the file is damaged."""
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        shapes = tuple(map(tuple, content.pop("shapes")))
        return Compiled(**content, shapes=shapes)
    except (OSError, EOFError, ValueError, TypeError, KeyError):
        return None
