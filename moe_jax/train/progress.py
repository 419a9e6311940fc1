"""The progress of a run: its clock, and its line in the terminal or the log."""

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from moe_jax.base import process
from moe_jax.base.console import Throttle, console, duration
from moe_jax.train.checkpoint import VALIDATION

BAR_COLUMNS = 10


def elapsed_until(lines: Iterable[dict[str, Any]], step: int) -> float:
    """`elapsed` of the last line up to `step`, from which a continued run counts on. 0: none."""
    return max((line.get("elapsed", 0.0) for line in lines if line["step"] <= step), default=0.0)


class Speedometer:
    """The clock of a run. Speed and time left are over the last updates, not the whole run.

    `before`: seconds that earlier processes of the run have trained (elapsed_until).
    """

    def __init__(
        self, tokens_per_step: int, steps: int, *, before: float = 0.0, window: int = 20
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.steps = steps
        self._begin = time.perf_counter() - before
        self._last: float | None = None
        self._recent: deque[float] = deque(maxlen=window)

    def tick(self, line: dict[str, Any]) -> None:
        """Marks the end of an update, and adds what the clock knows to its line of metrics.

        `tokens`: tokens trained on by the end of this update, since the run's first one.
        `elapsed`: seconds of training until now over all processes of the run, evaluations
        included. Starting, compiling and updates that a kill has lost are not counted.
        `time`: now, in seconds since 1970 (UTC).
        `seconds`: since the end of the update before. It is missing for the first update of a
        process, and after an evaluation.
        """
        now = time.perf_counter()
        line["tokens"] = line["step"] * self.tokens_per_step
        line["elapsed"] = round(now - self._begin, 3)
        line["time"] = round(time.time(), 3)
        if self._last is not None:
            line["seconds"] = now - self._last
            self._recent.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Forgets the last mark, because an evaluation follows, whose time is no update's."""
        self._last = None

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last updates. None: there were not yet two in a row."""
        return (
            self.tokens_per_step * len(self._recent) / sum(self._recent) if self._recent else None
        )

    def left(self, step: int) -> float | None:
        """Estimated seconds to the last step, without evaluations. None: not yet known."""
        rate = self.tokens_per_second
        return None if rate is None else (self.steps - step) * self.tokens_per_step / rate


def fields(line: dict[str, Any], speed: Speedometer, gemm_speed: float) -> list[str]:
    """The parts of a progress line, the most useful first: a narrow terminal shows the first ones.

    Where the run is and how long it still takes come first. Nobody can work them out from the
    rest, and every number is in metrics.jsonl. What is not known yet is left out.
    `gemm_speed`: tokens per second that would take all of a plain GEMM's FLOP/s.
    """
    step = line["step"]
    found = [f"step {step}/{speed.steps}"]
    left = speed.left(step)
    rate = speed.tokens_per_second
    if left is not None:
        found.append(f"left {duration(left)}")
    found.append(f"loss {line['loss']:.3f}")
    if VALIDATION in line:
        found.append(f"held-out {line[VALIDATION]:.3f} bits/byte")
    if rate is not None:
        found += [f"{rate:,.0f} tok/s", f"{rate / gemm_speed:.0%} of a GEMM"]
    if "load_imbalance" in line:
        found += [f"load max/mean {max(line['load_imbalance']):.2f}", f"drop {line['dropped']}"]
    return found


def fit(parts: list[str], width: int) -> str:
    """The first parts that fit into `width` columns together, at least one."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + 2 + len(part) > width:
            break
        text += f"  {part}"
    return text


class Display:
    """A live line in a terminal, never longer than it is wide.

    Evaluations leave a line behind. Without a terminal there are these lines, the first update's,
    and one every console.PLAIN_SECONDS. Only the first process shows anything.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._first = True
        self._shown = process.index() == 0
        self._throttle = Throttle()
        self._progress = Progress(
            BarColumn(BAR_COLUMNS),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,  # the last line is printed as well
            disable=not (self._shown and console.is_terminal),
        )
        self._task = self._progress.add_task("first step", total=steps)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def evaluating(self, step: int) -> None:
        """Says that the held-out text is being read, which takes longer than an update."""
        self._update(step, [f"step {step}/{self.steps}", "evaluating on held-out text"])

    def show(self, line: dict[str, Any], speed: Speedometer, gemm_speed: float) -> None:
        """Updates the line from one line of metrics. `gemm_speed` as in `fields`."""
        parts = fields(line, speed, gemm_speed)
        self._update(line["step"], parts, keep=VALIDATION in line)

    def _update(self, step: int, parts: list[str], keep: bool = False) -> None:
        live = console.is_terminal
        # One column each beside the bar and at the end of the line.
        room = console.width - BAR_COLUMNS - 2
        self._progress.update(self._task, completed=step, description=fit(parts, room))
        due = not live and (self._first or self._throttle.ready())
        self._first = False
        if self._shown and (keep or due):
            self._throttle.restart()
            console.print(fit(parts, console.width) if live else "  ".join(parts), markup=False)
