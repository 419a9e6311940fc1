"""The whole training step, lowered for GPUs that are not there."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import jax
from moe_kernels.launch import lowering_for
from moe_jax.cli import parse
from moe_jax.data.batches import train_batches
from moe_jax.data.tokens import prepare
from moe_jax.config.presets import PRESETS
from moe_jax.train.state import init_state
from moe_jax.train.step import make_step

capabilities = [int(word) for word in sys.argv[1].split(",")]
config = parse(sys.argv[2:], PRESETS).resolved()
data = prepare(config.data, say=lambda *_: None)
batch = next(train_batches(data.train, config.data.length, config.batch, 0))
state = jax.eval_shape(lambda: init_state(config))
counts = {}
for capability in capabilities:
    with lowering_for(capability):
        step = jax.jit(make_step(config)).trace(state, batch)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    counts[capability] = text.count("triton_kernel_call")
    # Products tell XLA's scheduler their cost: once a call, and not for each of its results.
    priced = [line for line in text.splitlines() if "latency_metadata" in line]
    assert len(priced) >= 8 and all("custom_call" in line for line in priced), priced
print(json.dumps(counts))
"""


@pytest.mark.parametrize("architectures", ["90", pytest.param("80,100", marks=pytest.mark.slow)])
def test_the_train_step_holds_the_kernels_for_each_architecture(tmp_path, architectures):
    pytest.importorskip("jax_cuda13_plugin")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"experts and tokens, {name} " * 2000)
    settings = ["tiny", f"--data.source=files:{tmp_path}/*.txt", f"--data.cache={tmp_path}/cache"]
    settings += ["--batch=4", "--data.length=32", "--model.mtp-depth=0"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, architectures, *settings],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    # Scanned blocks hold their layer once. Forward: up, down, combine; backward: hidden gradient,
    # two matrix gradients, down's transpose, combine (and the forward again where it is rematted).
    assert all(count >= 8 for count in counts.values()), counts
