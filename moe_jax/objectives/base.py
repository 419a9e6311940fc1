"""What every objective shares: one forward pass, and one place where the parts of a loss add up.

    reading = forward(model, part, length)                 # the only run of the model
    parts = losses(objective, reading, *operands)          # objective(reading, *operands) -> Loss

An objective maps a Reading to the loss of the next-token positions. Multi-token prediction, router
statistics and balance losses are collected here, for all objectives alike.

What counts. Segment 0 of a batch is padding, and every other number is a document. A position is in
the loss at offset k if the token k ahead is of the same document. A token is in the router's
statistics, balance losses and load if it is of a document. A module of multi-token prediction
counts the tokens that it reads, which are k ahead, by the loss's rule. No value at another position
reaches a loss or a gradient, not even as NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from moe_jax.data.batches import shifted_targets
from moe_jax.distill.chunked import LazyLogits
from moe_jax.distill.teacher import lazy_logits
from moe_jax.model.transformer import Transformer
from moe_jax.moe.layer import RouterStats

Batch = dict[str, Array]
"""tokens and segments, int32[B, L + 1 + mtp_depth] each (data.batches), and further arrays that an
objective reads. Rows reach beyond L, because targets are tokens to the right."""
OWN = "own"
"""Key of a batch: bool[B, L + mtp_depth], true at t where the student wrote token t + 1."""


class Part(NamedTuple):
    """A batch, or a micro-batch of it."""

    batch: Batch
    normalisers: tuple[Float[Array, ""], ...]
    """normalisers[k] counts the valid targets at offset k + 1 in the WHOLE batch, so that the
    losses of its micro-batches add up to the loss of the batch."""
    key: Array | None = None
    """The random key of this part of a training step."""
    rows: int = 1
    """Sequences of the WHOLE batch."""
    shares: tuple[Float[Array, ""], ...] | None = None
    """This part's share of the tokens that routers count: of the main model, then of each module of
    multi-token prediction. The statistics of the parts add up with it. None: the whole batch."""


@dataclass(frozen=True)
class Reading:
    """A part and the model's hidden states for it: the input of an objective. N = B·L.

    Logits are not part of it. A [B, L, V] array is the largest of a step, so an objective decides
    whether to multiply it out at once or chunk by chunk.
    """

    model: Transformer
    part: Part
    length: int
    """L: the number of tokens of each row that the model reads."""
    hidden: Float[Array, "B L D"]
    """The residual stream after the last block."""
    stats: RouterStats | None
    """Of the sparse blocks. None in a dense model, and in tiered training, which collects them."""

    @property
    def batch(self) -> Batch:
        return self.part.batch

    @property
    def tokens(self) -> Int[Array, "B L"]:
        """The tokens that the model reads."""
        return self.batch["tokens"][:, : self.length]

    @property
    def segments(self) -> Int[Array, "B L"]:
        return self.batch["segments"][:, : self.length]

    @property
    def normaliser(self) -> Float[Array, ""]:
        """Valid next-token targets of the whole batch."""
        return self.part.normalisers[0]

    @property
    def logits(self) -> LazyLogits:
        """The logits of every position, not yet multiplied out.

        They are 0 where a position has no target.
        """
        return self.logits_of(self.model, self.hidden)

    def logits_of(self, model: Transformer, hidden: Float[Array, "B L D"]) -> LazyLogits:
        """`logits` of a model's hidden states for this part, before its final norm."""
        # Before the norm, whose own gradient sums over positions.
        _, valid = self.targets()
        valid = valid.reshape(*hidden.shape[:2], 1)
        return lazy_logits(model, jnp.where(valid, hidden, 0))

    def read_by(
        self,
        model: Transformer,
        tokens: Int[Array, "B L"] | None = None,
        shift: Float[Array, "B L D"] | None = None,
    ) -> LazyLogits:
        """The logits of a model that reads this part, without dropout.

        `tokens` stand in for the part's own. `shift` is added to the embeddings.
        """
        tokens = self.tokens if tokens is None else tokens
        return self.logits_of(model, model.hidden(tokens, self.segments, shift=shift)[0])

    def targets(self) -> tuple[Int[Array, "N"], Bool[Array, "N"]]:
        """The next token of every position, and whether it lies in the same document."""
        batch = self.batch
        targets, valid = shifted_targets(batch["tokens"], batch["segments"], self.length, 1)
        return targets.reshape(-1), valid.reshape(-1)


class Loss(NamedTuple):
    """An objective's loss of the next-token positions, divided by Reading.normaliser."""

    cross_entropy: Float[Array, ""]
    """With the text, in nats. Reported for every objective."""
    other: Float[Array, ""] | None = None
    """The loss that is minimised in place of the cross-entropy. None: the cross-entropy is."""


Objective = Callable[..., Loss]
"""(reading, *operands) -> Loss. Operands are arrays that a training step takes besides state and
batch, such as a teacher's parameters: as constants they would be compiled into the program."""


