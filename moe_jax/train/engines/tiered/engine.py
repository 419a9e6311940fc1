"""A run whose experts live in tiers: what it refuses, how it starts, and how it is loaded again."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.config import TrainConfig, require
from moe_jax.placement.shelf import Shelf, as_parts
from moe_jax.train.checkpoint import EXPERTS
from moe_jax.train.engines.tiered.chunks import Sizes
from moe_jax.train.engines.tiered.rows import RowShapes, row_shapes
from moe_jax.train.engines.tiered.store import TieredExperts
from moe_jax.train.engines.tiered.trunk import assemble, init_trunk, with_experts
from moe_jax.train.step import TrainState, abstract_state


def visible_devices() -> int:
    """Devices of all processes."""
    return jax.device_count()


def check_tiers(config: TrainConfig) -> None:
    """Raises UserError for what cannot be trained with tiers."""
    model, budget = config.model, f"placement.device_budget={config.placement.device_budget}"
    require(
        model.moe_layers > 0,
        f"{budget} needs experts: model.dense_layers equals model.layers, a dense model",
    )
    require(
        config.optim.accumulation == 1,
        f"{budget} and optim.accumulation={config.optim.accumulation}: training with tiers takes "
        "the batch as a whole, set optim.accumulation to 1 and shrink batch",
    )
    require(
        visible_devices() == 1,
        f"{budget} and {visible_devices()} devices: training with tiers uses one device, hide the "
        "others (CUDA_VISIBLE_DEVICES)",
    )
    Sizes(config, row_shapes(config))


def abstract_trunk(config: TrainConfig) -> TrainState:
    """Shapes and dtypes of the state without the experts."""
    return jax.eval_shape(lambda: init_trunk(config))


def device_bytes(config: TrainConfig) -> int:
    """Bytes of the trunk's state and of the device budget's part that is used."""
    leaves = jax.tree.leaves(abstract_trunk(config))
    trunk = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    below = min(config.placement.host_bytes, shelf_bytes(config))
    own_host = jax.default_backend() == "cpu"  # then the device's memory is the host's
    return trunk + Sizes(config, row_shapes(config)).device + own_host * below


def shelf_bytes(config: TrainConfig) -> int:
    """Bytes of the experts on disk while the run goes on."""
    model = config.model
    return row_shapes(config).record_bytes * model.moe_layers * model.moe.experts


def shelf_folder(config: TrainConfig, out: Path) -> Path:
    """Where a run's shelf is: a folder of its own, also in a placement.folder that others use."""
    if not config.placement.folder:
        return out / "shelf"
    own = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]
    return Path(config.placement.folder) / f"shelf-{out.name}-{own}"


def open_experts(
    config: TrainConfig, out: Path, checkpoint: Path | None, updates: int
) -> TieredExperts:
    """The experts of a fresh run, or those of a checkpoint's folder, on a shelf made anew.

    What a killed run left of its shelf is scratch: checkpoints hold everything.
    """
    for unfinished in out.glob("experts-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    folder = shelf_folder(config, out)
    shutil.rmtree(folder, ignore_errors=True)
    experts = TieredExperts(config, folder)
    try:
        if checkpoint is None:
            experts.initialise()
        else:
            saved = Shelf.opened(checkpoint / EXPERTS)
            experts.restore(saved, updates)
            saved.close()
    except BaseException:
        experts.close()
        raise
    return experts


def save_experts(experts: TieredExperts, out: Path, step: int) -> Path:
    """Copies the experts as they are after `step` beside the checkpoints; returns the folder, which
    becomes part of the checkpoint when the rest of it is written (train.checkpoint)."""
    folder = out / f"experts-{step}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    experts.save(folder)
    return folder


def assembled(config: TrainConfig, trunk: TrainState, checkpoint: Path) -> TrainState:
    """The whole state, as the ordinary path would have it, from a checkpoint's two parts."""
    saved, shapes = Shelf.opened(checkpoint / EXPERTS), row_shapes(config)
    try:
        return assemble(abstract_state(config), trunk, _stacked(saved, shapes))
    finally:
        saved.close()


def _stacked(saved: Shelf, shapes: RowShapes) -> Callable[[str], list[Any]]:
    def rows(kind: str) -> list[Any]:
        own = shapes.moments if kind == "moments" else shapes.parameters
        stacked = [np.empty((saved.layers, saved.experts, *s.shape), s.dtype) for s in own]
        for layer in range(saved.layers):
            parts = as_parts([part[layer] for part in stacked])
            saved.read(kind, layer, np.arange(saved.experts), parts)
        return [jax.device_put(part) for part in stacked]

    return rows


def sampling_state(experts: TieredExperts, state: TrainState) -> TrainState | None:
    """`state` with the experts' parameters, for generate; None where these, beside what is on the
    device, are more than the device budget."""
    layers, number = experts.sizes.layers, experts.sizes.experts
    size = experts.shapes.parameter_bytes * layers * number + experts.sizes.device
    if size > experts.config.placement.device_bytes:
        return None
    everyone = np.arange(number)
    slabs = [[np.array(m) for m in experts.need(layer, everyone)] for layer in range(layers)]
    stacked = [jax.device_put(np.stack(parts)) for parts in zip(*slabs, strict=True)]
    return state._replace(parameters=with_experts(state.parameters, tuple(stacked)))
