"""The engine of a run whose routed experts live in tiers: device, host memory, disk."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.base.console import say
from moe_jax.base.paths import user_path
from moe_jax.base.provenance import call_of
from moe_jax.base.scratch import make_scratch
from moe_jax.config import ParallelConfig, TrainConfig, require
from moe_jax.data.tokens import TokenArray
from moe_jax.model.trunk import with_experts
from moe_jax.objectives.base import Batch, Objective
from moe_jax.parallel.rules import replicated, with_sharding
from moe_jax.placement.records.file import as_parts
from moe_jax.placement.records.store import RecordStore, claim
from moe_jax.train.checkpoint import EXPERTS, unfinished_folder
from moe_jax.train.engines.dense import DenseEngine
from moe_jax.train.engines.tiered.chunks import Sizes
from moe_jax.train.engines.tiered.rows import RowShapes, row_shapes
from moe_jax.train.engines.tiered.step import TieredStep
from moe_jax.train.engines.tiered.store import TieredExperts
from moe_jax.train.engines.tiered.trunk import assemble, init_trunk
from moe_jax.train.state import Metrics, TrainState, abstract_state, tree_bytes


# A function of its own, so that tests on several simulated CPU devices can replace it.
def visible_devices() -> int:
    """Number of devices of all processes."""
    return jax.device_count()


class TieredEngine(DenseEngine):
    """train.engine.Engine whose state is the trunk's. Batches are placed as by DenseEngine."""

    described = "with placement.device_budget"

    def __init__(self, config: TrainConfig) -> None:
        # `check` refuses a layout. Before it, none may ask for devices that are not there.
        super().__init__(replace(config, parallel=ParallelConfig()), jax.devices()[:1])
        self.config = config
        self._experts: TieredExperts | None = None
        self._tiered_step: TieredStep | None = None

    @staticmethod
    def applies(config: TrainConfig) -> bool:
        return config.placement.tiered

    def check(self) -> None:
        config = self.config
        budget = f"placement.device_budget={config.placement.device_budget}"
        require(
            config.model.moe_layers > 0,
            f"{budget} needs experts: model.dense_layers equals model.layers, a dense model",
        )
        require(
            config.optim.accumulation == 1,
            f"{budget} and optim.accumulation={config.optim.accumulation}: training with tiers "
            "takes the batch as a whole, set optim.accumulation to 1 and shrink batch",
        )
        require(
            config.parallel.settings == "",
            f"{budget} and {config.parallel.settings}: training with tiers uses one device, unset "
            "one of them",
        )
        require(
            visible_devices() == 1,
            f"{budget} and {visible_devices()} devices: training with tiers uses one device, hide "
            "the others (CUDA_VISIBLE_DEVICES)",
        )
        Sizes(config, row_shapes(config))  # raises if the budget is too small

    def memory_bytes(self) -> int:
        """Bytes of the trunk's state, and of the part of the device budget that is used."""
        config = self.config
        trunk = tree_bytes(abstract_trunk(config))
        below = min(config.placement.host_bytes, expert_disk_bytes(config))
        own_host = jax.default_backend() == "cpu"  # then the device's memory is the host's
        return trunk + Sizes(config, row_shapes(config)).device + own_host * below

    def disk_bytes(self, out: Path) -> dict[Path, int]:
        folder = self.config.placement.folder
        return {user_path(folder) if folder else out: expert_disk_bytes(self.config)}

    def abstract_state(self) -> TrainState:
        return with_sharding(abstract_trunk(self.config), replicated(self.mesh))

    def start(self, out: Path) -> TrainState:
        state = jax.jit(lambda: init_trunk(self.config), out_shardings=replicated(self.mesh))()
        self._experts = open_experts(self.config, out, None, 0)
        return state

    def resume(self, out: Path, state: TrainState, checkpoint: Path) -> TrainState:
        self._experts = open_experts(self.config, out, checkpoint, int(state.updates))
        return state

    def compile(
        self,
        state: TrainState,
        batch: Batch,
        objective: Objective,
        operands: tuple[Any, ...],
        validation: TokenArray,
    ) -> None:
        assert not operands, "TrainConfig refuses a teacher with tiers"
        step = TieredStep(self.config, self._open_experts, objective)
        step.compile(state, batch)
        self._evaluate = step.evaluator(validation, self.place)
        self._tiered_step = step

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        assert self._tiered_step is not None
        return self._tiered_step(state, batch)

    def step_line(self, step: int) -> dict[str, Any]:
        """The bytes that an update moved between tiers, its hit rate and its waits."""
        assert self._tiered_step is not None
        return self._tiered_step.lines.pop(step, {})

    def save_beside(self, out: Path, step: int) -> Path | None:
        return save_experts(self._open_experts, out, step)

    def local_state(self, state: TrainState) -> TrainState | None:
        """The state with the experts' parameters, if they fit into what the device budget has left.

        Their moments are left out, because nothing that reads this state updates it.
        """
        experts = self._open_experts
        layers = experts.sizes.layers
        number = experts.sizes.experts
        size = experts.shapes.parameter_bytes * layers * number + experts.sizes.device
        if size > self.config.placement.device_bytes:
            say(
                "no samples: all experts are more than placement.device_budget has left; "
                f"{call_of('complete')} --run {self.config.out} writes within it"
            )
            return None
        everyone = np.arange(number)
        # Copies: the next layer overwrites what `need` returned.
        copied = [[np.array(m) for m in experts.need(layer, everyone)] for layer in range(layers)]
        stacked = tuple(jax.device_put(np.stack(parts)) for parts in zip(*copied, strict=True))
        return state._replace(parameters=with_experts(state.parameters, stacked))

    def load(self, state: TrainState, checkpoint: Path) -> TrainState:
        return assembled(self.config, state, checkpoint)

    def close(self) -> None:
        if self._experts is not None:
            self._experts.close()

    @property
    def _open_experts(self) -> TieredExperts:
        assert self._experts is not None, "call start or resume first"
        return self._experts


