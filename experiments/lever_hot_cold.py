"""Lever 2, hot and cold experts: how fast does a model decode with a part of its experts resident?

    python experiments/lever_hot_cold.py [--out DIR] [--quick] [--seed N] [--model DIR]

A model trained on code, prose and tables (placement_model.py) reads held-out text token by token,
its experts on disk and a budget of them in memory. Reads go around the page cache (O_DIRECT), so
the tier below is the disk itself; the host_… variants have all the others in host memory instead,
and copy them on a miss or compute with them where they are. Every round runs all variants over the
same text, one after the other; ratios are medians over rounds of speeds in the same round. The
naive baseline loads each expert when it is needed, one after the other, and keeps none. The ceiling
is max(compute, bytes · (1 - h) / bandwidth) a token: compute is the all-resident time, h the hit
rate, bandwidth that of the same copies, as many at once, with nothing else running, in the same
round. All variants but low_bit_… give the same bits. Training with tiers is measured by
training_capacity.py, which this runs at the end.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

import training_capacity
from matplotlib.figure import Figure
from placement_model import held_out_texts, trained_model

from moe_jax.cli import parse_settings, program
from moe_jax.errors import UserError
from moe_jax.model.generate import generate
from moe_jax.placement.decode import TieredDecoder, save_experts
from moe_jax.placement.files import ExpertFiles
from moe_jax.placement.memory import Held, device_memory, host_memory
from moe_jax.placement.place import Step, belady
from moe_jax.placement.policy import ONLINE, make_policy
from moe_jax.placement.store import READERS, ExpertStore, Traffic
from moe_jax.result import Measurement, output_folder, write_result
from moe_jax.train.step import graph_of
from moe_jax.train.trained import Trained

QUESTION = "How fast does a model decode with only a part of its experts in memory?"
POLICY = "successor"
"""The one with most hits on the recorded trace (traces.py)."""
BUDGETS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
STRETCH = 1000
"""Characters of one domain before the next."""
WINDOW = 64
"""Tokens decoded before the attention cache starts anew."""


@dataclass(frozen=True)
class Settings:
    """Decodes with experts in tiers at several budgets."""

    out: str = "runs/lever-hot-cold"
    """Folder for result.json, the experts on disk and the plots."""
    seed: int = 0
    """Seed of the model."""
    quick: bool = False
    """A smaller model, fewer tokens and rounds."""
    model: str = ""
    """Folder of an earlier run (of traces.py, say) whose trained model is used; unset, `out`."""


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


def variants(run: Trained, folder: Path, stack: ExitStack) -> Iterator[Variant]:
    """all_resident; every policy at 25%; the best one (POLICY) at every budget; the controls at
    25% and 50%: no look-ahead, naive, blocking copies; and the other choices on a miss. Every layer
    has its quota of residents: in a common pool layers that take turns push each other out."""
    model = run.config.resolved_model()
    per_token, layers = model.moe.experts_per_token, model.moe_layers
    total = layers * model.moe.experts

    def make(name: str, policy: str, slots: int, ahead: int = 0, **choices: Any) -> Variant:
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

    ahead, everything = per_token // 2, total * open_files(folder)[0].expert_bytes
    yield make("all_resident", "static", total)
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
    """Warm-up and rounds over equal shares of the windows. Returns the steps of the rounds, and
    what the links gave in each."""
    shares = np.array_split(windows, rounds + 1)
    for variant in everything:
        decode(variant, shares[0])
        variant.decoder.store.reset()
    routing: list[np.ndarray] = []
    links: list[Bandwidth] = []
    for index, share in enumerate(shares[1:]):
        for variant in everything:
            variant.decoder.routing = routing if variant.name == "all_resident" else None
            variant.seconds.append(decode(variant, share, keep=index == 0))
            print(f"round {index}  {variant.name:22} {1 / variant.seconds[-1]:8.1f} tokens/s")
        links.append(bandwidth(folder))
    layers = everything[0].decoder.config.moe_layers
    return [(index % layers, np.unique(chosen)) for index, chosen in enumerate(routing)], links


def ratio(one: Variant, other: Variant) -> float:
    """Speed of one over the other: the median over rounds."""
    pairs = zip(one.seconds, other.seconds, strict=True)
    return float(np.median([b / a for a, b in pairs]))


class Figures:
    """What the variants' times mean: ratios, ceilings, distances."""

    def __init__(
        self, everything: list[Variant], steps: list[Step], links: list[Bandwidth]
    ) -> None:
        self.by_name = {v.name: v for v in everything}
        self.steps, self.links = steps, links
        self.full, self.naive = self.by_name["all_resident"], self.by_name["naive"]
        self.tokens = len(steps) // self.full.decoder.config.moe_layers
        self.expert_bytes = self.full.decoder.store.files.expert_bytes

    def missed(self, v: Variant) -> float:
        """Bytes a token of uses that found no resident and were not computed where they lay."""
        absent = v.traffic.uses - v.traffic.hits - v.traffic.computed
        return absent * self.expert_bytes / self.tokens

    def of_ceiling(self, v: Variant) -> float:
        """Speed over that of max(compute, missed / bandwidth), the median over rounds."""
        rounds = zip(self.full.seconds, self.links, v.seconds, strict=True)
        return float(
            np.median([max(full, self.missed(v) / link.of(v)) / own for full, link, own in rounds])
        )

    def ceiling(self, v: Variant) -> float:
        """The ceiling's speed over all_resident's."""
        return ratio(v, self.full) / self.of_ceiling(v)

    def of_belady(self, v: Variant) -> float:
        """Hits over the most that residents of that number can have."""
        model, capacity = v.decoder.config, v.decoder.store.placement.capacity
        bound = belady(self.steps, model.moe_layers, model.moe.experts, capacity)
        return v.traffic.hit_rate / max(bound.hit_rate, 1e-9)

    def best(self, share: int) -> Variant:
        """The fastest asynchronous one from disk that gives the same bits."""
        names = (*ONLINE, "no_look_ahead")
        found = [
            self.by_name[f"{n}_at_{share}"] for n in names if f"{n}_at_{share}" in self.by_name
        ]
        return max(found, key=lambda v: ratio(v, self.full))

    def exact(self) -> bool:
        """Whether all logits are the same bits, but for those of low-bit copies, and of experts
        that another processor than the device computes."""
        stores = ((v, v.decoder.store) for v in self.by_name.values())
        same = [v for v, s in stores if s.low_bit is None and (s.unified or s.on_miss == "copy")]
        expected = np.stack(self.full.logits)
        return all(np.array_equal(np.stack(v.logits), expected) for v in same)

    def low_bit_nats(self) -> float:
        """Mean KL from the exact next-token distribution to the one with low-bit copies."""
        exact, other = (
            np.stack(v.logits)[:, 0].astype(np.float64)
            for v in (self.full, self.by_name["low_bit_at_25"])
        )
        log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (exact, other))
        return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))


