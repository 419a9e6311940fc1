"""Triton: exact top-k over all experts of a block of tokens, in registers.

The largest of a row is taken K times, and set to the minimum each time. K is small (8, at most 16)
beside the log² E steps of a sort, and no buffer is needed but the row itself. The key of a score is
its bits as an ordered integer, so that NaN has a place in the order. The lowest column wins a tie.

A row's columns are groups x experts of a group, both padded to powers of two, so that a group's
best is a reduction over the last axis. Padding has a key below every float's.
"""

import triton
import triton.language as tl

# Triton takes globals only as constexpr.
LEAST = tl.constexpr(-(2**31))
"""Below every float's key: padding, and columns that were taken."""
MINUS_INFINITY = tl.constexpr(-(2**31) + 0x7FFFFF)
"""The key of -inf: 0xFF800000 with the 31 bits below the sign flipped."""
NOT_A_NUMBER = tl.constexpr(0x7FC00000)
"""The key of NaN, above that of inf (0x7F800000)."""


@triton.jit
def ordered_key(value):
    """int32 keys that compare as jax.lax.top_k compares floats: -inf < … < -0 < 0 < … < inf < NaN.

    A NaN of either sign is on top, so that it is chosen and shows in the weights.
    """
    bits = value.to(tl.int32, bitcast=True)
    # Floats are sign and magnitude, integers two's complement: below zero the magnitude's bits are
    # flipped, because a larger magnitude is a smaller number there. `bits >> 31` is 0 or all ones.
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), NOT_A_NUMBER)


@triton.jit
def float_of_key(key):
    """The inverse of ordered_key, which is its own inverse but for NaN."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def score_of_logit(value, most, total, SIGMOID: tl.constexpr):
    """The score of a logit, given its row's largest logit and its row's sum of exponentials."""
    if SIGMOID:
        score = tl.sigmoid(value)
    else:
        score = tl.exp(value - most) / total
    return score


@triton.jit
def first_largest(key, column):
    """(largest, lowest column that holds it) along the last axis.

    Two reductions of integers take one instruction each across a warp (redux.sync). One reduction
    of the pair (key, column) takes ten shuffles.
    """
    largest = tl.max(key, axis=len(key.shape) - 1, keep_dims=True)
    at = tl.min(
        tl.where(key == largest, column, 2**31 - 1), axis=len(key.shape) - 1, keep_dims=True
    )
    return largest, at


@triton.jit
def kept_groups(key, G: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, BT: tl.constexpr,
                BG: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """Marks, of [BT, BG · BS] columns, those in the KEPT best groups.

    A group's rank is the sum of its BEST best scores.
    """
    rest = tl.reshape(key, (BT, BG, BS))
    within = tl.arange(0, BS)[None, None, :]
    sums = tl.zeros((BT, BG), tl.float32)
    # static_range: unrolled, so that `rest` stays in registers from one turn to the next.
    for _ in tl.static_range(BEST):  # pyright: ignore[reportGeneralTypeIssues]
        largest, at = first_largest(rest, within)
        # Sums need the scores themselves; sums of keys would order differently.
        sums += float_of_key(tl.reshape(largest, (BT, BG)))
        rest = tl.where(at == within, LEAST, rest)
    group = tl.arange(0, BG)[None, :]
    # The key LEAST of padding is a NaN as a float, so padded groups are put last once more.
    rank = tl.where(group < G, ordered_key(sums), LEAST)
    keep = tl.zeros((BT, BG), tl.int32)
    for _ in tl.static_range(KEPT):  # pyright: ignore[reportGeneralTypeIssues]
        _, at = first_largest(rank, group)
        keep = tl.where(at == group, 1, keep)
        rank = tl.where(at == group, LEAST, rank)
    return tl.reshape(tl.broadcast_to(keep[:, :, None], (BT, BG, BS)), (BT, BG * BS)) == 1


@triton.jit
def gate_kernel(logits, bias, experts, weights, scores,
                T: tl.constexpr, E: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
                KEPT: tl.constexpr, BEST: tl.constexpr, SIGMOID: tl.constexpr,
                BIASED: tl.constexpr, BY_LOGITS: tl.constexpr,
                NORMALISE: tl.constexpr, SCALE: tl.constexpr,
                BT: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr,
                SLOTS: tl.constexpr):  # fmt: skip
    """scores[t] = softmax or sigmoid of logits[t], experts[t] = the K best of scores + bias (or of
    the logits, BY_LOGITS), weights[t] = their scores without bias, normalised and scaled as
    api.gate says."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    real = (token < T)[:, None]
    # Column g · BS + i of the padded row is expert g · (E / G) + i.
    column = tl.arange(0, BG * BS)[None, :]
    expert = column // BS * (E // G) + column % BS
    valid = (column % BS < E // G) & (column // BS < G)
    row = token.to(tl.int64)[:, None] * E  # T · E passes 2^31 for long batches of many experts
    # Padded tokens read zeros, so that their rows have no NaN; they are never stored.
    value = tl.load(logits + row + expert, mask=real & valid, other=0.0)
    value = tl.where(valid, value, float("-inf"))
    most = tl.max(value, axis=1, keep_dims=True)
    total = tl.sum(tl.exp(value - most), axis=1, keep_dims=True)  # unused by a sigmoid
    score = score_of_logit(value, most, total, SIGMOID)
    tl.store(scores + row + expert, score, mask=real & valid)
    if BIASED:
        score += tl.load(bias + expert, mask=valid, other=0.0)
    # exp is approximate on a GPU: two logits may round to one score, which has no order.
    key = tl.where(valid, ordered_key(value if BY_LOGITS else score), LEAST)
    if KEPT < G:
        keep = kept_groups(key, G=G, KEPT=KEPT, BEST=BEST, BT=BT, BG=BG, BS=BS)
        # -inf and not LEAST: experts of other groups come last, but still before padding.
        key = tl.where(valid & (keep == 0), MINUS_INFINITY, key)

    # Slot k of [BT, SLOTS] gets the k-th column; SLOTS is K as a power of two.
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((BT, SLOTS), tl.int32)
    for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        _, at = first_largest(key, column)
        chosen = tl.where(slot == k, at, chosen)
        key = tl.where(at == column, LEAST, key)
    chosen = chosen // BS * (E // G) + chosen % BS

    # The logits of the chosen are read again (from cache): a gather in registers costs a
    # reduction each.
    own = real & (slot < K)
    logit = tl.load(logits + row + chosen, mask=own, other=0.0)
    weight = score_of_logit(logit, most, total, SIGMOID)
    weight = tl.where(slot < K, weight, 0.0)  # a sigmoid of a padded slot's 0 would be 1/2
    if NORMALISE:
        weight = weight / (tl.sum(weight, axis=1, keep_dims=True) + 1e-20)
    at = token.to(tl.int64)[:, None] * K + slot
    tl.store(experts + at, chosen, mask=own)
    tl.store(weights + at, SCALE * weight, mask=own)
