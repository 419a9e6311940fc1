"""Prepares a run for decoding with its experts in tiers, and opens the decoder within a budget.

RUN/decode holds one file of experts a layer (placement.files), the other parameters as
trunk.safetensors, and model.json with configuration, tokenizer and step. model.json is written
last. Without it the folder counts as not prepared.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save

from moe_jax.base.files import disk_errors, write_atomically
from moe_jax.config import DecodePlacement, ModelConfig, TrainConfig, from_dict, require
from moe_jax.config.checks import parse_bytes
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.model.trunk import without_experts
from moe_jax.moe.module import RouterBias
from moe_jax.placement.decode import TieredDecoder
from moe_jax.placement.files import ExpertFiles, Layer, write_experts
from moe_jax.placement.policy import make_policy
from moe_jax.placement.save_experts import save_experts
from moe_jax.placement.store import ExpertStore
from moe_jax.runs.load import load_run, newest_step, run_folder
from moe_jax.train.checkpoint import FORMAT

TRUNK = "trunk.safetensors"
MODEL = "model.json"
LOW_BIT = "low-bit"
"""Folder inside RUN/decode with the experts in 8 bits."""


def prepare_decoding(run: str | Path, *, dtype: str = "", low_bit: bool = False) -> Path:
    """Writes RUN/decode for the run's newest checkpoint, unless it is there. Returns the folder.

    The experts are rounded to `dtype`, if given. The whole run is loaded into memory for this once,
    also one that was trained with tiers. UserError: no checkpoint, a dense model, or a disk that
    fails.
    """
    folder = run_folder(run) / "decode"
    wanted = (newest_step(run), dtype)
    if _prepared(folder) != wanted:
        # First, so that a kill on the way leaves a folder that counts as not prepared.
        for description in (folder / MODEL, folder / LOW_BIT / MODEL):
            description.unlink(missing_ok=True)
        trained = load_run(run)
        require(
            trained.config.model.moe_layers > 0,
            f"{run} is a dense model (dense_layers equals layers): it has no experts to place",
        )
        save_experts(folder, trained.state.parameters, dtype=dtype or None)
        with disk_errors(folder):
            write_atomically(folder / TRUNK, save(_flat(trained.state)))
            description = {
                "format": FORMAT,
                "step": wanted[0],
                "dtype": dtype,
                "loaded": trained.step,  # an older one, if the newest was damaged
                "config": asdict(trained.config),
                "tokenizer": trained.tokenizer.to_json(),
            }
            write_atomically(folder / MODEL, json.dumps(description))
    if low_bit and _prepared(folder / LOW_BIT) != wanted:
        files = ExpertFiles(folder)
        write_experts(folder / LOW_BIT, _read_all(files), low_bit=True)
        files.close()
        description = {"format": FORMAT, "step": wanted[0], "dtype": dtype}
        write_atomically(folder / LOW_BIT / MODEL, json.dumps(description))
    return folder


def _prepared(folder: Path) -> tuple[int, str] | None:
    """(step, dtype of the experts) that the folder was written for. None: it is incomplete."""
    try:
        description = json.loads((folder / MODEL).read_text())
        # A folder of another format is written anew, from a checkpoint whose format is checked.
        if description["format"] != FORMAT:
            return None
        return description["step"], description["dtype"]
    except (OSError, ValueError, KeyError):
        return None


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
    decodable = load_decodable(folder)
    files = ExpertFiles(folder)
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
        low_bit=ExpertFiles(folder / LOW_BIT) if low_bit else None,
        low_bit_share=placement.low_bit_share,
    )
    decoder = TieredDecoder(
        model, decodable.parameters, decodable.router, store, look_ahead=ahead > 0
    )
    return decoder, decodable
