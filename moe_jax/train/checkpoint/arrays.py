"""The arrays of a checkpoint, as Orbax stores them with tensorstore: a folder for each array."""

import logging
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from moe_jax.base.errors import UserError, brief, require
from moe_jax.base.files import disk_fault

MOST_WORDS = 160
"""Characters of an error of these libraries, whose text has many lines."""
SCHEMES = ("gs", "s3", "az", "hf")
"""Orbax takes /s3/… for an object store."""


def quieten() -> None:
    """Prints nothing of an error but the error itself, which Orbax raises to its caller.

    Orbax prints a traceback in each of its threads. After the first error it closes an event loop
    to which tensorstore still reports, and leaves coroutines behind.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # After the first of several errors nobody asks for the others, and asyncio prints them.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        left_behind = code is not None and "orbax" in code.co_filename
        if not left_behind and str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook


quieten()


def make_checkpointer() -> ocp.StandardCheckpointer:
    """Orbax's asynchronous checkpointer.

    Without OCDBT each array has files of its own, so that a fault names the array. With it, Orbax
    looks for the files to merge by a pattern, and a path with brackets matches nothing. Folders are
    made at once: otherwise a folder that cannot be made leaves threads that wait for it and keep
    the process alive.
    """
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.StandardCheckpointer(async_options=options, use_ocdbt=False)


def require_plain_path(folder: Path) -> None:
    """UserError: Orbax or tensorstore would write to another path than this absolute one."""
    name = str(folder)
    refused = f"checkpoints cannot be written to {name!a:.200}: "
    remedy = ", choose another --out"
    require("\\" not in name, f"{refused}tensorstore takes a backslash for a slash{remedy}")
    scheme = next(iter(folder.parts[1:2]), "")
    require(scheme not in SCHEMES, f"{refused}Orbax takes /{scheme} for an object store{remedy}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name!a:.200} is no UTF-8, which tensorstore wants{remedy}") from None


def require_arrays(folder: Path, count: int) -> None:
    """Opens every array in the folder and reads its last element.

    UserError: there are not `count` arrays, or one does not open.
    """
    found = sorted(folder.rglob(".zarray"))
    require(len(found) == count, f"{folder} has {len(found)} arrays, and not the {count} saved")
    for path in found:
        kvstore = {"driver": "file", "path": f"{path.parent}/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
        try:
            array = tensorstore.open(spec, open=True, read=True).result()
            array[tuple(size - 1 for size in array.shape)].read().result()
        except ValueError as error:
            if disk_fault(error) is not None:
                raise
            raise UserError(
                f"{path.parent} does not open again: {brief(error, MOST_WORDS)}"
            ) from error


def misfit(checkpointer: ocp.StandardCheckpointer, folder: Path, like: Any) -> str | None:
    """The first array, by name, that the checkpoint and `like` do not have alike. None: all fit.

    Orbax itself would cast silently, and says of a wrong shape not whose it is.
    """
    stored = _described(checkpointer.metadata(folder).item_metadata)
    wanted = _described(like)
    for name in [*wanted, *stored]:
        if name not in stored:
            return f"it has no {name}"
        if name not in wanted:
            return f"it has {name}, and this run has not"
        if stored[name] != wanted[name]:
            return f"its {name} is {stored[name]}, and this run's is {wanted[name]}"
    return None


def _described(tree: Any) -> dict[str, str]:
    """Shape and dtype of each leaf, by its path: `float32[4, 6]`."""
    leaves = jax.tree_util.tree_flatten_with_path(getattr(tree, "tree", tree))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }
