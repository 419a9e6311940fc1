"""Routing traces that others record, read as ours.

| source | form |
|---|---|
| vLLM, `--enable-return-routed-experts` | an array [tokens, layers, K], saved as .npy |
| Megatron-Core, `--moe-routing-trace-path` | .jsonl, a record a (step, block, layer) |
| FLAME-MoE routing traces (arXiv:2505.20225) | a folder of layer_NN.parquet, a row a token |
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.base.errors import UserError
from moe_jax.config import require
from moe_jax.placement.trace import Trace, read_trace

LIMIT = 1_000_000
"""Most tokens read of a folder, whose layers hold many more than a replay needs."""


def open_trace(path: Path, experts: int = 0) -> Trace:
    """The trace in a file or folder, whichever of the known forms it has. Other names are ours.

    `experts`: how many a layer has. 0 means the highest number that occurs, and one more.
    UserError: it cannot be read as what its name says.
    """
    readers = {".npy": _array, ".jsonl": _megatron}
    try:
        if path.is_dir():
            chosen = _parquet(path)
        elif path.suffix in readers:
            chosen = readers[path.suffix](path)
        else:
            return read_trace(path)
    except OSError as error:
        raise UserError(f"cannot read the trace {path}: {error.strerror or error}") from error
    require(
        chosen.ndim == 3 and chosen.size > 0,
        f"{path} holds an array of shape {chosen.shape}, not [tokens, layers, K]",
    )
    require(
        int(chosen.min()) >= 0, f"{path} names expert {chosen.min()}: experts are numbered from 0"
    )
    experts = experts or int(chosen.max()) + 1
    require(experts < 2**16, f"a trace holds up to 65535 experts, {path} names {experts - 1}")
    label = np.zeros(len(chosen), np.int16)
    return Trace(chosen.astype(np.uint16), label, experts, ("text",), path.name)


def _array(path: Path) -> np.ndarray:
    try:
        chosen = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path} is no array that NumPy saved: {error}") from error
    require(chosen.dtype.kind in "iu", f"{path} holds {chosen.dtype}, not expert numbers")
    return chosen


def _megatron(path: Path) -> np.ndarray:
    """Records of the decoder, tokens in the order of their steps. A step without all layers, as a
    killed run leaves it, is passed over."""
    steps: dict[Any, dict[int, list]] = defaultdict(dict)
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            if record.get("block", "decoder") == "decoder" and "mtp_idx" not in record:
                steps[record["step"]][int(record["layer"])] = record["top_indices"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number} is no record of a router trace (step, layer, top_indices)"
            ) from error
    require(len(steps) > 0, f"{path} has no records of a decoder")
    layers = sorted(set().union(*steps.values()))
    whole = [step for _, step in sorted(steps.items()) if sorted(step) == layers]
    try:
        parts = [
            np.stack([np.asarray(step[n], np.int64) for n in layers], axis=1) for step in whole
        ]
        return np.concatenate(parts)
    except ValueError as error:
        raise UserError(f"{path}: layers of one step have different tokens: {error}") from error


def _parquet(folder: Path) -> np.ndarray:
    paths = sorted(folder.glob("layer_*.parquet"))
    require(len(paths) > 0, f"{folder} holds no layer_NN.parquet")
    try:
        import pyarrow as arrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{folder}: reading parquet needs pip install pyarrow") from error
    layers = []
    for path in paths:
        rows: list[np.ndarray] = []
        try:
            for batch in ParquetFile(path).iter_batches(columns=["indices"]):
                lists = batch.column(0)
                rows.append(np.asarray(lists.flatten()).reshape(len(lists), -1))
                if sum(map(len, rows)) >= LIMIT:
                    break
        except (arrow.ArrowInvalid, KeyError, ValueError) as error:
            raise UserError(f"{path} has no column of expert indices: {error}") from error
        layers.append(np.concatenate(rows)[:LIMIT])
    shapes = {layer.shape for layer in layers}
    require(len(shapes) == 1, f"the layers in {folder} are not alike: {sorted(shapes)}")
    return np.stack(layers, axis=1)
