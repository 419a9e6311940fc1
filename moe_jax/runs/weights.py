"""Weights of a run or of a published model, by one name."""

from dataclasses import replace

from moe_jax.base.paths import user_path
from moe_jax.config import DType
from moe_jax.distill.teacher import Teacher
from moe_jax.interop.convert import Source, of_memory, open_source
from moe_jax.interop.gguf import SMOLLM2
from moe_jax.interop.hugging_face.model import MTP
from moe_jax.runs.load import load_run


def is_run(path: str) -> bool:
    """Whether a path is the folder of a training run."""
    return (user_path(path) / "checkpoints").is_dir()


def open_weights(path: str, *, dtype: DType | None = None, mtp: MTP = "keep") -> Source:
    """The model in a run's newest checkpoint, or as interop.convert.open_source.

    A run is read whole. `mtp` "drop" leaves out its modules of multi-token prediction.
    """
    if not is_run(path):
        return open_source(path, dtype=dtype, mtp=mtp)
    run = load_run(path)
    config = run.config.model
    if mtp == "drop":
        config = replace(config, mtp_depth=0)
    config = replace(config, param_dtype=dtype or config.param_dtype)
    mark = f"{path} step {run.step}"
    return of_memory(config, run.state.parameters, run.state.router, run.tokenizer, mark)


def load_weights(path: str) -> Teacher:
    """The model in a run, a folder of safetensors, on the hub, or in a GGUF file, in float32."""
    if is_run(path):
        run = load_run(path)
        return Teacher(run.config.model, run.state.parameters, run.state.router, run.tokenizer)
    if path.endswith(".gguf") or path == SMOLLM2:
        return Teacher.from_gguf(path)
    return Teacher.from_folder(path)
