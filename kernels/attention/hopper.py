"""draft"""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tileformer.kernels.attention import mask

_schedule = gluon.jit(mask.schedule.fn)
LOG2E = gl.constexpr(mask.LOG2E.value)
ROWS = gl.constexpr(64)  # of queries that a consumer, four warps, multiplies at once
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


class Ring(NamedTuple):
    k: Any  # [STAGES, 1, 1, BLOCK_N, D]
    v: Any
    full: Any  # [STAGES, 1]
    empty: Any


class Pipes(NamedTuple):
    queries: Any  # [GROUPS, 1, 1, ROWS, D]
    loaded: Any
    ring: Ring
    turns: Any  # [GROUPS, 1]


class Work(NamedTuple):
    batch: Any
    h: Any
    h_kv: Any
    row_start: Any
    n: Any
    n_unmasked: Any
    T_q: Any
    T_k: Any
    high: Any
    lse: Any
    scale_log2: Any


@gluon.jit
def _load(ring, i, work, k_desc, v_desc, K: gl.constexpr, V: gl.constexpr):
    STAGES: gl.constexpr = ring.k.shape[0]
    BLOCK_N: gl.constexpr = ring.k.shape[3]
    BYTES: gl.constexpr = BLOCK_N * ring.k.shape[4] * 2 * (K + V)
    slot = i & (STAGES - 1)
    mbarrier.wait(ring.empty.index(slot), i // STAGES & 1 ^ 1)
    mbarrier.expect(ring.full.index(slot), BYTES)
    at = (work.n - 1 - i) * BLOCK_N
    if K:
        _copy(k_desc, [work.batch, work.h_kv, at, 0], ring.full.index(slot), ring.k.index(slot))
    if V:
        _copy(v_desc, [work.batch, work.h_kv, at + BLOCK_N, 0], ring.full.index(slot), ring.v.index(slot))


@gluon.jit
def _produce(pipes, work, q_desc, k_desc, v_desc):
    GROUPS: gl.constexpr = pipes.queries.shape[0]
    for group in gl.static_range(GROUPS):
        mbarrier.expect(pipes.loaded, q_desc.block_type.nbytes)
        at = work.row_start + group * ROWS
        _copy(q_desc, [work.batch, work.h, at, 0], pipes.loaded, pipes.queries.index(group))
    _load(pipes.ring, 0, work, k_desc, v_desc, True, False)
    for i in range(1, work.n):
        _load(pipes.ring, i, work, k_desc, v_desc, True, True)
    _load(pipes.ring, work.n, work, k_desc, v_desc, False, True)


@gluon.jit
def _weights(s, running_max, total, limit, i, work, MASKED: gl.constexpr):
    """(weights, factor of the sums so far, new maximum, new sum)"""
    BLOCK_N: gl.constexpr = s.shape[1]
    scale_log2 = work.scale_log2
    if MASKED:
        cols = (work.n - 1 - i) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))
        s = gl.where(gl.expand_dims(cols, 0) <= gl.expand_dims(limit, 1), s * scale_log2, float("-inf"))
        new_max = gl.maximum(running_max, gl.max(s, 1))
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
        p = gl.exp2(s - gl.expand_dims(base, 1))
    else:
        new_max = gl.maximum(running_max, gl.max(s, 1) * scale_log2)
        base = new_max
        p = gl.exp2(s * scale_log2 - gl.expand_dims(base, 1))
    alpha = gl.exp2(running_max - base)
    return p, alpha, new_max, total * alpha + gl.sum(p, 1)


@gluon.jit
def _left(w, acc, like):
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return gl.convert_layout(w.to(like.dtype), layout)


