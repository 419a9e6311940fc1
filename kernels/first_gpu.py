"""The first minutes on a GPU: tests, times and tools, in steps with deadlines.

    python kernels/first_gpu.py --out DIR --minutes 9
    python kernels/first_gpu.py --out DIR --minutes 9 --part tools
    python kernels/first_gpu.py --out DIR --minutes 9 --part large
    python kernels/first_gpu.py --out DIR --minutes 4 --dry-run

DIR/first_gpu.json has the steps and their measurements. It is written anew after each of them, so a
run that is killed keeps what it has. A step that fails, hangs or crashes its process is recorded,
and the next one runs. A table ends the output. On the device for which
kernels/results/predicted.json was made, each time is compared with its prediction.

No installation is needed: kernels/README.md names the packages.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]

# The worker process imports this file again, under another name.
if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))  # moe_jax and experiments; this file's folder has moe_kernels
    from moe_kernels.first_gpu.command import main
    from moe_kernels.first_gpu.context import Settings

    peers = Settings(
        folder=ROOT,  # --out replaces it
        layers=("xla=moe_jax.moe.xla:mixture",),
        plan="moe_jax.moe.plan:plan_by_kernels",
        ladder=ROOT / "experiments/kernel_ladder/run.py",
    )
    sys.exit(main(sys.argv[1:], peers, ROOT / "kernels/results/predicted.json"))