def abstract_trunk(config: TrainConfig) -> TrainState:
    """Shapes and dtypes of the state without the experts."""
    return jax.eval_shape(lambda: init_trunk(config))


def expert_disk_bytes(config: TrainConfig) -> int:
    """Bytes of the experts on disk while the run goes on."""
    model = config.model
    return row_shapes(config).record_bytes * model.moe_layers * model.moe.experts


def expert_folder(config: TrainConfig, out: Path) -> Path:
    """The folder of a run's experts on disk.

    It belongs to this run alone. In a placement.folder that several runs share, its name has a hash
    of `out`.
    """
    if not config.placement.folder:
        return out / "expert-records"
    own = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]
    return user_path(config.placement.folder) / f"expert-records-{out.name}-{own}"


def open_experts(
    config: TrainConfig, out: Path, checkpoint: Path | None, updates: int
) -> TieredExperts:
    """The experts of a fresh run, or those of a checkpoint's folder, in a new store.

    The store of a killed run is removed. It is scratch, because checkpoints hold everything.
    UserError: records are there that no run made.
    """
    folder = expert_folder(config, out)
    claim(folder)
    experts = TieredExperts(config, folder)
    try:
        if checkpoint is None:
            experts.initialise()
        else:
            saved = RecordStore.open(checkpoint / EXPERTS)
            experts.restore(saved, updates)
            saved.close()
    except BaseException:  # an interrupt as well: its threads would keep the program alive
        experts.close()
        raise
    return experts


def save_experts(experts: TieredExperts, out: Path, step: int) -> Path:
    """Copies the experts as they are after `step` to a folder beside the checkpoints.

    Returns the folder. It becomes part of the checkpoint once the rest is written
    (train.checkpoint).
    """
    folder = make_scratch(unfinished_folder(out)) / f"experts-{step}"
    if folder.exists():  # an earlier save of this step failed
        shutil.rmtree(folder)
    experts.save(folder)
    RecordStore.open(folder).close()  # it must open again before it counts
    return folder


def assembled(config: TrainConfig, trunk: TrainState, checkpoint: Path) -> TrainState:
    """The whole state, as the dense engine has it, from the two parts of a checkpoint."""
    saved = RecordStore.open(checkpoint / EXPERTS)
    try:
        return assemble(abstract_state(config), trunk, _stacked(saved, row_shapes(config)))
    finally:
        saved.close()


def _stacked(saved: RecordStore, shapes: RowShapes) -> Callable[[str], list[Any]]:
    """kind -> the rows of all experts, [layers, E, …] each."""

    def rows(kind: str) -> list[Any]:
        own = shapes.moments if kind == "moments" else shapes.parameters
        stacked = [np.empty((saved.layers, saved.experts, *s.shape), s.dtype) for s in own]
        for layer in range(saved.layers):
            parts = as_parts([part[layer] for part in stacked])
            saved.read(kind, layer, np.arange(saved.experts), parts)
        return [jax.device_put(part) for part in stacked]

    return rows