@gluon.jit
def _step(i, acc, w, running_max, total, zero, limit, pipes, work, group, MASKED: gl.constexpr):
    GROUPS: gl.constexpr = pipes.queries.shape[0]
    STAGES: gl.constexpr = pipes.ring.k.shape[0]
    BLOCK_N: gl.constexpr = pipes.ring.k.shape[3]
    D: gl.constexpr = pipes.ring.k.shape[4]
    row_layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    slot = i & (STAGES - 1)
    k = pipes.ring.k.index(slot).reshape([BLOCK_N, D])
    v = pipes.ring.v.index(slot).reshape([BLOCK_N, D])
    q = pipes.queries.index(group).reshape([ROWS, D])
    mbarrier.wait(pipes.ring.full.index(slot), i // STAGES & 1)
    mbarrier.wait(pipes.turns.index(group), (i & 1) ^ (group == 0).to(gl.int32))
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(_left(w, acc, q), v, acc, is_async=True)
    mbarrier.arrive(pipes.turns.index((group + 1) % GROUPS), count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    w, alpha, running_max, total = _weights(s, running_max, total, limit, i, work, MASKED)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(pipes.ring.empty.index(slot), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, row_layout), 1)
    return acc, w, running_max, total


@gluon.jit
def _consume(pipes, work, out_desc, group):
    GROUPS: gl.constexpr = pipes.queries.shape[0]
    STAGES: gl.constexpr = pipes.ring.k.shape[0]
    BLOCK_N: gl.constexpr = pipes.ring.k.shape[3]
    D: gl.constexpr = pipes.ring.k.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = out_desc.dtype
    rows = work.row_start + group * ROWS + gl.arange(0, ROWS, row_layout)
    limit = gl.minimum(rows + work.high, work.T_k - 1)
    running_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.full([ROWS], 0.0, gl.float32, row_layout)
    acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    q = pipes.queries.index(group).reshape([ROWS, D])
    k = pipes.ring.k.index(0).reshape([BLOCK_N, D])
    mbarrier.wait(pipes.loaded, 0)
    mbarrier.wait(pipes.ring.full.index(0), 0)
    mbarrier.wait(pipes.turns.index(group), (group == 0).to(gl.int32))
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.arrive(pipes.turns.index((group + 1) % GROUPS), count=1)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(pipes.ring.empty.index(0), count=1)
    w, alpha, running_max, total = _weights(s, running_max, total, limit, 0, work, True)
    n_masked = gl.maximum(work.n - work.n_unmasked, 1)
    for i in range(1, n_masked):
        acc, w, running_max, total = _step(
            i, acc, w, running_max, total, zero, limit, pipes, work, group, True
        )
    for i in range(n_masked, work.n):
        acc, w, running_max, total = _step(
            i, acc, w, running_max, total, zero, limit, pipes, work, group, False
        )
    slot = work.n & (STAGES - 1)
    v = pipes.ring.v.index(slot).reshape([BLOCK_N, D])
    mbarrier.wait(pipes.ring.full.index(slot), work.n // STAGES & 1)
    acc = warpgroup_mma(_left(w, acc, q), v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    some = total != 0.0
    total = gl.where(some, total, 1.0)
    lse = gl.where(some, running_max + gl.log2(total), float("-inf"))
    gl.store(work.lse + rows, lse, mask=rows < work.T_q)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, gl.SliceLayout(1, o_layout)), 1)
    q.store(acc.to(dtype))
    fence_async_shared()
    _copy_out(out_desc, [work.batch, work.h, work.row_start + group * ROWS, 0], pipes.queries.index(group))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["H", "group", "T_q", "T_k", "high", "section", "n_heads"])
def _attention_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, H, group, T_q, T_k, high, section, n_heads, scale,
    D: gl.constexpr, BLOCK_N: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):
    BLOCK_M: gl.constexpr = ROWS * GROUPS
    head, tile = _schedule((T_q + BLOCK_M - 1) // BLOCK_M, n_heads, section, True)
    batch = head // H
    h = head % H
    row_start = tile * BLOCK_M
    last = gl.minimum(T_k, row_start + BLOCK_M + high)
    n = gl.maximum((last + BLOCK_N - 1) // BLOCK_N, 1)
    n_unmasked = gl.maximum(gl.minimum(last, row_start + high + 1), 0) // BLOCK_N
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q_desc.dtype
    queries = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D], q_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], bar)
    mbarrier.init(loaded, count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(turns.index(i), count=1)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    pipes = Pipes(queries, loaded, Ring(k_tiles, v_tiles, full, empty), turns)
    work = Work(batch, h, h // group, row_start, n, n_unmasked, T_q, T_k, high, lse_ptr + head.to(gl.int64) * T_q, scale * LOG2E)
    producer = (pipes, work, q_desc, k_desc, v_desc)
    if GROUPS == 2:
        gl.warp_specialize(
            [(_consume, (pipes, work, out_desc, gl.to_tensor(0))),
             (_consume, (pipes, work, out_desc, gl.to_tensor(1))),
             (_produce, producer)], [4, 1], [CONSUMER_REGISTERS, 24])
    else:
        gl.warp_specialize(
            [(_consume, (pipes, work, out_desc, gl.to_tensor(0))),
             (_consume, (pipes, work, out_desc, gl.to_tensor(1))),
             (_consume, (pipes, work, out_desc, gl.to_tensor(2))),
             (_produce, producer)], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24])


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor.from_tensor(x, [1, 1, rows, x.shape[3]], layout)
