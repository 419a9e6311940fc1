"""Triton: exact top-k over all experts of a block of tokens, held in registers.

K times the largest of a row, as a pair (key, column) in one reduction, and out with it: the lowest
column wins a tie. K is small (8, at most 16) beside the log² E steps of a sort, and nothing but the
row itself is held. Keys are the float's bits as an ordered integer, so that NaN has a place too.

Columns are laid out as groups x experts of a group, both padded to powers of two, so that a group's
best is a reduction of the last axis; padding is below everything.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**31))
"""Below every float's key: padding, and columns that were taken."""
INFINITE = tl.constexpr(-(2**31) + 0x7FFFFF)
"""The key of -inf."""
NOT_A_NUMBER = tl.constexpr(0x7FC00000)
"""The key of NaN, above that of inf."""


@triton.jit
def ordered(value):
    """Integers that compare as jax.lax.top_k compares floats: -inf < … < -0 < 0 < … < inf < NaN,
    but NaN of either sign is on top, so that it is chosen and shows in the weights."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), NOT_A_NUMBER)


@triton.jit
def unordered(key):
    """The float of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def affinity(value, most, total, SIGMOID: tl.constexpr):
    """The score of a logit, given its row's largest and the sum of exponentials."""
    if SIGMOID:
        score = tl.sigmoid(value)
    else:
        score = tl.exp(value - most) / total
    return score


@triton.jit
def first_largest(key, column):
    """(largest, lowest column that holds it) along the last axis. Two reductions of integers, an
    instruction each across a warp; the pair (key, column) in one takes ten shuffles."""
    largest = tl.max(key, axis=len(key.shape) - 1, keep_dims=True)
    at = tl.min(
        tl.where(key == largest, column, 2**31 - 1), axis=len(key.shape) - 1, keep_dims=True
    )
    return largest, at


@triton.jit
def kept_groups(key, G: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, BT: tl.constexpr,
                BG: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """Of [BT, BG · BS] columns those in the KEPT groups whose BEST best scores have the largest
    sums."""
    rest = tl.reshape(key, (BT, BG, BS))
    within = tl.arange(0, BS)[None, None, :]
    sums = tl.zeros((BT, BG), tl.float32)
    for _ in tl.static_range(BEST):  # pyright: ignore[reportGeneralTypeIssues]
        largest, at = first_largest(rest, within)
        sums += unordered(tl.reshape(largest, (BT, BG)))
        rest = tl.where(at == within, LEAST, rest)
    group = tl.arange(0, BG)[None, :]
    rank = tl.where(group < G, ordered(sums), LEAST)
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
                BIASED: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr,
                BT: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr,
                SLOTS: tl.constexpr):  # fmt: skip
    """scores[t] = softmax or sigmoid, experts[t] = the K best of scores + bias, weights[t] theirs
    of the scores alone; see api.gate."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    real = (token < T)[:, None]
    column = tl.arange(0, BG * BS)[None, :]
    expert = column // BS * (E // G) + column % BS
    valid = (column % BS < E // G) & (column // BS < G)
    row = token.to(tl.int64)[:, None] * E
    value = tl.load(logits + row + expert, mask=real & valid, other=0.0)
    value = tl.where(valid, value, float("-inf"))
    most = tl.max(value, axis=1, keep_dims=True)
    total = tl.sum(tl.exp(value - most), axis=1, keep_dims=True)
    score = affinity(value, most, total, SIGMOID)
    tl.store(scores + row + expert, score, mask=real & valid)
    if BIASED:
        score += tl.load(bias + expert, mask=valid, other=0.0)
    key = tl.where(valid, ordered(score), LEAST)
    if KEPT < G:
        keep = kept_groups(key, G, KEPT, BEST, BT, BG, BS)
        key = tl.where(valid & (keep == 0), INFINITE, key)

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
    weight = affinity(tl.load(logits + row + chosen, mask=own, other=0.0), most, total, SIGMOID)
    weight = tl.where(slot < K, weight, 0.0)
    if NORMALISE:
        weight = weight / (tl.sum(weight, axis=1, keep_dims=True) + 1e-20)
    at = token.to(tl.int64)[:, None] * K + slot
    tl.store(experts + at, chosen, mask=own)
    tl.store(weights + at, SCALE * weight, mask=own)