def describe(f: Figures, seed: int) -> list[Measurement]:
    """The figures, those with agreed names first."""
    full, at_25, at_50 = f.full, f.best(25), f.best(50)
    online = [f.by_name[f"{policy}_at_25"] for policy in ONLINE] + [
        f.by_name["no_look_ahead_at_25"]
    ]
    base = "all experts resident"
    disk, host = (float(np.median([getattr(k, n) for k in f.links])) for n in ("disk", "host"))
    rows: list[tuple[str, float | None, str, str | None]] = [
        ("decode_of_all_resident_at_50", ratio(at_50, full), f"ratio ({at_50.name})", base),
        ("decode_of_all_resident_at_25", ratio(at_25, full), f"ratio ({at_25.name})", base),
        ("decode_of_ceiling_at_50", f.of_ceiling(at_50), f"ratio ({at_50.name})", "max"),
        ("decode_of_ceiling_at_25", f.of_ceiling(at_25), f"ratio ({at_25.name})", "max"),
        ("decode_over_naive_at_25", ratio(at_25, f.naive), "ratio of speeds", "naive"),
        ("hits_of_belady_best_online", max(map(f.of_belady, online)), "fraction, 25%", "Belady"),
        ("hits_of_belady_best_online_at_50",
         f.of_belady(f.by_name["no_look_ahead_at_50"]), "fraction", "Belady"),
        ("exact", int(f.exact()), "1: all logits bit for bit equal", base),
        ("async_over_blocking_at_25",
         ratio(f.by_name[f"{POLICY}_at_25"], f.by_name["blocking_at_25"]), "ratio", "blocking"),
        ("low_bit_kl", f.low_bit_nats(), "nats/token", "exact"),
        ("read_bandwidth", disk, f"bytes/s, {READERS} threads, checked", None),
        ("host_bandwidth", host, "bytes/s, host memory to device", None),
        ("expert_bytes", f.expert_bytes, "bytes", None),
    ]  # fmt: skip
    for v in f.by_name.values():
        traffic = v.traffic
        rows += [
            (f"{v.name}.tokens_per_second", 1 / float(np.median(v.seconds)), "tokens/s", None),
            (f"{v.name}.of_all_resident", ratio(v, full), "ratio of speeds", base),
            (f"{v.name}.of_ceiling", f.of_ceiling(v), "ratio", "max"),
            (f"{v.name}.hit_rate", traffic.hit_rate, "fraction", None),
            (f"{v.name}.ahead_rate", traffic.ahead / max(1, traffic.uses), "fraction", None),
            (f"{v.name}.recall", v.decoder.store.ahead.recall, "fraction, at the end", None),
            (f"{v.name}.disk_bytes_per_token", traffic.disk_bytes / f.tokens, "bytes", None),
            (
                f"{v.name}.waited",
                traffic.waited / f.tokens * 1e3,
                "ms a token, for other threads",
                None,
            ),
            (f"{v.name}.peak_expert_bytes", traffic.peak_bytes, "bytes", None),
        ]
    return [Measurement(n, v, u, b, seeds=[seed]) for n, v, u, b in rows]


