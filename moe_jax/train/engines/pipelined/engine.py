"""The engine of runs with parallel.pipe above 1."""

from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.base.errors import UserError, require
from moe_jax.config import ParallelConfig, TrainConfig
from moe_jax.objectives.base import Objective
from moe_jax.parallel.mesh import batch_parts
from moe_jax.parallel.schedules import PipelineSchedule, build
from moe_jax.parallel.schedules.split import split_backwards
from moe_jax.train.engines.dense import DenseEngine
from moe_jax.train.engines.pipelined.gradient import layer_count, make_pipelined_gradient
from moe_jax.train.state import Metrics, TrainState
from moe_jax.train.step import make_step


class PipelinedEngine(DenseEngine):
    """DenseEngine whose gradient is computed by a pipeline schedule. State and update are the same.

    So a run may go on with another schedule, another depth, or without a pipeline.
    """

    def __init__(self, config: TrainConfig, devices: Sequence[Any] | None = None) -> None:
        super().__init__(config, devices)
        self.schedule = schedule_of(config.parallel)

    @staticmethod
    def applies(config: TrainConfig) -> bool:
        return config.parallel.pipe > 1

    def check(self) -> None:
        """The layers must divide into pieces, and the batch into micro-batches and devices."""
        config = self.config
        require(
            config.optim.accumulation == 1,
            f"optim.accumulation={config.optim.accumulation} does not go with parallel.pipe: the "
            "pipeline's micro-batches are parallel.microbatches",
        )
        self.schedule.layers_of_piece(layer_count(config.model))
        parts = self.schedule.microbatches
        devices = batch_parts(self.mesh)
        if config.batch % (parts * devices):
            raise UserError(
                f"batch={config.batch} does not divide into {parts} micro-batches over {devices} "
                f"devices: make batch a multiple of {devices * parts}, or set parallel.microbatches"
            )
        self.abstract_state()

    def make_step(self, objective: Objective) -> Callable[..., tuple[TrainState, Metrics]]:
        return make_step(self.config, objective, self.make_gradient(objective))

    def make_gradient(self, objective: Objective) -> Callable[..., Any]:
        """The gradient of an update by the schedule, as train.step.make_gradient's."""
        return make_pipelined_gradient(self.config, objective, self.schedule, self.mesh)


def schedule_of(parallel: ParallelConfig) -> PipelineSchedule:
    """The schedule of these settings, its whole backwards in two halves.

    UserError: its numbers do not fit it.
    """
    name = parallel.schedule
    # DualPipeV has two stages on each device, and a stage is a device's share elsewhere.
    stages = parallel.pipe * 2 if name == "dualpipev" else parallel.pipe
    schedule = build(
        name,
        stages=stages,
        microbatches=parallel.microbatches or 2 * stages,
        chunks=parallel.chunks if name == "interleaved" else 1,
    )
    # All devices go from tick to tick together, so that ticks should take equally long.
    return split_backwards(schedule)
