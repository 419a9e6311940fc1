"""The ways of holding experts that lever_hot_cold compares, run over the same text in turns."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.hot_cold.model import held_out_texts
from moe_jax.base.errors import UserError
from moe_jax.model.generate import generate
from moe_jax.placement.decode import TieredDecoder
from moe_jax.placement.files import ExpertFiles
from moe_jax.placement.memory import Held, device_memory, host_memory
from moe_jax.placement.place import Step
from moe_jax.placement.policy import ONLINE, make_policy
from moe_jax.placement.store import READERS, ExpertStore
from moe_jax.placement.traffic import Traffic
from moe_jax.runs.load import Trained
from moe_jax.train.step import graph_of

POLICY = "successor"
"""The one with most hits on the recorded trace (traces.py)."""
BUDGETS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
STRETCH = 1000
"""Characters of one domain before the next."""
WINDOW = 128
"""Tokens decoded before the attention cache starts anew: as many as the model was trained on."""


@dataclass
class Variant:
    """One way of holding the experts, and what it did."""

    name: str
    decoder: TieredDecoder
    seconds: list[float] = field(default_factory=list)
    """A token, one entry a round."""
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def traffic(self) -> Traffic:
        return self.decoder.store.traffic

    @property
    def host(self) -> bool:
        """Whether the tier below is pinned host memory."""
        return self.decoder.store.host_budget > 0


def decode(variant: Variant, windows: np.ndarray, keep: bool = False) -> float:
    """Reads the windows [n, WINDOW] token by token; seconds a token."""
    begin = time.perf_counter()
    for window in windows:
        caches = variant.decoder.empty_caches(1, WINDOW)
        for position, token in enumerate(window):
            logits, caches = variant.decoder.step(token[None], position, caches)
            if keep:
                variant.logits.append(np.asarray(logits))
        jax.block_until_ready(caches)
    return (time.perf_counter() - begin) / windows.size


def open_files(folder: Path) -> tuple[ExpertFiles, str]:
    """The experts, read around the page cache where the file system can do that."""
    try:
        return ExpertFiles(folder, direct=True), "O_DIRECT"
    except UserError:
        return ExpertFiles(folder), "through the page cache: O_DIRECT is not to be had here"


def all_variants(run: Trained, folder: Path, stack: ExitStack) -> Iterator[Variant]:
    """all_resident, and the same in float32; every policy at 25%; the best one (POLICY) at every
    budget; the controls at 25% and 50%: no look-ahead, naive, blocking copies; and the other
    choices on a miss. Every layer has its quota of residents: in a common pool layers that take
    turns push each other out."""
    model = run.config.resolved_model()
    per_token, layers = model.moe.experts_per_token, model.moe_layers
    total = layers * model.moe.experts

    def make(
        name: str, policy: str, slots: int, ahead: int = 0, folder: Path = folder, **choices: Any
    ) -> Variant:
        files, _ = open_files(folder)
        frequency = np.ones(total) if policy == "static" else None
        store = ExpertStore(
            files,
            make_policy(policy, total, layers, frequency),
            device_bytes=slots * files.expert_bytes,
            working_set=per_token,
            look_ahead=ahead,
            scope="quota",
            **choices,
        )
        stack.enter_context(store)
        if policy == "static" or choices.get("host_bytes"):
            store.fill()
        decoder = TieredDecoder(
            model, run.state.parameters, run.state.router, store, look_ahead=ahead > 0
        )
        return Variant(name, decoder)

    ahead, everything = 1, total * open_files(folder)[0].expert_bytes
    yield make("all_resident", "static", total)
    yield make("all_resident_float32", "static", total, folder=folder / "float32")
    yield make("naive", "lru", per_token, blocking=True)
    for policy in ONLINE:
        yield make(f"{policy}_at_25", policy, total // 4, ahead)
    yield make("blocking_at_25", POLICY, total // 4, ahead, blocking=True)
    for budget in BUDGETS:
        slots, share = max(per_token, round(budget * total)), f"{100 * budget:.0f}"
        if budget != 0.25:
            yield make(f"{POLICY}_at_{share}", POLICY, slots, ahead)
        if budget not in (0.25, 0.5):
            continue
        yield make(f"no_look_ahead_at_{share}", POLICY, slots)
        for on_miss in ("copy", "compute"):
            name = f"host_{on_miss}_at_{share}"
            yield make(name, POLICY, slots, host_bytes=everything, on_miss=on_miss)
    low_bit, _ = open_files(folder / "low-bit")
    yield make("low_bit_at_25", POLICY, total // 4, low_bit=low_bit, low_bit_share=0.25)


class Bandwidth(NamedTuple):
    """Bytes a second of experts brought in random order with nothing else running, by as many
    threads as the store's."""

    disk: float
    """Checked reads."""
    host: float
    """From host memory to the device."""

    def of(self, variant: Variant) -> float:
        """The link that this variant's misses come over."""
        return self.host if variant.host else self.disk


