"""The article's claims against the gains, in sentences. Every number is a range."""

from collections.abc import Iterable, Mapping

from experiments.kernel_ladder.gains import TRAIN, Gains
from experiments.kernel_ladder.ragged_path import PUBLISHED
from experiments.kernel_ladder.ranges import Range, covering_all
from experiments.kernel_ladder.rungs import RUNGS, before

ALL_IDEAS = "raster"
"""The rung that holds every idea but for the variants."""
ARTICLE = Range(2, 5)
"""The article's gain of low-level engineering."""


def verdict(found: Mapping[str, Gains], label: str) -> str:
    """Both readings: against XLA's own path, and against what JAX users have."""
    over_xla = over(found, ALL_IDEAS, "over_xla")
    sentences = [f"{label}. Ranges are over the models."]
    if over_xla:
        sentences.append(
            f"Against XLA's own path all ideas together are {over_xla.text()}x forward"
            f"{_train(found, 'over_xla')}: {against_claim(over_xla)} the article's 2-5x."
        )
    over_ragged = over(found, ALL_IDEAS, "over_ragged_dot")
    if over_ragged:
        sentences.append(
            f"Against jax.lax.ragged_dot, which JAX users have, they are {over_ragged.text()}x "
            f"forward{_train(found, 'over_ragged_dot')}, because XLA computes every expert for "
            "every row."
        )
    absent = [shape for shape, gains in found.items() if "ragged_dot" not in gains]
    if absent:
        sentences.append(f"At the sizes of {', '.join(absent)} it does not fit into memory.")
    gains = ", ".join(f"{p.ratio}x {p.name.replace('_', ' ')}" for p in PUBLISHED)
    sentences.append(f"Published gains of Triton kernels over ragged_dot: {gains}.")
    sentences.append(
        f"Each idea over the rung that it is added to: {', '.join(idea_texts(found))}."
    )
    ptx = over(found, "ptx", "over_before")
    if ptx:
        sentences.append(f"Inline PTX is {ptx.text()}x, where the article says 4-10x.")
    return " ".join(sentences)


def over(found: Mapping[str, Gains], rung: str, field: str) -> Range | None:
    """The range over all shapes that have it."""
    ranges = [getattr(gains[rung], field) for gains in found.values() if rung in gains]
    known = [r for r in ranges if r is not None]
    return covering_all(known) if known else None


def idea_texts(found: Mapping[str, Gains]) -> Iterable[str]:
    """`async 1.5-2.5x` of every rung that is added to another."""
    for rung in RUNGS:
        gain = over(found, rung.name, "over_before")
        if before(rung) is not None and gain:
            yield f"{rung.name} {gain.text()}x"


def _train(found: Mapping[str, Gains], field: str) -> str:
    gain = over(found, TRAIN, field)
    return f" and {gain.text()}x with the backward pass" if gain else ""


def against_claim(gain: Range) -> str:
    """Where a range lies to the article's."""
    claim = ARTICLE
    if gain.high < claim.low:
        return "below"
    if gain.low > claim.high:
        return "above"
    if claim.low <= gain.low and gain.high <= claim.high:
        return "inside"
    return "partly inside"
