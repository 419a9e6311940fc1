"""Loads the model of a finished or stopped run, to complete text or to inspect its routing."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from moe_jax.base.console import say
from moe_jax.base.errors import UserError, require
from moe_jax.base.files import patiently
from moe_jax.base.initial import root_key
from moe_jax.base.paths import user_path
from moe_jax.config import CheckpointConfig, ParallelConfig, TrainConfig, from_dict
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.model.abstract import graph_of
from moe_jax.model.generate import generate, require_cache_room
from moe_jax.model.transformer import Transformer
from moe_jax.parallel.rules import with_sharding
from moe_jax.train.checkpoint import MANIFEST, Checkpoints, read_errors, steps_in
from moe_jax.train.engines import engine_of
from moe_jax.train.state import TrainState


@dataclass(frozen=True)
class Trained:
    """A model with the tokenizer that it was trained with."""

    config: TrainConfig
    step: int
    state: TrainState
    tokenizer: Tokenizer

    def model(self) -> Transformer:
        """The model as an object that can be called."""
        graph = graph_of(self.config.model)
        return nnx.merge(graph, self.state.parameters, self.state.router)

    def complete(self, text: str, tokens: int = 64, temperature: float = 0.8, seed: int = 0) -> str:
        """`text` and a continuation of at most `tokens` tokens, up to the end of the document."""
        prompt = self._encode(text)
        require_cache_room(self.config.model, 1, len(prompt) + tokens)
        generated = generate(
            graph_of(self.config.model),
            (self.state.parameters, self.state.router),
            prompt[None],
            root_key(seed),
            count=tokens,
            vocabulary=self.tokenizer.vocabulary,
            temperature=temperature,
        )
        return text + decode_until_end(self.tokenizer, np.asarray(generated[0]))

    def routing(self, text: str) -> list[tuple[str, list[list[int]]]]:
        """(token, its experts in each mixture-of-experts block, best first) for each token."""
        prompt = self._encode(text)[None]
        model = self.model()
        _, stats = model.hidden(prompt, jnp.ones_like(prompt))
        if stats is None:
            raise UserError("model.dense_layers equals model.layers: a dense model has no routing")
        experts = np.asarray(stats.experts)[:, 0]  # [layers, L, K]
        number = model.config.moe.experts  # this number (E) stands for no expert
        return [
            (
                self.tokenizer.decode(np.asarray([token])),
                [[e for e in layer if e < number] for layer in experts[:, position].tolist()],
            )
            for position, token in enumerate(np.asarray(prompt[0]))
            if position > 0  # bos is not part of the text
        ]

    def _encode(self, text: str) -> jax.Array:
        """bos and then the tokens of `text`, int32[n], as documents begin in training."""
        return jnp.asarray([self.tokenizer.bos, *self.tokenizer.encode(text)], jnp.int32)


def decode_until_end(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """The text of `tokens` before the first end-of-document token."""
    stop = np.flatnonzero(tokens == tokenizer.eos)
    return tokenizer.decode(tokens[: stop[0]] if len(stop) else tokens)


def run_folder(out: str | Path) -> Path:
    """The folder that an argument names, `~` expanded. UserError: there is none."""
    folder = user_path(out)
    require(_is_folder(folder), f"there is no folder '{out}': give the --out of a training run")
    return folder


def _is_folder(path: Path) -> bool:
    with read_errors(path):
        return patiently(path.is_dir)


def newest_step(out: str | Path) -> int:
    """Step of the newest checkpoint with a manifest. Its files are not verified.

    UserError: there is none.
    """
    folder = run_folder(out) / "checkpoints"
    with read_errors(folder):
        steps = [step for step in steps_in(folder) if (folder / str(step) / MANIFEST).is_file()]
    if not steps:
        raise UserError(f"{out} holds no complete checkpoint: give the --out of a training run")
    return max(steps)


def load_run(out: str | Path) -> Trained:
    """The newest undamaged checkpoint of a run's folder. UserError: there is none."""
    folder = run_folder(out)
    if not _is_folder(folder / "checkpoints"):
        raise UserError(f"{out} holds no checkpoints: give the --out of a training run")
    # read_only, because the run may still be training.
    checkpoints = Checkpoints(folder, CheckpointConfig(), read_only=True)
    try:
        extra = checkpoints.peek(say)
        if extra is None:
            raise UserError(f"{out}/checkpoints holds no complete checkpoint")
        # On one device, whatever layout the run was trained with.
        config = replace(from_dict(TrainConfig, extra["config"]), parallel=ParallelConfig())
        engine = engine_of(config)
        here = SingleDeviceSharding(jax.local_devices()[0])
        restored = checkpoints.restore(with_sharding(engine.abstract_state(), here), say)
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"{out}/checkpoints holds no complete checkpoint any more")
    tokenizer = Tokenizer.from_json(restored.extra["tokenizer"])
    state = engine.load(restored.state, restored.folder)
    return Trained(engine.config, restored.step, state, tokenizer)