def bandwidth(folder: Path, seconds: float = 0.7) -> Bandwidth:
    """Both links, measured for so many seconds each."""
    files, _ = open_files(folder)
    device = jax.local_devices()[0]
    above = device_memory(files, READERS, device)
    below = host_memory(files, 4 * READERS, device, compute=False)
    held = [below.read(index % files.layers, 0, files) for index in range(4 * READERS)]

    def read(order: np.random.Generator) -> Held:
        layer, expert = int(order.integers(files.layers)), int(order.integers(files.experts))
        return above.read(layer, expert, files)

    def copy(order: np.random.Generator) -> Held:
        return above.copy(held[order.integers(len(held))])

    def rate(bring: Callable[[np.random.Generator], Held]) -> float:
        begin = time.perf_counter()

        def run(seed: int) -> int:
            order, count = np.random.default_rng(seed), 0
            while time.perf_counter() - begin < seconds:
                above.release(bring(order))
                count += 1
            return count

        with ThreadPoolExecutor(READERS) as pool:
            count = sum(pool.map(run, range(READERS)))
        return count * files.expert_bytes / (time.perf_counter() - begin)

    found = Bandwidth(rate(read), rate(copy))
    files.close()
    return found


def text_windows(run: Trained, out: Path, count: int) -> np.ndarray:
    """Held-out text whose domain changes: int32[count, WINDOW]."""
    tokens: list[int] = []
    for _, text in held_out_texts(out, STRETCH, 300_000):
        tokens += [run.tokenizer.bos, *run.tokenizer.encode(text)]
        if len(tokens) >= count * WINDOW:
            break
    count = min(count, len(tokens) // WINDOW)
    return np.asarray(tokens[: count * WINDOW], np.int32).reshape(count, WINDOW)


def fused_seconds(run: Trained, windows: np.ndarray) -> float:
    """Seconds a token of the model's own generate, all experts resident, one compiled loop."""
    graph, states = graph_of(run.config.resolved_model()), (run.state.parameters, run.state.router)
    prompt, found = windows[:1, :1], []
    for _ in range(4):
        begin = time.perf_counter()
        vocabulary = run.tokenizer.vocabulary
        jax.block_until_ready(
            generate(graph, states, prompt, jax.random.key(0), count=WINDOW, vocabulary=vocabulary)
        )
        found.append((time.perf_counter() - begin) / WINDOW)
    return float(np.median(found[1:]))


def measure(
    everything: list[Variant], windows: np.ndarray, rounds: int, folder: Path
) -> tuple[list[Step], list[Bandwidth]]:
    """Warm-up and rounds over equal shares of the windows, every other one in the opposite order of
    variants. Returns the steps of the rounds, and what the links gave in each."""
    shares = np.array_split(windows, rounds + 1)
    for variant in everything:
        decode(variant, shares[0])
        variant.decoder.store.reset()
    routing: list[np.ndarray] = []
    links: list[Bandwidth] = []
    for index, share in enumerate(shares[1:]):
        for variant in everything[:: 1 if index % 2 else -1]:
            variant.decoder.routing = routing if variant.name == "all_resident" else None
            variant.seconds.append(decode(variant, share, keep=index == 0))
            print(f"round {index}  {variant.name:22} {1 / variant.seconds[-1]:8.1f} tokens/s")
        links.append(bandwidth(folder))
    layers = everything[0].decoder.config.moe_layers
    return [(index % layers, np.unique(chosen)) for index, chosen in enumerate(routing)], links
