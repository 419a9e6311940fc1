"""A trace of a few updates by jax.profiler, to see what the device did when."""

from pathlib import Path

import jax

from moe_jax.base.console import say
from moe_jax.train.state import TrainState

WARM_UP = 2
"""Updates of this process before the trace. The first ones also read files and fill caches."""


class StepTrace:
    """Traces `count` updates into OUT/profile. A `count` of 0 traces none."""

    def __init__(self, out: Path, first: int, count: int) -> None:
        self._folder = out / "profile"
        self._begin = first + WARM_UP
        self._end = self._begin + count if count else self._begin - 1
        self._running = False

    def before(self, step: int, state: TrainState) -> None:
        """To be called before update `step` is started, from 1, with the state until then."""
        if self._running and step > self._end:
            self.close(state)
        elif step == self._begin + 1 and self._end > self._begin:
            jax.block_until_ready(state.step)  # updates before it are no part of the trace
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def close(self, state: TrainState) -> None:
        """Ends the trace, if one is running, when the updates in it are computed."""
        if self._running:
            jax.block_until_ready(state.step)
            jax.profiler.stop_trace()
            self._running = False
            say(f"the trace is in {self._folder}: tensorboard --logdir {self._folder}, or xprof")
