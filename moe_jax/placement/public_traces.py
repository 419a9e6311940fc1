"""Routing traces that others record, read as ours.

| source | form |
|---|---|
| vLLM, `--enable-return-routed-experts` | an array [tokens, layers, K], saved as .npy |
| Megatron-Core, `--moe-routing-trace-path` | .jsonl, a record a (step, block, layer) |
| FLAME-MoE routing traces (arXiv:2505.20225) | a folder of layer_NN.parquet, a row a token |
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.base.errors import UserError, brief, quote, reading, require
from moe_jax.base.paths import file_size
from moe_jax.placement.trace import MOST_BYTES, Trace, read_trace

LIMIT = 1_000_000
"""Most tokens read of a folder, whose layers hold many more than a replay needs."""
MOST_LINE = 32 << 20
"""Bytes of one record. Python needs about twenty times as much for its numbers."""
BATCH_NUMBERS = 1 << 20
"""Expert numbers of a parquet file in memory at a time, beside those that are kept."""
NUMBERS = MOST_BYTES // 2
"""Most expert numbers of a trace, which has them as uint16."""


def open_trace(path: Path, experts: int = 0) -> Trace:
    """The trace in a file or folder, whichever of the known forms it has. Other names are ours.

    `experts`: how many a layer has. 0 means the highest number that occurs, and one more.
    UserError: it cannot be read as what its name says, or is larger than MOST_BYTES.
    """
    readers = {".npy": _array, ".jsonl": _megatron}
    read = _parquet if path.is_dir() else readers.get(path.suffix)
    if read is None:
        return read_trace(path)
    with reading(path):
        chosen = read(path)
        require(
            chosen.ndim == 3 and chosen.size > 0,
            f"holds an array of shape {quote(chosen.shape)}, not [tokens, layers, K]",
        )
        _require_few(chosen.size)
        low = int(chosen.min())
        highest = int(chosen.max())
        require(low >= 0, f"names expert {low}: experts are numbered from 0")
        require(highest < 2**16, f"a trace holds up to 65535 experts, this one names {highest}")
        label = np.zeros(len(chosen), np.int16)
        experts = experts or highest + 1
        return Trace(chosen.astype(np.uint16), label, experts, ("text",), path.name)


def _require_few(numbers: int) -> None:
    require(numbers <= NUMBERS, f"holds {numbers} expert numbers: at most {NUMBERS} are read")


def _array(path: Path) -> np.ndarray:
    _require_short_header(path)
    try:
        # Mapped and not loaded: a header that claims more than the file holds allocates nothing.
        chosen = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"is no array that NumPy saved: {brief(error)}") from error
    require(chosen.dtype.kind in "iu", f"holds {brief(chosen.dtype)}, not expert numbers")
    return chosen


def _require_short_header(path: Path) -> None:
    """UserError: a header that is longer than the file. NumPy makes room for it before it reads."""
    size = file_size(path)
    with path.open("rb") as file:
        start = file.read(12)
    # Byte 6 is the version. From version 2 on, the length has four bytes.
    length = int.from_bytes(start[8:12], "little") if start[6:7] > b"\x01" else 0
    require(length <= size, f"is no array that NumPy saved: its header has {length} bytes")


def _megatron(path: Path) -> np.ndarray:
    """Records of the decoder, tokens in the order of their steps. A step without all layers, as a
    killed run leaves it, is passed over, and so is a last line that was cut."""
    steps: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    total = 0
    for number, record in _records(path):
        if record.get("block", "decoder") != "decoder" or "mtp_idx" in record:
            continue
        step = record.get("step")
        layer = record.get("layer")
        chosen = _numbers(record.get("top_indices"))
        if not isinstance(step, int) or not isinstance(layer, int) or chosen is None:
            raise _no_record(number)
        total += chosen.size
        _require_few(total)
        steps[step][layer] = chosen
    require(len(steps) > 0, "has no records of a decoder")
    layers = sorted(set().union(*steps.values()))
    whole = [step for _, step in sorted(steps.items()) if len(step) == len(layers)]
    require(len(whole) > 0, "has no step with all of its layers")
    shapes = [{array.shape for array in step.values()} for step in whole]
    require(all(len(s) == 1 for s in shapes), "layers of one step have different tokens")
    require(len({s.pop()[1] for s in shapes}) == 1, "steps have different numbers of experts")
    return np.concatenate([np.stack([step[n] for n in layers], axis=1) for step in whole])


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, record), one line in memory at a time."""
    file_size(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_LINE + 1):
            number += 1
            require(len(line) <= MOST_LINE, f"line {number} has more than {MOST_LINE >> 20} MiB")
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return  # the last line, which a killed run leaves cut
                raise _no_record(number) from error
            if not isinstance(record, dict):
                raise _no_record(number)
            yield number, record


