"""Whole layers of experts: drawn for a fresh run, copied from a checkpoint, or exchanged."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import TrainConfig
from moe_jax.placement.records.store import RecordStore
from moe_jax.train.engines.tiered.chunks import KINDS, Residents
from moe_jax.train.engines.tiered.row_io import RowIO
from moe_jax.train.engines.tiered.trunk import init_experts


def initialise(config: TrainConfig, rows: RowIO, residents: list[Residents]) -> None:
    """The parameters of a fresh model, a layer at a time. Moments stay zero."""
    # The layer is traced, so that one program draws all layers.
    make = jax.jit(init_experts, static_argnums=0)
    for layer, own in enumerate(residents):
        matrices = [np.asarray(m) for m in make(config, jnp.int32(layer))]
        own.load("parameters", [m[own.ids] for m in matrices])
        cold = np.setdiff1d(np.arange(len(matrices[0])), own.ids)
        rows.write("parameters", layer, cold, [m[cold] for m in matrices])


def restore(saved: RecordStore, rows: RowIO, residents: list[Residents]) -> None:
    """The experts of a checkpoint, a layer at a time."""
    for layer, own in enumerate(residents):
        for kind in ("parameters", "moments"):
            own.load(kind, _copy(saved, rows, kind, layer, own.ids))


def _copy(
    saved: RecordStore, rows: RowIO, kind: str, layer: int, resident_ids: np.ndarray
) -> list[np.ndarray]:
    """Copies a layer's rows to the tiers below, but returns those of `resident_ids`."""
    source = rows.over(saved)
    kept = rows.blank(kind, len(resident_ids))
    for ids in rows.chunks(np.arange(saved.experts)):
        arrays = [part[: len(ids)] for part in source.read(kind, layer, ids)]
        resident = np.isin(ids, resident_ids)
        rows.write(kind, layer, ids[~resident], [part[~resident] for part in arrays])
        for part, new in zip(kept, arrays, strict=True):
            part[np.isin(resident_ids, ids)] = new[resident]
    return kept


def exchange(rows: RowIO, layer: int, before: Residents, after: Residents) -> None:
    """Fills the new residents of a layer, and writes the experts that leave to the tiers below.

    Experts that stay are copied from the old residents, the others are read from below. Nothing may
    be in transfer.
    """
    stays = np.isin(after.ids, before.ids)
    leaves = ~np.isin(before.ids, after.ids)
    for kind in KINDS:
        old = before.on_host(kind)
        new = rows.blank(kind, len(after.ids))
        rows.write(kind, layer, before.ids[leaves], [part[leaves] for part in old])
        for part, own in zip(new, old, strict=True):
            part[stays] = own[~leaves]
        for places in rows.chunks(np.flatnonzero(~stays)):
            arrays = rows.read(kind, layer, after.ids[places])
            for part, arrived in zip(new, arrays, strict=True):
                part[places] = arrived[: len(places)]
        after.load(kind, new)
