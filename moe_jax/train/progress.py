"""What the terminal shows while a run goes on."""

import time
from collections import deque
from datetime import timedelta
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from moe_jax.base.console import console


class Speedometer:
    """Tokens per second and time left, over the last updates rather than the whole run."""

    def __init__(self, tokens_per_step: int, steps: int, window: int = 20) -> None:
        self.tokens_per_step = tokens_per_step
        self.steps = steps
        self._last: float | None = None
        self._recent: deque[float] = deque(maxlen=window)

    def tick(self, line: dict[str, Any]) -> None:
        """Marks the end of an update; adds the `seconds` since the one before to its line."""
        now = time.perf_counter()
        if self._last is not None:
            line["seconds"] = now - self._last
            self._recent.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Forgets the last mark: what follows (an evaluation, a save) is not an update."""
        self._last = None

    @property
    def tokens_per_second(self) -> float:
        """Over the last updates; 0 before the second."""
        return self.tokens_per_step * len(self._recent) / sum(self._recent) if self._recent else 0.0

    def left(self, step: int) -> str:
        """Estimated time to the last step, h:mm:ss."""
        rate = self.tokens_per_second
        seconds = (self.steps - step) * self.tokens_per_step / rate if rate else 0
        return str(timedelta(seconds=round(seconds)))


class Display:
    """A live line in a terminal; a plain line every so often where output goes to a file."""

    def __init__(self, steps: int, plain_every: int) -> None:
        self.steps = steps
        self.plain_every = plain_every
        self._progress = Progress(
            BarColumn(30),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("first step", total=steps)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def show(self, line: dict[str, Any], speed: Speedometer, utilisation: float) -> None:
        """Updates the live line from one line of metrics."""
        step = line["step"]
        text = (
            f"step {step}/{self.steps}  loss {line['loss']:.3f}  "
            f"{speed.tokens_per_second:,.0f} tok/s  MFU {utilisation:.0%}"
        )
        if "load_imbalance" in line:
            text += f"  load max/mean {max(line['load_imbalance']):.2f}  drop {line['dropped']}"
        text += f"  left {speed.left(step)}"
        self._progress.update(self._task, completed=step, description=text)
        if not console.is_terminal and (step % self.plain_every == 0 or step == self.steps):
            console.print(text)
