"""A stand-in for experiments/train.py that takes milliseconds, and sweeps over it as processes."""

import csv
import shlex
import subprocess
import sys
from pathlib import Path

# Takes the options of experiments/train.py. Logs its start and end in runs.txt. Lowest at 1e-3.
FAKE = """
import json, math, sys, time
from pathlib import Path

argv = sys.argv[1:]
options = dict(zip(argv[1::2], argv[2::2]))
out = Path(options["--out"])
experts = int(options.get("--model.moe.experts", 8))
rate = float(options.get("--optim.learning-rate", 1e-3))
with open(out / "runs.txt", "a") as runs:
    print("start", " ".join(argv), file=runs, flush=True)
    if experts == 1:
        print("error: K=2 exceeds experts=1", file=sys.stderr)
        sys.exit(2)
    if rate > 5e-3:
        raise RuntimeError("out of memory")
    bits = float("nan") if "--samples" in options else (math.log10(rate) + 3) ** 2 + 1 / experts
    with open(out / "metrics.jsonl", "w") as metrics:
        print(json.dumps({"step": 10, "validation_bits_per_byte": bits}), file=metrics)
    time.sleep(float(options["--optim.decay"]) if "--optim.decay" in options else 0)
    values = [{"name": "validation_bits_per_byte", "unit": "bits", "value": bits},
              {"name": "tokens_per_second", "unit": "tokens/s", "value": 1000 / experts}]
    result = {"measurements": values, "environment": {"device": "H100"}}
    (out / "result.json").write_text(json.dumps(result))
    print("end", file=runs)
"""

DRIVER = """
import sys
from moe_jax.cli import program
from moe_jax.commands import sweep
from moe_jax.study.sweep import worker

worker.REPORT_SECONDS = 0.1
fake = sys.argv[1]
call = "python experiments/train.py"
settings = sweep.PRESETS["tiny"]
sweep.EXPERIMENTS["train"] = sweep.Experiment((fake,), call, settings, sweep.PRESETS)
sys.argv = ["sweep.py", *sys.argv[2:]]
program(sweep.main)
"""


def start_sweep(folder: Path, line: str) -> subprocess.Popen[str]:
    """Starts `experiments/sweep.py train --out FOLDER/out LINE` over the stand-in."""
    fake = folder / "train.py"
    fake.write_text(FAKE)
    own = ["train", "--out", str(folder / "out"), *shlex.split(line)]
    command = [sys.executable, "-c", DRIVER, str(fake), *own]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a sweep printed (its errors, if it was to fail)."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out if code == 0 else err


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "trials.csv").open()))