def _no_record(number: int) -> UserError:
    return UserError(f"line {number} is no record of a router trace (step, layer, top_indices)")


def _numbers(value: Any) -> np.ndarray | None:
    """Rows of expert numbers: [tokens, K] in uint16. None: the value is something else."""
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return None
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size > 0:
        return None
    low = int(array.min())
    highest = int(array.max())
    require(low >= 0, f"names expert {low}: experts are numbered from 0")
    require(highest < 2**16, f"a trace holds up to 65535 experts, this one names {highest}")
    return array.astype(np.uint16)


def _parquet(folder: Path) -> np.ndarray:
    paths = sorted(folder.glob("layer_*.parquet"))
    require(len(paths) > 0, "holds no layer_NN.parquet")
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError("reading parquet needs pip install pyarrow") from error
    layers = []
    for path in paths:
        with reading(path.name):
            layers.append(_parquet_layer(path))
        _require_few(sum(layer.size for layer in layers))
    shapes = {layer.shape for layer in layers}
    require(len(shapes) == 1, f"the layers are not alike: {quote(sorted(shapes))}")
    return np.stack(layers, axis=1)


def _parquet_layer(path: Path) -> np.ndarray:
    """[tokens, K], up to LIMIT tokens."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path)
    sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups)]
    require(sum(sizes) <= 8 * NUMBERS, f"claims {sum(sizes)} bytes of rows")
    require("indices" in file.schema_arrow.names, "has no column of expert indices")
    rows: list[np.ndarray] = []
    for batch in file.iter_batches(_batch_rows(file.metadata), columns=["indices"]):
        array = _lists(batch.column(0))
        require(array is not None, "has no column of expert indices, as many for each token")
        assert array is not None
        rows.append(array)
        _require_few(sum(part.size for part in rows))
        if sum(map(len, rows)) >= LIMIT:
            break
    require(len(rows) > 0, "has no rows")
    require(
        len({array.shape[1] for array in rows}) == 1, "tokens have different numbers of experts"
    )
    return np.concatenate(rows)[:LIMIT]


def _batch_rows(metadata: Any) -> int:
    """Rows to read at a time: few where they are long, as repeated numbers take no room on disk."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    most = max(
        (group.column(i).num_values for group in groups for i in range(group.num_columns)),
        default=0,
    )
    longest = most // max(1, min((group.num_rows for group in groups), default=1))
    return max(1, min(BATCH_NUMBERS // max(1, longest), 1 << 16))


def _lists(column: Any) -> np.ndarray | None:
    """A column of lists of one length: [rows, K] in uint16. None: it is something else."""
    from pyarrow import compute, types

    kind = column.type
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_list or not types.is_integer(kind.value_type) or column.null_count:
        return None
    values = column.flatten()
    # Their own lengths, because rows of 1 and 3 are as long together as two of 2.
    lengths = set(compute.list_value_length(column).unique().to_pylist())  # pyright: ignore
    if values.null_count or len(lengths) != 1:
        return None
    return _numbers(values.to_numpy(zero_copy_only=False).reshape(len(column), -1))
