"""An engine of a new kind needs a class and a line of ENGINES: the loop runs it as any other."""

from dataclasses import replace
from pathlib import Path

from moe_jax.runs.load import load_run
from moe_jax.runs.run import run_training
from moe_jax.train import engines
from moe_jax.train.engines.dense import DenseEngine
from moe_jax.train.metrics import read_lines


class CountingEngine(DenseEngine):
    """Applies to seed 7, and notes what the loop asks of it."""

    calls: list[str] = []  # noqa: RUF012 (one for all instances: the loop makes its own)

    @staticmethod
    def applies(config):
        return config.seed == 7

    def start(self, out):
        self.calls.append("start")
        return super().start(out)

    def resume(self, out, state, checkpoint):
        self.calls.append("resume")
        return super().resume(out, state, checkpoint)

    def step(self, state, batch):
        self.calls.append("step")
        return super().step(state, batch)

    def step_line(self, step):
        return {"counted": step}

    def close(self):
        self.calls.append("close")


def test_a_registered_engine_runs_resumes_and_loads(small_run, monkeypatch):
    monkeypatch.setattr(engines, "ENGINES", (CountingEngine, *engines.ENGINES))
    config = replace(small_run, seed=7, steps=2, evaluate_every=2)
    run_training(config)
    assert CountingEngine.calls == ["start", "step", "step", "close"]
    (Path(config.out) / "result.json").unlink()  # else nothing would be left to do
    run_training(config)
    assert CountingEngine.calls[4:] == ["resume", "close"]
    lines = list(read_lines(Path(config.out) / "metrics.jsonl"))
    assert [line["counted"] for line in lines] == [1, 2]
    assert load_run(config.out).step == 2