def draw(f: Figures) -> dict[str, Figure]:
    """Speed over the budget with the ceiling; and a stretch of copies, asynchronous and not."""
    shown = [f.by_name[f"{POLICY}_at_{100 * b:.0f}"] for b in BUDGETS]
    speed = Figure(figsize=(6.5, 4), layout="constrained")
    axes = speed.subplots()
    share = [100 * b for b in BUDGETS]
    axes.plot(share, [ratio(v, f.full) for v in shown], "o-", label=f"{POLICY}, look-ahead")
    axes.plot(share, [f.ceiling(v) for v in shown], "k:", label="its ceiling")
    others = {
        "no_look_ahead": ("^", "no look-ahead"),
        "host_copy": ("s", "the others in host memory, copied"),
        "host_compute": ("D", "the others in host memory, computed there"),
    }
    for name, (marker, label) in others.items():
        points = [ratio(f.by_name[f"{name}_at_{b}"], f.full) for b in (25, 50)]
        axes.plot([25, 50], points, marker, label=label)
    low_bit = ratio(f.by_name["low_bit_at_25"], f.full)
    axes.plot([25], [low_bit], "x", label="8-bit copies (not exact)")
    axes.axhline(ratio(f.naive, f.full), ls="--", color="0.5", label="naive")
    axes.set(xlabel="experts in memory, %", ylabel="speed, of all resident", ylim=(0, 1.1))
    axes.legend(frameon=False, fontsize=8)
    timeline = Figure(figsize=(9, 3.4), layout="constrained")
    panels = timeline.subplots(2, 1, sharex=True)
    for axes, name in zip(panels, (f"{POLICY}_at_25", "blocking_at_25"), strict=True):
        draw_timeline(axes, f.by_name[name].traffic)
        axes.set_title(name, fontsize=9)
    panels[-1].set_xlabel("milliseconds")
    return {"speed": speed, "timeline": timeline}


