"""Gluon: the two forward products, with warps that copy and warps that multiply.

A program has partitions of warps that meet only at barriers in shared memory (mbarrier):

- `load` fills STAGES buffers in turn: the matrix by bulk tensor copies (TMA), and the rows by TMA
  where they are contiguous. Gathered rows go by TMA's gather on Blackwell. They go by cp.async on
  Hopper, whose TMA cannot gather.
- `multiply`, once or twice, empties them: wgmma into registers on Hopper, tcgen05 into tensor
  memory on Blackwell. Then it applies the epilogue.

Programs are persistent. `load` runs ahead into the next tile while `multiply` is in its epilogue.
All count the same turns: buffer turn % STAGES, and the phase of its barriers is the parity of
turn // STAGES.

A tile has BM rows and two halves of BN columns, each with its accumulator: a SwiGLU's gate and up,
or neighbours. Blocks, rows and offsets are as in experts/kernel.py. TMA clips a box at the end of
an array and fills the rest with zeros, so the depth and the columns need no mask.
"""

# Gluon annotates a kernel's constants with a class of its own, and takes numbers for them.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import blackwell, hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from moe_kernels.experts.tile import locate as pointer_locate

locate = gluon.jit(pointer_locate.fn)


@gluon.jit
def load(rows, matrix, assignment, plan, buffers, full, empty,
         S: gl.constexpr, KD: gl.constexpr, K: gl.constexpr, T: gl.constexpr, WIDTH: gl.constexpr,
         SECOND: gl.constexpr, GATHER: gl.constexpr, GENERIC: gl.constexpr, TILES: gl.constexpr,
         BLOCKS: gl.constexpr, PROGRAMS: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """Fills the buffers. WIDTH: columns from a tile to the next. SECOND: those from a tile's first
    half to its second.

    GATHER: the rows of a block's tokens, by threads (cp.async) with GENERIC, and otherwise by TMA.
    """
    block_expert, starts, counts = plan
    a, first, second = buffers
    STAGES: gl.constexpr = a.shape[0]
    BM: gl.constexpr = a.shape[1]
    BK: gl.constexpr = a.shape[2]
    copied: gl.constexpr = 2 * matrix.nbytes_per_cta + (0 if GENERIC else BM * BK * 2)
    turn = 0
    for tile in range(gl.program_id(0), BLOCKS * TILES, PROGRAMS):
        expert, block, column, used = locate(
            tile, block_expert, starts, counts, TILES=TILES, BM=BM, GROUP=GROUP)  # fmt: skip
        if used:
            if GENERIC:
                # 16 bytes a thread, a row of a buffer by the threads of a quarter of a warp.
                spread: gl.constexpr = gl.BlockedLayout(
                    [1, 8], [256 // BK, BK // 8], [gl.num_warps(), 1], [1, 0])  # fmt: skip
                row = gl.arange(0, BM, gl.SliceLayout(1, spread))
                k = gl.arange(0, BK, gl.SliceLayout(0, spread))
                chosen = gl.load(assignment + block * BM + row)
                real = chosen < S
                token = gl.where(real, chosen // K, 0).to(gl.int64)
                source = rows + token[:, None] * KD + k[None, :]
            elif GATHER:
                spread: gl.constexpr = gl.BlockedLayout(
                    [1, 4], [32, 1], [1, gl.num_warps()], [1, 0])  # fmt: skip
                row = gl.arange(0, BM, gl.SliceLayout(0, spread))
                chosen = gl.load(assignment + block * BM + row)
                token = gl.where(chosen < S, chosen // K, T)  # past the end: TMA gives zeros
            for step in range(0, gl.cdiv(KD, BK)):
                stage = turn % STAGES
                ready = full.index(stage)
                depth = step * BK
                mbarrier.wait(empty.index(stage), (turn // STAGES & 1) ^ 1)  # free at the start
                mbarrier.expect(ready, copied)
                n = column * WIDTH
                tma.async_load(matrix, [expert, depth, n], ready, first.index(stage))
                tma.async_load(matrix, [expert, depth, n + SECOND], ready, second.index(stage))
                if GENERIC:
                    inside = real[:, None] & (k < KD - depth)[None, :]
                    async_copy.async_load(a.index(stage), source + depth, mask=inside)
                    # Each thread arrives once its copies are there: the barrier counts threads.
                    async_copy.mbarrier_arrive(ready, increment_count=False)
                elif GATHER:
                    blackwell.tma.async_gather(rows, token, depth, ready, a.index(stage))
                else:
                    tma.async_load(rows, [block * BM, depth], ready, a.index(stage))
                turn += 1


@gluon.jit
def multiply(plan, outputs, buffers, full, empty, done, order,
             ME: gl.constexpr, TAKERS: gl.constexpr, N: gl.constexpr, STEPS: gl.constexpr,
             SWIGLU: gl.constexpr, SAVE: gl.constexpr, GENERIC: gl.constexpr,
             TENSOR_MEMORY: gl.constexpr, TILES: gl.constexpr, BLOCKS: gl.constexpr,
             PROGRAMS: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """Empties the buffers and stores tiles of an output with N columns.

    Of TAKERS partitions that multiply, number ME takes each TAKERS-th tile. With two, the epilogue
    of one runs beside the products of the other, whose tile is next in the buffers. `order` lets
    one begin when the other has begun all of its steps: a wait for a parity tells phases apart only
    where no more than one is missing.
    GENERIC: the rows were copied by threads and not by TMA.
    """
    block_expert, starts, counts = plan
    BM: gl.constexpr = buffers[0].shape[1]
    turn = 0
    tiles = 0
    for tile in range(gl.program_id(0), BLOCKS * TILES, PROGRAMS):
        _expert, block, column, used = locate(
            tile, block_expert, starts, counts, TILES=TILES, BM=BM, GROUP=GROUP)  # fmt: skip
        if used:
            if tiles % TAKERS == ME:
                turns = tiles // TAKERS  # before this one
                mbarrier.wait(order.index(ME), (turns & 1) ^ (ME == 0))  # the first one is free
                following = order.index((ME + 1) % TAKERS)
                if TENSOR_MEMORY:
                    one, two = tensor_products(
                        buffers, full, empty, turn, following=following, done=done.index(ME),
                        parity=turns & 1, STEPS=STEPS, GENERIC=GENERIC)  # fmt: skip
                else:
                    one, two = register_products(
                        buffers, full, empty, turn, following=following, STEPS=STEPS,
                        GENERIC=GENERIC)  # fmt: skip
                finish(one, two, outputs, block * BM, column,
                       N=N, SWIGLU=SWIGLU, SAVE=SAVE)  # fmt: skip
            turn += STEPS
            tiles += 1


@gluon.jit
def finish(one, two, outputs, row, column, N: gl.constexpr, SWIGLU: gl.constexpr,
           SAVE: gl.constexpr):  # fmt: skip
    """Stores a tile's halves as they are, or their SwiGLU, and z with SAVE."""
    z, out = outputs
    BN: gl.constexpr = one.shape[1]
    if SWIGLU:
        n = column * BN
        if SAVE:
            put(one, z, row, n, 2 * N, N)
            put(two, z + N, row, n, 2 * N, N)
        put(one / (1 + gl.exp(-one)) * two, out, row, n, N, N)
    else:
        n = 2 * column * BN
        put(one, out, row, n, N, N)
        put(two, out, row, n + BN, N, N)


@gluon.jit
def register_products(buffers, full, empty, turn, following,
                      STEPS: gl.constexpr, GENERIC: gl.constexpr):  # fmt: skip
    """Both halves' products, in registers (wgmma). A step's run on while the next ones start."""
    a, first, second = buffers
    STAGES: gl.constexpr = a.shape[0]
    BM: gl.constexpr = a.shape[1]
    BK: gl.constexpr = a.shape[2]
    BN: gl.constexpr = first.shape[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    one = gl.zeros([BM, BN], gl.float32, layout)
    two = gl.zeros([BM, BN], gl.float32, layout)
    for step in range(0, STEPS):
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), turn // STAGES & 1)
        if GENERIC:
            hopper.fence_async_shared()  # cp.async's writes, before wgmma reads them
        left = a.index(stage)
        right = first.index(stage).reshape([BK, BN])
        one = hopper.warpgroup_mma(left, right, one, is_async=True)
        right = second.index(stage).reshape([BK, BN])
        two = hopper.warpgroup_mma(left, right, two, is_async=True)
        # The two just issued may be in flight. Those of the step before are done.
        one, two = hopper.warpgroup_mma_wait(2, deps=(one, two))
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), pred=step > 0)
        turn += 1
    mbarrier.arrive(following)
    one, two = hopper.warpgroup_mma_wait(0, deps=(one, two))
    mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES))
    return one, two


@gluon.jit
def tensor_products(buffers, full, empty, turn, following, done, parity,
                    STEPS: gl.constexpr, GENERIC: gl.constexpr):  # fmt: skip
    """Both halves' products, in tensor memory (tcgen05), which frees the buffers by itself."""
    a, first, second = buffers
    STAGES: gl.constexpr = a.shape[0]
    BM: gl.constexpr = a.shape[1]
    BK: gl.constexpr = a.shape[2]
    BN: gl.constexpr = first.shape[3]
    layout: gl.constexpr = blackwell.TensorMemoryLayout((BM, BN), col_stride=1)
    one = blackwell.allocate_tensor_memory(gl.float32, [BM, BN], layout)
    two = blackwell.allocate_tensor_memory(gl.float32, [BM, BN], layout)
    for step in range(0, STEPS):
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), turn // STAGES & 1)
        if GENERIC:
            hopper.fence_async_shared()
        left = a.index(stage)
        right = first.index(stage).reshape([BK, BN])
        blackwell.tcgen05_mma(left, right, one, use_acc=step > 0)
        right = second.index(stage).reshape([BK, BN])
        blackwell.tcgen05_mma(left, right, two, use_acc=step > 0, mbarriers=[empty.index(stage)])
        turn += 1
    mbarrier.arrive(following)
    blackwell.tcgen05_commit(done)
    mbarrier.wait(done, parity)
    return one.load(), two.load()


@gluon.jit
def put(value, pointer, row, column, STRIDE: gl.constexpr, END: gl.constexpr):
    """Stores float32 values, narrowed, from `row` and `column` on. Columns from END on are left."""
    BM: gl.constexpr = value.shape[0]
    BN: gl.constexpr = value.shape[1]
    # 16 bytes a thread, so 8 or 16 threads a row.
    spread: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BN, BN // 8], [gl.num_warps(), 1], [1, 0])  # fmt: skip
    value = gl.convert_layout(value.to(pointer.dtype.element_ty), spread)
    i = row + gl.arange(0, BM, gl.SliceLayout(1, spread))
    j = column + gl.arange(0, BN, gl.SliceLayout(0, spread))
    gl.store(pointer + i.to(gl.int64)[:, None] * STRIDE + j[None, :], value,
             mask=(j < END)[None, :])  # fmt: skip


@gluon.jit
def run(rows, matrix, assignment, plan, outputs,
        S: gl.constexpr, KD: gl.constexpr, N: gl.constexpr, K: gl.constexpr, T: gl.constexpr,
        GATHER: gl.constexpr, SWIGLU: gl.constexpr, SAVE: gl.constexpr,
        TENSOR_MEMORY: gl.constexpr, TILES: gl.constexpr, BLOCKS: gl.constexpr,
        PROGRAMS: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
        BK: gl.constexpr, STAGES: gl.constexpr, LOADERS: gl.constexpr,
        REGISTERS: gl.constexpr, TAKERS: gl.constexpr, SHARE: gl.constexpr):  # fmt: skip
    """Buffers, barriers and the two partitions. LOADERS warps of REGISTERS registers load."""
    dtype: gl.constexpr = matrix.dtype
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    a = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], rows_layout)
    first = gl.allocate_shared_memory(dtype, [STAGES, 1, BK, BN], matrix.layout)
    second = gl.allocate_shared_memory(dtype, [STAGES, 1, BK, BN], matrix.layout)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    done = mbarrier.allocate_mbarrier(batch=TAKERS)
    order = mbarrier.allocate_mbarrier(batch=TAKERS)
    GENERIC: gl.constexpr = GATHER and not TENSOR_MEMORY  # Hopper's TMA gathers no rows
    for stage in gl.static_range(STAGES):
        # TMA arrives once for all of its copies, cp.async once for each thread.
        mbarrier.init(full.index(stage), count=1 + 32 * LOADERS if GENERIC else 1)
        mbarrier.init(empty.index(stage), count=1)
    for taker in gl.static_range(TAKERS):
        mbarrier.init(done.index(taker), count=1)
        mbarrier.init(order.index(taker), count=1)
    hopper.fence_async_shared()  # the barriers, before TMA arrives at them
    buffers = (a, first, second)
    # The second half is the up projection's columns, or the neighbour of the first.
    SECOND: gl.constexpr = N if SWIGLU else BN
    WIDTH: gl.constexpr = BN if SWIGLU else 2 * BN
    STEPS: gl.constexpr = (KD + BK - 1) // BK
    # Arguments are written out: a tuple in a variable would turn constants into values.
    if TAKERS == 1:
        gl.warp_specialize([
            (multiply, (plan, outputs, buffers, full, empty, done, order, 0, TAKERS, N, STEPS,
                        SWIGLU, SAVE, GENERIC, TENSOR_MEMORY, TILES, BLOCKS, PROGRAMS, GROUP)),
            (load, (rows, matrix, assignment, plan, buffers, full, empty, S, KD, K, T, WIDTH,
                    SECOND, GATHER, GENERIC, TILES, BLOCKS, PROGRAMS, GROUP)),
        ], [LOADERS], [REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (multiply, (plan, outputs, buffers, full, empty, done, order, 0, TAKERS, N, STEPS,
                        SWIGLU, SAVE, GENERIC, TENSOR_MEMORY, TILES, BLOCKS, PROGRAMS, GROUP)),
            (multiply, (plan, outputs, buffers, full, empty, done, order, 1, TAKERS, N, STEPS,
                        SWIGLU, SAVE, GENERIC, TENSOR_MEMORY, TILES, BLOCKS, PROGRAMS, GROUP)),
            (load, (rows, matrix, assignment, plan, buffers, full, empty, S, KD, K, T, WIDTH,
                    SECOND, GATHER, GENERIC, TILES, BLOCKS, PROGRAMS, GROUP)),
        ], [gl.num_warps(), LOADERS], [SHARE, REGISTERS])  # fmt: skip


@gluon.jit
def up_async_kernel(x, gate_up, assignment, block_expert, starts, counts, z, hidden,
                    S: gl.constexpr, KD: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
                    T: gl.constexpr, SAVE: gl.constexpr,
                    TENSOR_MEMORY: gl.constexpr, TILES: gl.constexpr, BLOCKS: gl.constexpr,
                    PROGRAMS: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr,
                    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
                    LOADERS: gl.constexpr, REGISTERS: gl.constexpr,
                    TAKERS: gl.constexpr, SHARE: gl.constexpr):  # fmt: skip
    """experts.kernel.up_kernel: z[r] = x[token of r] gate_up[e], hidden[r] its SwiGLU."""
    run(x, gate_up, assignment, (block_expert, starts, counts), (z, hidden),
        S=S, KD=KD, N=N, K=K, T=T, GATHER=True, SWIGLU=True, SAVE=SAVE,
        TENSOR_MEMORY=TENSOR_MEMORY, TILES=TILES, BLOCKS=BLOCKS, PROGRAMS=PROGRAMS, GROUP=GROUP,
        BM=BM, BN=BN, BK=BK, STAGES=STAGES, LOADERS=LOADERS, REGISTERS=REGISTERS, TAKERS=TAKERS,
        SHARE=SHARE)  # fmt: skip


@gluon.jit
def rows_async_kernel(a_rows, matrix, assignment, block_expert, starts, counts, out,
                      S: gl.constexpr, KD: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
                      TENSOR_MEMORY: gl.constexpr, TILES: gl.constexpr, BLOCKS: gl.constexpr,
                      PROGRAMS: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr,
                      BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
                      LOADERS: gl.constexpr, REGISTERS: gl.constexpr,
                      TAKERS: gl.constexpr, SHARE: gl.constexpr):  # fmt: skip
    """experts.kernel.rows_kernel of rows as they are: out[r] = a_rows[r] matrix[e]."""
    run(a_rows, matrix, assignment, (block_expert, starts, counts), (out, out),
        S=S, KD=KD, N=N, K=K, T=0, GATHER=False, SWIGLU=False, SAVE=False,
        TENSOR_MEMORY=TENSOR_MEMORY, TILES=TILES, BLOCKS=BLOCKS, PROGRAMS=PROGRAMS, GROUP=GROUP,
        BM=BM, BN=BN, BK=BK, STAGES=STAGES, LOADERS=LOADERS, REGISTERS=REGISTERS, TAKERS=TAKERS,
        SHARE=SHARE)  # fmt: skip
