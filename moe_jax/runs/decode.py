"""A run made ready for decoding with its experts in tiers, in as little memory as it is given.

RUN/decode holds a file of experts a layer (placement.files), the other parameters as
trunk.safetensors, and, written last, model.json: configuration, tokenizer and step.
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
from moe_jax.moe.module import RouterBias
from moe_jax.placement.decode import TieredDecoder, save_experts
from moe_jax.placement.files import ExpertFiles, Layer, write_experts
from moe_jax.placement.policy import make_policy
from moe_jax.placement.store import ExpertStore
from moe_jax.runs.load import load_run, newest_step
from moe_jax.train.engines.tiered.trunk import without_experts

TRUNK = "trunk.safetensors"
MODEL = "model.json"
LOW_BIT = "low-bit"


def prepare_decoding(run: str | Path, *, dtype: str = "", low_bit: bool = False) -> Path:
    """RUN/decode for the run's newest checkpoint, written unless it is there; the experts rounded
    to `dtype`, if given.

    An ordinary run is loaded as a whole for this, once; one that was trained with tiers too.
    UserError: no checkpoint, a dense model, or a disk that fails.
    """
    folder = Path(run) / "decode"
    wanted = (newest_step(run), dtype)
    if _prepared(folder) != wanted:
        for about in (folder / MODEL, folder / LOW_BIT / MODEL):
            about.unlink(missing_ok=True)
        trained = load_run(run)
        require(
            trained.config.model.moe_layers > 0,
            f"{run} is a dense model (dense_layers equals layers): it has no experts to place",
        )
        save_experts(folder, trained.state.parameters, dtype=dtype or None)
        with disk_errors(folder):
            write_atomically(folder / TRUNK, save(_flat(trained.state)))
            facts = {
                "step": wanted[0],
                "dtype": dtype,
                "loaded": trained.step,  # an older one, if the newest was damaged
                "config": asdict(trained.config),
                "tokenizer": trained.tokenizer.to_json(),
            }
            write_atomically(folder / MODEL, json.dumps(facts))
    if low_bit and _prepared(folder / LOW_BIT) != wanted:
        files = ExpertFiles(folder)
        write_experts(folder / LOW_BIT, _read_all(files), low_bit=True)
        files.close()
        about = {"step": wanted[0], "dtype": dtype}
        write_atomically(folder / LOW_BIT / MODEL, json.dumps(about))
    return folder


def _prepared(folder: Path) -> tuple[int, str] | None:
    """(step, dtype of the experts) that the folder was written for."""
    try:
        about = json.loads((folder / MODEL).read_text())
        return about["step"], about["dtype"]
    except (OSError, ValueError, KeyError):
        return None


def _read_all(files: ExpertFiles) -> Iterator[Layer]:
    for layer in range(files.layers):
        experts = [
            [matrix.copy() for matrix in files.read(layer, expert)]
            for expert in range(files.experts)
        ]
        gate_up, down = zip(*experts, strict=True)
        yield np.stack(gate_up), np.stack(down)


def _flat(state: Any) -> dict[str, np.ndarray]:
    """Parameters but the experts', and the router's biases, by their dotted names."""
    found = {}
    for part in (without_experts(state.parameters), state.router):
        for path, leaf in nnx.to_flat_state(part):
            found[".".join(map(str, path))] = np.ascontiguousarray(leaf[...])
    return found


class Decodable(NamedTuple):
    """What RUN/decode holds besides the experts."""

    config: TrainConfig
    model: ModelConfig
    parameters: nnx.State
    router: nnx.State
    tokenizer: Tokenizer


def load_decodable(folder: Path) -> Decodable:
    """The trunk of a prepared run, in memory."""
    about = json.loads((folder / MODEL).read_text())
    config = from_dict(TrainConfig, about["config"])
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
        Tokenizer.from_json(about["tokenizer"]),
    )


def open_decoder(
    run: str | Path, placement: DecodePlacement, *, batch: int = 1
) -> tuple[TieredDecoder, Decodable]:
    """A decoder of `batch` rows with the run's experts placed as asked for. Use its store as a
    context. UserError: a budget below one layer's working set, and as prepare_decoding."""
    low_bit = placement.low_bit_share > 0
    folder = prepare_decoding(run, dtype=placement.dtype, low_bit=low_bit)
    decodable = load_decodable(folder)
    files = ExpertFiles(folder)
    layers = decodable.model.moe_layers
    experts = files.experts
    slots = decodable.model.moe.slots
    everything = layers * experts * files.expert_bytes
    sizes = {
        name: parse_bytes(f"placement.{name}", getattr(placement, name) or otherwise)
        for name, otherwise in (("device_budget", str(everything)), ("host_budget", "0"))
    }
    ahead = placement.look_ahead if placement.look_ahead >= 0 else batch
    store = ExpertStore(
        files,
        make_policy(placement.policy, layers * experts, layers),
        device_bytes=sizes["device_budget"],
        host_bytes=sizes["host_budget"],
        working_set=min(experts, batch * slots),
        look_ahead=ahead,
        scope="quota",
        on_miss=placement.on_miss,
        low_bit=ExpertFiles(folder / LOW_BIT) if low_bit else None,
        low_bit_share=placement.low_bit_share,
    )
    decoder = TieredDecoder(
        decodable.model,
        decodable.parameters,
        decodable.router,
        store,
        look_ahead=ahead > 0,
    )
    return decoder, decodable
