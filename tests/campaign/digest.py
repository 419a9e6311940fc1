"""Prints the step and a hash of every array of a run's newest checkpoint, as one line of JSON."""

import hashlib
import json
import sys

import jax
import numpy as np


def main(run: str) -> None:
    from moe_jax.runs.load import load_run

    trained = load_run(run)
    hashes = {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()[:16]
        for path, leaf in jax.tree_util.tree_leaves_with_path(trained.state)
    }
    print("digest", json.dumps({"step": trained.step, "arrays": hashes}, sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1])
