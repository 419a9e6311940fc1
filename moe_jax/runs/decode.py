"""Prepares a run for decoding with its experts in tiers, and opens the decoder within a budget.

RUN/decode holds one file of experts a layer (placement.files), the other parameters as
trunk.safetensors, and model.json with configuration, tokenizer and a hash of what it was written
from. model.json is written last. Without it, or with a damaged trunk, the folder counts as not
prepared. Experts are checked when they are read. Damaged ones are written again.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save

from moe_jax.base.console import say
from moe_jax.base.errors import UserError
from moe_jax.base.files import disk_errors, patiently, write_atomically
from moe_jax.base.hashes import digest_bytes
from moe_jax.config import DecodePlacement, ModelConfig, TrainConfig, from_dict, require
from moe_jax.config.checks import parse_bytes
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.model.trunk import without_experts
from moe_jax.moe.module import RouterBias
from moe_jax.placement.decode import TieredDecoder
from moe_jax.placement.files import ExpertFiles, Layer, write_experts
from moe_jax.placement.policy import make_policy
from moe_jax.placement.records.layout import DamagedError
from moe_jax.placement.save_experts import save_experts
from moe_jax.placement.store import ExpertStore
from moe_jax.runs.load import Trained, load_run, newest_step, run_folder
from moe_jax.train.checkpoint import FORMAT, MANIFEST, read_errors

TRUNK = "trunk.safetensors"
MODEL = "model.json"
LOW_BIT = "low-bit"
"""Folder inside RUN/decode with the experts in 8 bits."""


def prepare_decoding(run: str | Path, *, dtype: str = "", low_bit: bool = False) -> Path:
    """Writes RUN/decode for the run's newest checkpoint, unless it is there. Returns the folder.

    The experts are rounded to `dtype`, if given. The whole run is loaded into memory for this once,
    also one that was trained with tiers. If the newest checkpoint is damaged, the folder is that of
    an older one, until the newest is mended. UserError: no checkpoint, a dense model, or a disk
    that fails.
    """
    own = run_folder(run)
    folder = own / "decode"
    source = _source(own, newest_step(run), dtype)
    if not _is_prepared(folder, source):
        trained = load_run(run)
        source = _source(own, trained.step, dtype)
        if not _is_prepared(folder, source):
            _prepare(folder, trained, source)
    if low_bit and not _is_prepared(folder / LOW_BIT, source):
        _prepare_low_bit(folder, source)
    return folder


def _open_experts(folder: Path) -> ExpertFiles:
    """The experts in RUN/decode or RUN/decode/low-bit, written again where they are damaged.

    UserError: the checkpoint that they are from is damaged as well, or gone.
    """
    source = json.loads((folder / MODEL).read_bytes())["source"]

    def remake(fault: str) -> None:
        if folder.name == LOW_BIT:
            say(f"{fault}: the 8-bit copies are written again")
            _prepare_low_bit(folder.parent, source)
        else:
            say(f"{fault}: the experts are written again from the checkpoint")
            _prepare_again(folder, source)

    def opened() -> ExpertFiles:
        return ExpertFiles(folder, remake=remake, remedy=f"remove {folder}, it is written again")

    try:
        return opened()
    except DamagedError as error:
        remake(error.fault)
        return opened()


def _prepare(folder: Path, trained: Trained, source: list[Any]) -> None:
    require(
        trained.config.model.moe_layers > 0,
        f"{folder.parent} is a dense model (dense_layers equals layers): it has no experts to "
        "place",
    )
    # First, so that a kill on the way leaves a folder that counts as not prepared.
    for description in (folder / MODEL, folder / LOW_BIT / MODEL):
        description.unlink(missing_ok=True)
    dtype = source[-1]
    save_experts(folder, trained.state.parameters, dtype=dtype or None)
    trunk = save(_flat(trained.state))
    with disk_errors(folder):
        write_atomically(folder / TRUNK, trunk)
    description = {
        "source": source,
        "trunk": digest_bytes(trunk),
        "config": asdict(trained.config),
        "tokenizer": trained.tokenizer.to_json(),
    }
    _write_description(folder, description)


def _prepare_again(folder: Path, source: list[Any]) -> None:
    """As _prepare, from the checkpoint that the folder was written from."""
    trained = load_run(folder.parent)
    if _source(folder.parent, trained.step, source[-1]) != source:
        # Only now, because there is a checkpoint that the next start can prepare.
        (folder / MODEL).unlink(missing_ok=True)
        raise UserError(
            f"{folder} is damaged, and step {source[1]} that it was written from is damaged or "
            f"gone: the same command takes step {trained.step}"
        )
    _prepare(folder, trained, source)


def _prepare_low_bit(folder: Path, source: list[Any]) -> None:
    with closing(_open_experts(folder)) as files:
        write_experts(folder / LOW_BIT, _read_all(files), low_bit=True)
    _write_description(folder / LOW_BIT, {"source": source})


def _source(run: Path, step: int, dtype: str) -> list[Any]:
    """What a folder is prepared from: the checkpoint, by its manifest, and the experts' dtype."""
    with read_errors(run):
        manifest = patiently((run / "checkpoints" / str(step) / MANIFEST).read_bytes)
    return [FORMAT, step, digest_bytes(manifest), dtype]