def draw_timeline(axes: Any, traffic: Traffic, seconds: float = 0.03) -> None:
    """The first copies after the warm-up, on a miss and ahead, under the time between fetches."""
    begin = traffic.fetches[0][0] if traffic.fetches else 0.0
    copied = {
        kind: [(c.begin, c.end) for c in traffic.copies if c.ahead == kind]
        for kind in (False, True)
    }
    ends, begins = [e for _, e in traffic.fetches], [b for b, _ in traffic.fetches[1:]]
    computed = list(zip(ends, begins, strict=False))
    rows = (copied[False], copied[True], computed)
    for row, (spans, color) in enumerate(zip(rows, ("red", "blue", "green"), strict=True)):
        shown = [(1e3 * (b - begin), 1e3 * (e - b)) for b, e in spans if 0 <= b - begin < seconds]
        axes.broken_barh(shown, (row, 0.8), color=f"tab:{color}")
    axes.set_yticks([0.4, 1.4, 2.4], ["copy on a miss", "copy ahead", "compute"])


def verdict(values: Mapping[str, float | int | None], reads: str) -> str:
    """The answer to the claimed 2-4x."""
    faster = values["decode_over_naive_at_25"]
    assert faster is not None
    claim = "within" if 2 <= faster <= 4 else "below" if faster < 2 else "above"
    return (
        "the article's 2-4x: more model in the same memory, yes, at a price: 4x the experts in the "
        f"memory of a quarter of them decode at {values['decode_of_all_resident_at_25']:.0%} of "
        f"the all-resident speed from disk and {values['host_copy_at_25.of_all_resident']:.0%} "
        f"from host memory, 2x at {values['decode_of_all_resident_at_50']:.0%} and "
        f"{values['host_copy_at_50.of_all_resident']:.0%}; more speed at the same "
        f"memory: {faster:.2f}x naive loading at a quarter, {claim} 2-4x; that is "
        f"{values['decode_of_ceiling_at_25']:.0%} of the ceiling, and asynchronous copies make "
        f"{values['async_over_blocking_at_25']:.2f}x of blocking ones; results are "
        f"{'bit for bit the same' if values['exact'] else 'NOT the same'}; reads {reads}; batch 1, "
        "one CPU, one model. Training with a quarter of the experts' state in memory: "
        f"{values['train_capacity_gain_at_25']:.1f}x the model in the same measured memory, at "
        f"{values['train_speed_of_all_resident_at_25']:.0%} of the speed"
    )


def main(argv: list[str]) -> None:
    """Trains or loads, decodes, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    source = Path(settings.model) if settings.model else out
    run = trained_model(source, settings.seed, settings.quick)
    folder = out / "experts"
    save_experts(folder, run.state.parameters)
    save_experts(folder / "low-bit", run.state.parameters, low_bit=True)
    rounds, count = (2, 6) if settings.quick else (7, 40)
    windows = text_windows(run, source, count)
    with ExitStack() as stack:
        everything = list(variants(run, folder, stack))
        reads = open_files(folder)[1]
        figures = Figures(everything, *measure(everything, windows, rounds, folder))
        found = describe(figures, settings.seed)
        fused = fused_seconds(run, windows) / float(np.median(figures.full.seconds))
        found.append(Measurement("all_resident_of_fused_loop", fused, "ratio", "model.generate"))
        plots = draw(figures)
    (out / "plots").mkdir(exist_ok=True)
    for name, figure in plots.items():
        figure.savefig(out / "plots" / f"{name}.png", dpi=120)
    size = training_capacity.QUICK if settings.quick else training_capacity.FULL
    found += training_capacity.measure(size, settings.seed, out)[0]
    sentence = verdict({m.name: m.value for m in found}, reads)
    write_result(
        out,
        experiment="lever_hot_cold",
        question=QUESTION,
        config=settings,
        measurements=found,
        verdict=sentence,
    )
    for m in found:
        value = "not yet" if m.value is None else f"{m.value:.4g}"
        print(f"{m.name:42} {value:>12} {m.unit}")
    print(f"\n{sentence}\n{out}/result.json, plots/*.png")


if __name__ == "__main__":
    program(main)
