"""Arms with seeds: every run is done once and kept as a file.

An arm is one way to train, such as `kd` or `scratch`. A run is an arm with a seed. Runs take
seconds to minutes, so an experiment that is stopped loses at most one of them.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.base.files import write_atomically
from moe_jax.base.signals import keeping

Run = dict[str, Any]
"""The numbers of an arm with a seed. JSON must be able to hold them."""
Runs = dict[str, list[Run]]
"""The runs of each arm, in the order of its seeds."""


def floats_of(run: Run) -> str:
    """The run's float values, as its progress line shows them."""
    shown = "  ".join(f"{key} {value:.3f}" for key, value in run.items() if type(value) is float)
    return shown[:90]


class RunStore:
    """Finished work in `folder`: one file for each name.

    A hash of `settings` is a part of every file's name. `settings` is everything that changes the
    numbers and that a caller may change, so runs of other settings are neither read nor replaced.
    """

    def __init__(self, folder: Path, settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # repr and not hash(): Python salts the hashes of strings, a new process has others.
        self.key = hashlib.blake2b(repr(settings).encode(), digest_size=4).hexdigest()
        self._opened = time.perf_counter()

    def path(self, name: str, suffix: str) -> Path:
        """The file of a piece of work."""
        return self.folder / f"{self.key}-{name}{suffix}"

    def once(
        self,
        name: str,
        compute: Callable[[], Mapping[str, Any]],
        summary: Callable[[Run], str] = floats_of,
    ) -> Run:
        """The result of `compute`, read from its file if an earlier call has finished it.

        Prints one line when it computes: seconds since the store was opened, the name, the seconds
        of this computation, and summary(result).
        """
        path = self.path(name, ".json")
        if path.exists():
            return json.loads(path.read_text())
        begin = time.perf_counter()
        with keeping(
            lambda: f"finished runs are in {self.folder}, the next start does {name} anew"
        ):
            result = dict(compute())
        # Atomic: a file that exists is complete, which is all that resuming relies on.
        write_atomically(path, json.dumps(result) + "\n")
        end = time.perf_counter()
        elapsed = f"{end - self._opened:6.0f} s"
        print(f"{elapsed}  {name:34} {end - begin:6.1f} s  {summary(result)}", flush=True)
        return result

    def arrays_once(self, name: str, structure: Any, compute: Callable[[], Any]) -> Any:
        """The same for a pytree of arrays, such as a model's parameters.

        `structure` is any tree with the treedef of compute(). The file holds only the leaves, in
        the order in which JAX flattens them.
        """
        path = self.path(name, ".npz")
        if path.exists():
            with np.load(path) as arrays:
                leaves = [jnp.asarray(arrays[f"leaf{index}"]) for index in range(len(arrays))]
        else:
            leaves = jax.tree.leaves(compute())
            named = {f"leaf{index}": np.asarray(leaf) for index, leaf in enumerate(leaves)}
            content = io.BytesIO()
            np.savez(content, **named)  # pyright: ignore[reportArgumentType]
            write_atomically(path, content.getvalue())
        return jax.tree.unflatten(jax.tree.structure(structure), leaves)


def run_arms(
    store: RunStore,
    plan: Mapping[str, Sequence[int]],
    run_one: Callable[[str, int], Mapping[str, Any]],
    *,
    prefix: str = "",
    summary: Callable[[Run], str] = floats_of,
) -> Runs:
    """run_one(arm, seed) for each arm of `plan` with each of its seeds, unless it is in the store.

    `prefix` begins the names of the runs in the store. Seeds are the outer loop: an experiment that
    is stopped has all arms of some seeds, and pairs are what intervals are made of.
    """
    runs: Runs = {arm: [] for arm in plan}
    for seed in dict.fromkeys(seed for seeds in plan.values() for seed in seeds):
        for arm, seeds in plan.items():
            if seed in seeds:
                compute = partial(run_one, arm, seed)
                runs[arm].append(store.once(f"{prefix}{arm}-{seed}", compute, summary))
    return runs


def seed_values(runs: Runs, arm: str, key: str = "bits") -> list[Any]:
    """One number of an arm's runs, a value a seed."""
    return [run[key] for run in runs[arm]]