class Losses(NamedTuple):
    """The losses of a part. Those of the parts of a batch add up."""

    cross_entropy: Float[Array, ""]
    mtp: Float[Array, ""]
    """Multi-token prediction, averaged over depths."""
    balance: Float[Array, ""]
    """The weighted balance losses, summed over layers."""
    stats: dict[str, RouterStats]
    """Router statistics by part of the model ("sparse", "mtp"), with a leading layer axis."""
    distillation: Float[Array, ""] | None = None
    """Loss.other."""

    def total(self, mtp_weight: float) -> Float[Array, ""]:
        """The scalar that is differentiated."""
        main = self.cross_entropy if self.distillation is None else self.distillation
        return main + mtp_weight * self.mtp + self.balance


def valid_targets(batch: Batch, length: int, offset: int = 1) -> Float[Array, ""]:
    """Number of positions that have a target `offset` ahead in the same document, at least 1.

    It divides a sum of losses, so a batch without any target gives a loss of 0 and not NaN.
    """
    return jnp.maximum(_targets(batch, length, offset), 1)


def _targets(batch: Batch, length: int, offset: int) -> Float[Array, ""]:
    _, mask = shifted_targets(batch["tokens"], batch["segments"], length, offset)
    return mask.sum().astype(jnp.float32)


def whole_batch(batch: Batch, length: int, mtp_depth: int, key: Array | None) -> Part:
    """A batch as its only part."""
    offsets = range(1, mtp_depth + 2)  # the next token, and one more for each prediction depth
    normalisers = tuple(valid_targets(batch, length, offset) for offset in offsets)
    return Part(batch, normalisers, key, rows=len(batch["tokens"]))


def part_of(whole: Part, batch: Batch, length: int, key: Array | None) -> Part:
    """A micro-batch of the batch `whole`."""
    # Offset 0 counts the tokens of documents. A module that reads k ahead counts offset k.
    shares = tuple(
        _targets(batch, length, offset) / valid_targets(whole.batch, length, offset)
        for offset in range(len(whole.normalisers))
    )
    return whole._replace(batch=batch, key=key, shares=shares)


def forward(model: Transformer, part: Part, length: int) -> Reading:
    """Runs the model on the first `length` tokens of each row."""
    tokens = part.batch["tokens"][:, :length]
    segments = part.batch["segments"][:, :length]
    hidden, stats = model.hidden(tokens, segments, key=part.key)
    return Reading(model, part, length, hidden, stats)


def losses(objective: Objective, reading: Reading, *operands: Any) -> Losses:
    """The objective's loss, multi-token prediction's, and the balance losses of all blocks."""
    main = objective(reading, *operands)
    # Each token's experts are rows of the batch. Kept, they would grow with the accumulation.
    stats = {}
    if reading.stats is not None:
        stats["sparse"] = share_of(reading.stats._replace(experts=None), reading.part, 0)
    mtp = jnp.zeros((), jnp.float32)
    if reading.model.config.mtp_depth:
        mtp, mtp_stats = mtp_loss(reading)
        stats |= mtp_stats
    return Losses(main.cross_entropy, mtp, balance_loss(stats), stats, main.other)


def balance_loss(stats: dict[str, RouterStats]) -> Float[Array, ""]:
    """The sum over all layers of all parts of the model."""
    return sum((part.loss.sum() for part in stats.values()), jnp.zeros((), jnp.float32))


def share_of(stats: RouterStats, part: Part, offset: int) -> RouterStats:
    """The part's summand of the batch's statistics. Loads and drops add up as they are.

    `offset`: 0 for the main model, k for the k-th module of multi-token prediction.
    """
    if part.shares is None:
        return stats
    share = part.shares[offset]
    return stats._replace(entropy=share * stats.entropy, loss=share * stats.loss)


def token_nats(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, ""]:
    """Sum of -log softmax(logits)[target] where the mask is true, in float32."""
    logits = logits.astype(jnp.float32)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - target, 0.0))


def mtp_loss(reading: Reading) -> tuple[Float[Array, ""], dict[str, RouterStats]]:
    """1/depth sum_k CE_k (arXiv:2412.19437, eq. 24-25), without the weight lambda.

    Tokens that the student wrote itself (OWN) are no targets: they would only confirm it.
    """
    model = reading.model
    batch = reading.batch
    length = reading.length
    own = batch.get(OWN)
    total = jnp.zeros((), jnp.float32)
    collected = []
    predictions = model.mtp.predictions(
        model, reading.hidden, batch["tokens"], batch["segments"], reading.part.key
    )
    for depth, logits, stats in predictions:
        targets, mask = shifted_targets(batch["tokens"], batch["segments"], length, depth + 1)
        if own is not None:
            # own[t] speaks of token t + 1, and the target at this depth is token t + depth + 1.
            mask &= ~own[:, depth : depth + length]
        total += token_nats(logits, targets, mask) / reading.part.normalisers[depth]
        collected.append(stats and share_of(stats._replace(experts=None), reading.part, depth))
    mean = total / model.config.mtp_depth
    if collected[0] is None:  # the blocks of the modules are dense
        return mean, {}
    stacked: Any = jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
    return mean, {"mtp": stacked}