def _is_prepared(folder: Path, source: list[Any]) -> bool:
    """Whether the folder was written from `source`, and its description and trunk are whole."""
    try:
        description = json.loads((folder / MODEL).read_bytes())
        seal = description.pop("seal")
        if seal != _seal(description) or description["source"] != source:
            return False
        trunk = description.get("trunk")  # a folder of 8-bit copies has none
        return trunk is None or trunk == digest_bytes((folder / TRUNK).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    with disk_errors(folder):
        content = json.dumps(description | {"seal": _seal(description)})
        write_atomically(folder / MODEL, content)


def _seal(description: dict[str, Any]) -> str:
    return digest_bytes(json.dumps(description, sort_keys=True).encode())


def _read_all(files: ExpertFiles) -> Iterator[Layer]:
    for layer in range(files.layers):
        experts = [
            [matrix.copy() for matrix in files.read(layer, expert)]  # `read` reuses its buffer
            for expert in range(files.experts)
        ]
        gate_up, down = zip(*experts, strict=True)
        yield np.stack(gate_up), np.stack(down)


def _flat(state: Any) -> dict[str, np.ndarray]:
    """All parameters except the experts', and the router biases, by their dotted names."""
    arrays = {}
    for part in (without_experts(state.parameters), state.router):
        for path, leaf in nnx.to_flat_state(part):
            arrays[".".join(map(str, path))] = np.ascontiguousarray(leaf[...])
    return arrays


class Decodable(NamedTuple):
    """The contents of RUN/decode except the experts."""

    config: TrainConfig
    model: ModelConfig
    parameters: nnx.State
    router: nnx.State
    tokenizer: Tokenizer


def load_decodable(folder: Path) -> Decodable:
    """The trunk of a prepared run, in memory."""
    description = json.loads((folder / MODEL).read_text())
    config = from_dict(TrainConfig, description["config"])
    parameters = []
    router = []
    with safe_open(folder / TRUNK, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            path = tuple(name.split("."))
            value = jnp.asarray(file.get_tensor(name))
            if path[-2:] == ("moe", "bias"):
                router.append((path, RouterBias(value)))
            else:
                parameters.append((path, nnx.Param(value)))
    return Decodable(
        config,
        config.model,
        nnx.from_flat_state(parameters),
        nnx.from_flat_state(router),
        Tokenizer.from_json(description["tokenizer"]),
    )


def open_decoder(
    run: str | Path, placement: DecodePlacement, *, batch: int = 1
) -> tuple[TieredDecoder, Decodable]:
    """A decoder for `batch` rows, with the run's experts placed within the budgets.

    Use its store as a context manager. UserError: a budget below one layer's working set, and the
    errors of prepare_decoding.
    """
    low_bit = placement.low_bit_share > 0
    folder = prepare_decoding(run, dtype=placement.dtype, low_bit=low_bit)
    files = _open_experts(folder)
    decodable = load_decodable(folder)
    model = decodable.model
    layers = model.moe_layers
    experts = files.experts
    # Without a device budget all experts have room. Without a host budget none are kept there.
    all_bytes = layers * experts * files.expert_bytes
    device_bytes = parse_bytes("placement.device_budget", placement.device_budget or str(all_bytes))
    host_bytes = parse_bytes("placement.host_budget", placement.host_budget or "0")
    # Negative: as many experts ahead as there are rows.
    ahead = placement.look_ahead if placement.look_ahead >= 0 else batch
    store = ExpertStore(
        files,
        make_policy(placement.policy, layers * experts, layers),
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        working_set=min(experts, batch * model.moe.slots),
        look_ahead=ahead,
        scope="quota",
        on_miss=placement.on_miss,
        low_bit=_open_experts(folder / LOW_BIT) if low_bit else None,
        low_bit_share=placement.low_bit_share,
    )
    decoder = TieredDecoder(
        model, decodable.parameters, decodable.router, store, look_ahead=ahead > 0
    )
    return decoder, decodable
