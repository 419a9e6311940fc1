"""Triton: a stable counting sort of the assignments by expert, in four launches.

1. histogram: how often each expert occurs in a chunk of C assignments.
2. scan: how often it occurs in the chunks before, and altogether.
3. layout: each expert's first row.
4. place: a row for every assignment. Its rank within the chunk comes from a comparison with the
   others of the chunk.

Launches of one stream run one after the other, so each may read all that the one before wrote.
Integers are written once each and never by atomics: the same bits every time. The host reads
nothing. Indices stay below S + E · BM, so 32 bits suffice.
"""

import triton
import triton.language as tl


@triton.jit
def histogram_kernel(experts, histogram,
                     S: tl.constexpr, E: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
                     BE: tl.constexpr):  # fmt: skip
    """histogram[c, e] = how many assignments of chunk c go to e."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, BE)
    count = tl.zeros((BE,), tl.int32)
    # STEP x BE comparisons at a time and not C x BE, which would not fit into registers.
    for step in range(0, C // STEP):
        index = chunk * C + step * STEP + tl.arange(0, STEP)
        # Beyond the end an assignment is to E, as one without an expert: masked at the store.
        chosen = tl.load(experts + index, mask=index < S, other=E)
        count += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(histogram + chunk * E + expert, count, mask=expert < E)


@triton.jit
def scan_kernel(histogram, before, load,
                E: tl.constexpr, CHUNKS: tl.constexpr, BC: tl.constexpr,
                BE: tl.constexpr):  # fmt: skip
    """before[c, e] = sum of histogram[:c, e], load[e] = sum of histogram[:, e], of BE experts."""
    expert = tl.program_id(0) * BE + tl.arange(0, BE)
    total = tl.zeros((BE,), tl.int32)
    for step in range(0, tl.cdiv(CHUNKS, BC)):
        chunk = step * BC + tl.arange(0, BC)
        at = chunk[:, None] * E + expert[None, :]
        inside = (chunk < CHUNKS)[:, None] & (expert < E)[None, :]
        count = tl.load(histogram + at, mask=inside, other=0)
        # cumsum is inclusive; less the count itself it is the sum of what came before.
        tl.store(before + at, total[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
        total += tl.sum(count, axis=0)
    tl.store(load + expert, total, mask=expert < E)


@triton.jit
def layout_kernel(load, counts, starts,
                  E: tl.constexpr, CAPACITY: tl.constexpr, BM: tl.constexpr,
                  BE: tl.constexpr):  # fmt: skip
    """counts[e] = min(load[e], CAPACITY); starts[e] = rows of the whole blocks before e's.

    A single program, because a scan over experts needs all of them.
    """
    expert = tl.arange(0, BE)
    count = tl.minimum(tl.load(load + expert, mask=expert < E, other=0), CAPACITY)
    padded = tl.cdiv(count, BM) * BM
    tl.store(counts + expert, count, mask=expert < E)
    tl.store(starts + expert, tl.cumsum(padded, axis=0) - padded, mask=expert < E)


@triton.jit
def place_chunk(chunk, experts, before, counts, starts, assignment, row,
                S: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Writes row of the chunk's assignments, and assignment of those rows."""
    within = tl.arange(0, C)
    index = chunk * C + within
    chosen = tl.load(experts + index, mask=index < S, other=E)
    # earlier[i, j]: i comes before j and goes to the same expert. Its column sums are ranks.
    earlier = (chosen[:, None] == chosen[None, :]) & (within[:, None] < within[None, :])
    real = chosen < E
    rank = tl.sum(earlier.to(tl.int32), axis=0)
    rank += tl.load(before + chunk * E + chosen, mask=real, other=0)
    kept = real & (rank < tl.load(counts + chosen, mask=real, other=0))
    at = tl.load(starts + chosen, mask=kept, other=0) + rank
    tl.store(row + index, tl.where(kept, at, R), mask=index < S)
    tl.store(assignment + at, index, mask=kept)


@triton.jit
def fill_block(block, counts, starts, assignment, block_expert,
               S: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """Writes the block's expert, and S into its rows of padding."""
    expert = tl.arange(0, BE)
    count = tl.load(counts + expert, mask=expert < E, other=0)
    end = tl.load(starts + expert, mask=expert < E, other=0) + tl.cdiv(count, BM) * BM
    # The owner is the first expert that has not ended. Experts without rows end where they start,
    # so they are passed over; unused blocks come after all and get the last expert.
    ended = (end <= block * BM) & (expert < E)
    owner = tl.minimum(tl.sum(ended.to(tl.int32), axis=0), E - 1)
    tl.store(block_expert + block, owner)
    row = block * BM + tl.arange(0, BM)
    padding = row - tl.load(starts + owner) >= tl.load(counts + owner)
    tl.store(assignment + row, tl.full((BM,), S, tl.int32), mask=padding)


@triton.jit
def place_kernel(experts, before, counts, starts, assignment, row, block_expert,
                 S: tl.constexpr, E: tl.constexpr, R: tl.constexpr, CHUNKS: tl.constexpr,
                 C: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """One program a chunk of assignments and one a block of rows.

    The first write rows that are used, the others padding, so no order between them is needed.
    """
    program = tl.program_id(0)
    if program < CHUNKS:
        place_chunk(program, experts, before, counts, starts,
                    assignment=assignment, row=row, S=S, E=E, R=R, C=C)  # fmt: skip
    else:
        fill_block(program - CHUNKS, counts, starts, assignment, block_expert,
                   S=S, E=E, BM=BM, BE=BE)  # fmt: skip
