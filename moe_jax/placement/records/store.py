"""The one store of experts on disk: a file of records for each layer and kind.

Decoding reads the kind "parameters". Training has "moments" and "gradients" beside it, and writes
records in place. Their checksums are in memory until `finish` writes them down.
"""

from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import numpy as np
from jaxtyping import Int

from moe_jax.base.errors import UserError
from moe_jax.base.scratch import is_scratch, mark_scratch, remove_scratch_if_empty
from moe_jax.config import require
from moe_jax.placement.records.file import RESUME, Parts, RecordFile
from moe_jax.placement.records.layout import DamagedError, RecordLayout


def file_name(kind: str, layer: int) -> str:
    """File of a layer's records of a kind."""
    return f"layer-{layer:03d}.{kind}.safetensors"


def claim(folder: Path) -> None:
    """Makes a folder for records that are scratch, and removes those that an earlier run left.

    Other files in it stay. UserError: it has records and no marker, so somebody else made them.
    """
    records = sorted(folder.glob("layer-*.*.safetensors"))
    require(
        is_scratch(folder) or not records,
        f"{folder} holds {len(records)} files of records that no run left behind: move them",
    )
    mark_scratch(folder)
    for path in records:
        path.unlink()


class ByteCounter:
    """Bytes read and written, counted by any thread."""

    def __init__(self) -> None:
        self.read = 0
        self.written = 0
        self._lock = Lock()  # `+=` on an attribute is no atomic operation

    def add(self, *, read: int = 0, written: int = 0) -> None:
        with self._lock:
            self.read += read
            self.written += written


class RecordStore:
    """Records of `layers` · `experts` experts in `folder`, by kind.

    Call `create` or `open` for one. Threads: as RecordFile.
    """

    def __init__(self, folder: Path, files: dict[str, list[RecordFile]]) -> None:
        self.folder = folder
        self.files = files
        self.layouts = {kind: layers[0].layout for kind, layers in files.items()}
        some = next(iter(files.values()))
        self.layers = len(some)
        self.experts = some[0].count
        self.moved = ByteCounter()
        """Bytes on disk, padding included."""

    @classmethod
    def create(
        cls,
        folder: Path,
        layers: int,
        experts: int,
        layouts: Mapping[str, RecordLayout],
        *,
        direct: bool = False,
        remedy: str = RESUME,
    ) -> "RecordStore":
        """A new store, all of whose records read as zeros. UserError: the disk fails."""
        files: dict[str, list[RecordFile]] = {kind: [] for kind in layouts}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for kind, layout in layouts.items():
                for layer in range(layers):
                    path = folder / file_name(kind, layer)
                    files[kind].append(
                        RecordFile.create(
                            path, layer, layout, experts, direct=direct, remedy=remedy
                        )
                    )
        except OSError as error:
            raise UserError(
                f"cannot write in {folder}: {error.strerror}; mend that, then {remedy}"
            ) from error
        return cls(folder, files)

    @classmethod
    def open(cls, folder: Path, *, direct: bool = False, remedy: str = RESUME) -> "RecordStore":
        """The finished store in `folder`, to be read.

        DamagedError: a file is missing, truncated, unfinished or of another form. UserError: it
        cannot be opened.
        """
        kinds = sorted({path.name.split(".")[1] for path in folder.glob("layer-*.*.safetensors")})
        if not kinds:
            fault = f"{folder} holds no experts (layer-000.parameters.safetensors, …)"
            raise DamagedError(fault, remedy)
        files: dict[str, list[RecordFile]] = {}
        for kind in kinds:
            paths = sorted(folder.glob(f"layer-*.{kind}.safetensors"))
            for layer, path in enumerate(paths):
                wanted = folder / file_name(kind, layer)
                if path != wanted:
                    raise DamagedError(f"{wanted} is missing", remedy)
            files[kind] = [
                RecordFile.open(path, layer, direct=direct, remedy=remedy)
                for layer, path in enumerate(paths)
            ]
            forms = {(file.layout, file.count) for file in files[kind]}
            if len(forms) > 1:
                raise DamagedError(f"the layers in {folder} are not alike", remedy)
        counts = {(len(own), own[0].count) for own in files.values()}
        if len(counts) > 1:
            fault = f"{folder} holds kinds of different (layers, experts): {counts}"
            raise DamagedError(fault, remedy)
        return cls(folder, files)

    def path(self, kind: str, layer: int) -> Path:
        """The file of a layer's records of a kind."""
        return self.files[kind][layer].path

    def written(self, kind: str, layer: int, expert: int) -> bool:
        """Whether the record was ever written."""
        return bool(self.files[kind][layer].written[expert])

    def read(self, kind: str, layer: int, experts: Int[np.ndarray, "n"], parts: Parts) -> None:
        """Fills `parts` with the records of `experts` (ascending). UserError: as RecordFile."""
        file = self.files[kind][layer]
        file.read(experts, parts)
        self.moved.add(read=int(file.written[experts].sum()) * file.stride)

    def write(self, kind: str, layer: int, experts: Int[np.ndarray, "n"], parts: Parts) -> None:
        """Stores the records of `experts` (ascending). UserError: as RecordFile."""
        file = self.files[kind][layer]
        file.write(experts, parts)
        self.moved.add(written=len(experts) * file.stride)

    def finish(self) -> None:
        """Flushes every file and makes the store readable by `open`."""
        for layers in self.files.values():
            for file in layers:
                file.finish()

    def close(self) -> None:
        """Closes the files."""
        for layers in self.files.values():
            for file in layers:
                file.close()

    def remove(self) -> None:
        """Deletes the files, and the folder if nothing else is in it."""
        for layers in self.files.values():
            for file in layers:
                file.path.unlink(missing_ok=True)
        remove_scratch_if_empty(self.folder)
