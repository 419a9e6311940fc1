"""The quick main job end to end: train the default preset, kill it, continue, check the result."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

STEPS = 24
NAMES = (
    "validation_bits_per_byte",
    "gzip_bits_per_byte",
    "xz_bits_per_byte",
    "ngram_bits_per_byte",
    "tokens_per_second",
    "gemm_fraction",
    "peak_resident_bytes",
    "compile_seconds",
)


def losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of every complete line."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [(line["step"], line["loss"]) for line in lines]


def start(out: Path) -> subprocess.Popen[bytes]:
    """The default preset on the default text, a few steps of it."""
    options = ["--steps", str(STEPS), "--evaluate-every", "12", "--checkpoint.every", "5"]
    return subprocess.Popen([sys.executable, "experiments/train.py", "--out", str(out), *options])


def run_whole(out: Path) -> None:
    """Runs to the end."""
    assert start(out).wait() == 0


def run_killed(out: Path) -> None:
    """Kills the run at step 17, then gives the same command again."""
    process = start(out)
    while not any(step >= 17 for step, _ in losses(out)):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_whole(out)


def main() -> None:
    """Both runs, and what must be true of them."""
    base = Path(sys.argv[1])
    run_whole(base / "whole")
    run_killed(base / "killed")
    whole = losses(base / "whole")
    killed = losses(base / "killed")
    assert [step for step, _ in whole] == list(range(1, STEPS + 1))
    assert killed == whole, "a killed and resumed run must repeat every loss bit for bit"
    result = json.loads((base / "killed" / "result.json").read_text())
    values = {m["name"]: m["value"] for m in result["measurements"]}
    for name in NAMES:
        assert 0 < values[name] < math.inf, name
    assert (base / "killed" / "plots" / "load.png").stat().st_size > 10_000
    print("main job: resumed bit for bit;", {name: round(values[name], 4) for name in NAMES})


if __name__ == "__main__":
    main()
