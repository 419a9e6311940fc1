"""Decodes with every variant in turn, over the same text, and measures the links in each round."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from experiments.hot_cold.variants import Variant, open_files
from moe_jax.model.abstract import graph_of
from moe_jax.model.generate import generate
from moe_jax.placement.memory import LoadedExpert, device_memory, host_memory
from moe_jax.placement.place import Step
from moe_jax.placement.store import READERS
from moe_jax.runs.load import Trained
from moe_jax.study.domains import held_out_texts

STRETCH = 1000
"""Characters of one domain before the next."""
WINDOW = 128
"""Tokens decoded before the KV cache starts anew. The model was trained on as many."""


def decode(variant: Variant, windows: Int[np.ndarray, "N L"], keep: bool = False) -> float:
    """Reads N windows of L tokens, token by token. Returns seconds a token.

    `keep` appends the logits of every token to the variant's.
    """
    begin = time.perf_counter()
    for window in windows:
        caches = variant.decoder.empty_caches(1, WINDOW)
        for position, token in enumerate(window):
            logits, caches = variant.decoder.step(token[None], position, caches)
            if keep:
                variant.logits.append(np.asarray(logits))
        # JAX returns before it has computed: without this the last steps would not be timed.
        jax.block_until_ready(caches)
    return (time.perf_counter() - begin) / windows.size


class Bandwidth(NamedTuple):
    """Bytes a second of experts that come in random order with nothing else running.

    As many threads bring them as the store has.
    """

    disk: float
    """Checksummed reads."""
    host: float
    """From host memory to the device."""

    def of(self, variant: Variant) -> float:
        """The link that this variant's misses come over."""
        return self.host if variant.host else self.disk


def measure_bandwidth(folder: Path, seconds: float = 0.7) -> Bandwidth:
    """Both links, measured for so many seconds each."""
    files, _ = open_files(folder)
    device = jax.local_devices()[0]
    device_side = device_memory(files, READERS, device)
    host_side = host_memory(files, 4 * READERS, device, compute=False)
    copies = [host_side.read(index % files.layers, 0, files) for index in range(4 * READERS)]

    def read(order: np.random.Generator) -> LoadedExpert:
        layer = int(order.integers(files.layers))
        expert = int(order.integers(files.experts))
        return device_side.read(layer, expert, files)

    def copy(order: np.random.Generator) -> LoadedExpert:
        return device_side.copy(copies[order.integers(len(copies))])

    def rate(bring: Callable[[np.random.Generator], LoadedExpert]) -> float:
        begin = time.perf_counter()

        def run(seed: int) -> int:
            order = np.random.default_rng(seed)
            count = 0
            while time.perf_counter() - begin < seconds:
                device_side.release(bring(order))
                count += 1
            return count

        with ThreadPoolExecutor(READERS) as pool:
            count = sum(pool.map(run, range(READERS)))
        # The clock stops after the last thread's last expert, which began within the time.
        return count * files.expert_bytes / (time.perf_counter() - begin)

    result = Bandwidth(disk=rate(read), host=rate(copy))
    files.close()
    return result


def text_windows(run: Trained, corpus: Path, count: int) -> Int[np.ndarray, "N L"]:
    """At most `count` windows of held-out text whose domain changes, int32, L = WINDOW."""
    tokens: list[int] = []
    for _, text in held_out_texts(corpus, STRETCH, 300_000):
        tokens += [run.tokenizer.bos, *run.tokenizer.encode(text)]
        if len(tokens) >= count * WINDOW:
            break
    count = min(count, len(tokens) // WINDOW)
    return np.asarray(tokens[: count * WINDOW], np.int32).reshape(count, WINDOW)


def fused_seconds(run: Trained, windows: Int[np.ndarray, "N L"]) -> float:
    """Seconds a token of the model's own generate, all experts resident, one compiled loop."""
    graph = graph_of(run.config.model)
    states = (run.state.parameters, run.state.router)
    prompt = windows[:1, :1]
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        vocabulary = run.tokenizer.vocabulary
        jax.block_until_ready(
            generate(graph, states, prompt, jax.random.key(0), count=WINDOW, vocabulary=vocabulary)
        )
        seconds.append((time.perf_counter() - begin) / WINDOW)
    return float(np.median(seconds[1:]))  # the first call compiles


class Rounds(NamedTuple):
    """What the rounds recorded beside the variants' own measurements."""

    steps: list[Step]
    """(layer, its experts) of every token and layer of all rounds, in the order of decoding."""
    links: list[Bandwidth]
    """One entry a round."""


def run_rounds(
    variants: list[Variant], windows: Int[np.ndarray, "N L"], rounds: int, folder: Path
) -> Rounds:
    """A warm-up and `rounds` rounds, each of all variants over an equal share of the windows.

    Every other round runs the variants in the opposite order, so that none is always the first
    after the measurement of the links.
    """
    shares = np.array_split(windows, rounds + 1)
    for variant in variants:
        decode(variant, shares[0])
        variant.decoder.store.reset()
    routing: list[np.ndarray] = []
    links: list[Bandwidth] = []
    for index, share in enumerate(shares[1:]):
        for variant in variants[:: 1 if index % 2 else -1]:
            # The routing is the same for all variants, so one of them records it.
            variant.decoder.routing = routing if variant.name == "all_resident" else None
            variant.seconds.append(decode(variant, share, keep=index == 0))
            print(f"round {index}  {variant.name:22} {1 / variant.seconds[-1]:8.1f} tokens/s")
        links.append(measure_bandwidth(folder))
    layers = variants[0].decoder.config.moe_layers
    steps = [(index % layers, np.unique(chosen)) for index, chosen in enumerate(routing)]
    return Rounds(steps, links)
