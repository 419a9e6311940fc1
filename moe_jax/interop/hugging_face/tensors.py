"""The tensors of a folder of safetensors."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from moe_jax.base.errors import UserError, brief, reading
from moe_jax.interop.assemble import Tensors
from moe_jax.interop.hugging_face.folder import weight_files

DTYPES = ("F32", "F16", "BF16")


class SafeTensors(Tensors):
    """The tensors of all files of a folder. UserError: a file is missing, damaged or elsewhere.

    Query and key need no reordering: these files rotate the two halves of a head, as we do.
    """

    format = "hugging_face"

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        for file_name in weight_files(folder):
            with reading(file_name):
                file = safe_open(folder / file_name, framework="np")
            for name in file.keys():  # noqa: SIM118
                if name in self.shapes:
                    raise UserError(f"tensor {brief(name)} is in two files")
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                self._files[name] = file

    def read(self, name: str, parameter: str) -> np.ndarray:
        file = self._files[name]
        dtype = file.get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise UserError(
                f"tensor {name} has type {brief(dtype)}: only {', '.join(DTYPES)} are read"
            )
        with reading(name):
            return file.get_tensor(name).astype(np.float32)

    def ignored(self, name: str) -> bool:
        # Old files hold the rotary frequencies, which follow from rope_theta. The head of a tied
        # model is its embedding; an untied model uses the tensor, and then nobody asks.
        return name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight"
