"""The folder of a published model: where it is, and which files it has."""

import json
import re
from pathlib import Path
from typing import Any

from moe_jax.base.console import downloading
from moe_jax.base.errors import UserError, brief, quote
from moe_jax.base.paths import read_file, user_path

HUB = "hf:"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that PyTorch pickles."""
MOST_JSON_BYTES = 64 << 20
"""The longest tokenizer.json of the published models has half of it."""


def find(path: str | Path) -> Path:
    """The folder that `path` names; `hf:OWNER/NAME` is downloaded from the hub, once.

    UserError: there is none, or it cannot be downloaded.
    """
    if str(path).startswith(HUB):
        return _download(str(path).removeprefix(HUB))
    folder = user_path(path)
    if not folder.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
        hint = f"{HUB}{path} for the hub's model of that name" if hub else f"{HUB}OWNER/NAME"
        raise UserError(
            f"there is no folder {folder}: give one with {CONFIG}, {SINGLE_FILE} and {TOKENIZER}, "
            f"or {hint}"
        )
    return folder


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise UserError(
            f"{HUB}{name} needs a further package: pip install 'moe_jax[teacher]'"
        ) from error
    # Other formats of the same weights (.bin, .onnx) would multiply the download.
    files = [CONFIG, TOKENIZER, INDEX, "*.safetensors"]
    try:
        with downloading(f"loading {HUB}{name}", disable_progress_bars):
            return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = brief(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise UserError(
            f"cannot fetch {HUB}{name}: {reason}; where there is a network, hf download {name} "
            f"--local-dir {name.rpartition('/')[2] or 'FOLDER'}, and name that folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UserError: the file is missing, too long, or no object."""
    data = read_file(path, MOST_JSON_BYTES)
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else brief(error)
        raise UserError(f"{path.name} is no JSON: {reason}; fetch the file again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path.name} holds no JSON object; fetch the file again")
    return fields


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files, from the index if there is one.

    UserError: one is missing, or the index names a file outside of the folder.
    """
    names = [SINGLE_FILE]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{INDEX} has no weight_map; fetch the file again")
        names = list(dict.fromkeys(map(str, weight_map.values())))
    for name in names:
        # No separators and no leading dot: "../secret.safetensors" must not be opened.
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UserError(f"{INDEX} names {quote(name)}: no safetensors file of this folder")
        if not (folder / name).is_file():
            raise UserError(f"{name} is missing{_pickles(folder)}")
    return names


def _pickles(folder: Path) -> str:
    """The reason why other files of weights are not read, or nothing."""
    found = sorted(p.name for ending in PICKLES for p in folder.glob(f"*{ending}"))
    if not found:
        return ""
    return (
        f", and {brief(found[0])} is not read: a pickle can run any code. Fetch the model's "
        "safetensors, or rewrite it with transformers (save_pretrained)"
    )
