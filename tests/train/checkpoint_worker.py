"""A process of two that saves a state of which each holds a part: FOLDER PORT INDEX."""

import sys
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config import CheckpointConfig, ProcessesConfig, TrainConfig
from moe_jax.parallel.processes import connected
from moe_jax.train.checkpoint import Checkpoints

VALUES = {
    "split": np.arange(24, dtype=np.float32).reshape(4, 6),
    "whole": np.arange(5, dtype=np.float32),
}
SPECS = {"split": P("x"), "whole": P()}


def main(folder: str, port: str, index: str) -> None:
    config = ProcessesConfig(count=2, index=int(index), coordinator=f"localhost:{port}")
    with connected(config, {"folder": folder}) as peers:
        mesh = jax.make_mesh((2,), ("x",))
        state = {
            name: jax.make_array_from_callback(
                value.shape, NamedSharding(mesh, SPECS[name]), lambda at, v=value: v[at]
            )
            for name, value in VALUES.items()
        }
        assert not state["split"].is_fully_addressable
        saved = Checkpoints(Path(folder), CheckpointConfig(), peers=peers)
        extra = {"config": asdict(TrainConfig()), "tokenizer": "", "data_fingerprint": "0"}
        extra |= {"data_stats": {}, "data_state": {}, "written_by": peers.index}
        for step in (1, 2, 3):
            saved.save(step, jax.tree.map(lambda a, s=step: a * s, state), extra)
        saved.close()
        # And read again, with the two dimensions the other way round.
        across = {
            name: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=NamedSharding(mesh, P(None, "x") if a.ndim > 1 else P())
            )
            for name, a in state.items()
        }
        again = Checkpoints(Path(folder), CheckpointConfig(), peers=peers)
        restored = again.restore(across, print)
        again.close()
        assert restored is not None
        part = restored.state["split"].addressable_shards[0]
        np.testing.assert_array_equal(part.data, 3 * VALUES["split"][part.index])
        assert restored.extra["written_by"] == 0, "process 0 tells the others what it read"


if __name__ == "__main__":
    main(*sys.argv[1:])
