"""The experts of a trained model on disk, for decoding: written once, read one by one."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from jaxtyping import Float, Int8

from moe_jax.base.files import appearing, disk_errors
from moe_jax.config import require
from moe_jax.placement.records.file import RecordFile, as_parts
from moe_jax.placement.records.layout import NAMES, DamagedError, RecordLayout
from moe_jax.placement.records.pages import ThreadBuffer
from moe_jax.placement.records.store import RecordStore, file_name

Matrices = tuple[Float[np.ndarray, "D twoF"], Float[np.ndarray, "F D"]]
"""One expert: (gate and up, down)."""
Layer = tuple[Float[np.ndarray, "E D twoF"], Float[np.ndarray, "E F D"]]

KIND = "parameters"
REWRITE = "write the experts anew"


def layer_name(layer: int) -> str:
    """File of a layer's experts."""
    return file_name(KIND, layer)


def write_experts(folder: Path, layers: Iterable[Layer], *, low_bit: bool = False) -> int:
    """Writes one file for each layer's (gate_up, down) and returns the number of layers.

    The files are in the safetensors format (placement.records.layout), with tensors called
    expert-NNNNN.down and .gate_up. One layer at a time is in memory. With `low_bit`, matrices are
    rounded to 8-bit integers (`quantise`), each with a .…_scale. They take a quarter of float32's
    bytes. UserError: a dtype that is not float32, float16 or bfloat16, or a disk that fails.
    """
    count = 0
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for layer, (gate_up, down) in enumerate(layers):
            dtypes = {np.dtype(gate_up.dtype), np.dtype(down.dtype)}
            require(dtypes <= NAMES.keys(), f"experts of {dtypes} cannot be written: use float32")
            _write_layer(folder / layer_name(layer), layer, _fields(gate_up, down, low_bit))
            count += 1
    return count


def _write_layer(path: Path, layer: int, fields: dict[str, np.ndarray]) -> None:
    """Writes the fields, [E, …] each, beside `path` and renames the whole file into place."""
    experts = np.arange(len(fields["down"]))
    layout = RecordLayout.of({name: field[0] for name, field in fields.items()})
    with appearing(path) as unfinished:
        file = RecordFile.create(unfinished, layer, layout, len(experts), remedy=REWRITE)
        try:
            file.write(experts, as_parts(fields.values()))
            file.finish()
        finally:
            file.close()


def _fields(gate_up: np.ndarray, down: np.ndarray, low_bit: bool) -> dict[str, np.ndarray]:
    """The fields of a layer's records, [E, …] each, in their order on disk."""
    if not low_bit:
        return {"down": np.ascontiguousarray(down), "gate_up": np.ascontiguousarray(gate_up)}
    fields: dict[str, np.ndarray] = {}
    for name, matrices in (("down", down), ("gate_up", gate_up)):
        quantised, scales = zip(*map(quantise, matrices), strict=True)
        fields[name] = np.stack(quantised)
        fields[f"{name}_scale"] = np.stack(scales)
    return fields


def quantise(
    matrix: Float[np.ndarray, "m n"],
) -> tuple[Int8[np.ndarray, "m n"], Float[np.ndarray, "n"]]:
    """(q, scale) with matrix ≈ q · scale, where q are 8-bit integers.

    Each output column has a scale of its own, max |column| / 127, so no entry is off by more than
    half of its scale. A column of zeros has scale 1.
    """
    matrix = np.asarray(matrix, np.float32)
    scale = np.abs(matrix).max(axis=0) / 127
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale


class ExpertFiles:
    """The experts that write_experts wrote, opened for reading by any number of threads.

    `direct` reads around the page cache (O_DIRECT, Linux), to measure the disk itself. `remake`
    writes the files again when a record is damaged. It takes the fault in words.
    UserError: a file cannot be opened. DamagedError: it is missing, truncated or of another form.
    """

    def __init__(
        self,
        folder: Path,
        *,
        direct: bool = False,
        remake: Callable[[str], None] | None = None,
        remedy: str = REWRITE,
    ) -> None:
        self.folder = folder
        self._open = partial(RecordStore.open, folder, direct=direct, remedy=remedy)
        self._remake = remake
        self._remaking = Lock()
        self._replaced: list[RecordStore] = []
        self.records = self._open()
        layout = self.records.layouts.get(KIND, RecordLayout(()))
        self.fields = {field.name: field for field in layout.fields}
        files = self.records.files.get(KIND, [])
        if not {"down", "gate_up"} <= self.fields.keys() or not all(f.written.all() for f in files):
            raise DamagedError(f"{folder / layer_name(0)} is no file of experts", remedy)
        self.layers = self.records.layers
        self.experts = self.records.experts
        self.gate_up_shape = self.fields["gate_up"].shape
        self.down_shape = self.fields["down"].shape
        self.low_bit = "down_scale" in self.fields
        self.dtype = np.dtype(np.float32) if self.low_bit else self.fields["down"].dtype
        """Of the matrices as they are computed with."""
        self.record_bytes = layout.stride
        self.expert_bytes = layout.size
        """Without the padding."""
        self._buffer = ThreadBuffer(self.record_bytes)

    def read(self, layer: int, expert: int, memory: memoryview | None = None) -> Matrices:
        """One expert, as views of `memory`, which is page_memory(record_bytes).

        Without it they are views of a buffer that the same thread's next read overwrites. The
        matrices of a low-bit expert are multiplied by their scales, into memory of their own.
        UserError: the record cannot be read. DamagedError: it is truncated or its checksum does not
        hold, and cannot be made again.
        """
        if memory is None:
            memory = self._buffer.get(self.record_bytes)
        records = self.records
        try:
            records.files[KIND][layer].read_adjacent(expert, memory)
        except DamagedError as error:
            if self._remake is None:
                raise
            self._replace(records, error.fault)
            self.records.files[KIND][layer].read_adjacent(expert, memory)
        return self.matrices(memory)

    def _replace(self, damaged: RecordStore, fault: str) -> None:
        """Has the files written again, unless another thread did so since they were `damaged`."""
        with self._remaking:
            if self.records is not damaged:
                return
            assert self._remake is not None
            self._remake(fault)
            # Other threads may be reading sound records of the files that were replaced.
            self._replaced.append(damaged)
            self.records = self._open()

    def matrices(self, memory: memoryview) -> Matrices:
        """(gate_up, down) of a record that is in memory."""
        gate_up = self.fields["gate_up"].view(memory)
        down = self.fields["down"].view(memory)
        if self.low_bit:
            return (
                gate_up * self.fields["gate_up_scale"].view(memory),
                down * self.fields["down_scale"].view(memory),
            )
        return gate_up, down

    def close(self) -> None:
        """Closes the files. Nothing can be read afterwards."""
        for records in (*self._replaced, self.records):
            records.close()
