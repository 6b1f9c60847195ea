"""Attention forward for sm_90 with explicit warp roles, in Gluon, Triton's explicit layer (3.6 to 3.9).

One program holds 64 queries of one head for each of its GROUPS consumers, four warps each, and one warp more, which
only copies (tensor-memory copies, TMA). Its key tiles i = 0 .. n - 1 go from the last that a row may see to the first,
so that the `n_masked` that cross a bound come first. Stage i of the ring, in slot i mod STAGES, is the tile K(i) of
keys and V(i - 1), the values one tile behind: what one step multiplies. A consumer's step i starts both products, and
computes the weights of tile i while the second still runs (FlashAttention-3, arXiv:2407.08608).

Barriers (mbarriers; a wait for phase p returns once completion number p, counted from 0, has happened; the kernel
passes p's parity, and a fresh barrier counts as complete for parity 1):

    barrier        count   phase p completes when                                       waited for by
    loaded         GROUPS  the GROUPS tiles of queries have landed                      each consumer, p = 0, once
    full[slot]     1       stage i = slot + p STAGES has landed (expected bytes)        each consumer, in step i
    empty[slot]    GROUPS  every consumer has read all of stage i = slot + p STAGES     the copying warp, p - 1 before
                                                                                        it fills that stage anew
    turns[group]   1       group - 1 has started the products of step p (group 0:       consumer `group`, in step p
                           the last group has started those of step p - 1)              (group 0: p - 1)

Why nothing is read early: stage i is read after full's phase i // STAGES, which takes the bytes of that very copy; the
copying warp expects those of a later one only after empty's phase i // STAGES. Why nothing is overwritten: a consumer
arrives for that phase once, after its last read of stage i. Triton lets one thread arrive for four warps, after a
barrier of the four (tests/test_attention_hopper.py looks), and each warp has waited for its own products by then. So no
wait misses a phase either, which a parity could not tell from the next but one: a phase that somebody waits for is
followed by another only after an arrival of his.

Why it ends: order all events by stage or step i, and for one i: full, the turns of the groups in order, empty. Each
waits for earlier ones alone: full(i) for empty(i - STAGES); turn(group, i) for turn(group - 1, i), or the last group's
at i - 1; empty(i) for full(i) and the turn. But a masked step i, after it has emptied stage i, waits for full(i + 1) to
have its own values: that waits for empty(i + 1 - STAGES), which with two stages or more is no later than empty(i - 1).
After the steps 0 .. n - 1 each consumer reads stage n, V(n - 1) alone; nobody waits for what was emptied or whose turn
came after that. A block of queries without any key has n = 1: one tile, wholly hidden, so that every program makes the
same steps, and none ends before its copies have landed.

Not served, and so left to the portable kernel: head sizes other than 64 and 128, float32, a left window, masks, a bias,
padding, packed sequences, ALiBi, a soft cap, dropout, scale 0, no query or no key, expanded tensors (a stride of 0),
strides or addresses that are no multiples of 16 bytes. No multicast: Triton 3.6 has none, and its form changes after.

Gluon has no interpreter. tests/test_attention_hopper.py runs this text with barriers, copies and products of its own:
order and formulas; what the compiler makes of it has never run: TILEFORMER_HOPPER=1 opts in, and asks the self-test.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tileformer.kernels.attention import mask
from tileformer.kernels.launch import Tile

# What 65,536 registers hold: consumers of 240 (three: 160), and the copying warp's 24.
TILES: dict[int, Tile] = {
    64: dict(BLOCK_N=128, GROUPS=3, STAGES=2, REGISTERS=160, num_warps=4),
    128: dict(BLOCK_N=128, GROUPS=2, STAGES=2, REGISTERS=240, num_warps=4),
}
ROWS = gl.constexpr(64)  # of queries that the four warps of a consumer multiply
LOWEST = gl.constexpr(-3.4028234663852886e38)  # below every score, and finite: 2^(-inf - LOWEST) is 0, not NaN
LOG2E = gl.constexpr(mask.LOG2E.value)

_schedule = gluon.jit(mask.schedule.fn)
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.8
_copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


class Shared(NamedTuple):
    """Shared memory, and its barriers: [slots, 1] or [1]."""

    q: Any  # [GROUPS, 1, 1, ROWS, D]
    k: Any  # [STAGES, 1, 1, BLOCK_N, D]
    v: Any
    loaded: Any
    full: Any
    empty: Any
    turns: Any


class Work(NamedTuple):
    """What one program does."""

    batch: Any
    h: Any
    h_kv: Any
    row_start: Any
    n: Any
    n_masked: Any
    T_q: Any
    T_k: Any
    high: Any  # row i sees keys up to i + high
    lse_ptr: Any  # of the head
    scale_log2: Any


class Softmax(NamedTuple):
    """What is known of each row so far; of the last tile, only the weights are not in acc yet."""

    acc: Any  # [ROWS, D]
    running_max: Any
    sum: Any


@gluon.jit
def _tile(tiles, slot):
    return tiles.index(slot).reshape([tiles.shape[3], tiles.shape[4]])


@gluon.jit
def _slot(shared, i):
    """(slot, parity) of stage i."""
    STAGES: gl.constexpr = shared.k.shape[0]
    return i & (STAGES - 1), (i & STAGES) // STAGES


@gluon.jit
def _load(i, shared, work, k_desc, v_desc, KEYS: gl.constexpr, VALUES: gl.constexpr):
    """Fill stage i once it is empty: keys of tile i, values of tile i - 1."""
    BLOCK_N: gl.constexpr = shared.k.shape[3]
    BYTES: gl.constexpr = 2 * BLOCK_N * shared.k.shape[4] * (KEYS + VALUES)
    slot, parity = _slot(shared, i)
    start = (work.n - 1 - i) * BLOCK_N
    full = shared.full.index(slot)
    mbarrier.wait(shared.empty.index(slot), parity ^ 1)
    mbarrier.expect(full, BYTES)
    if KEYS:
        _copy(k_desc, [work.batch, work.h_kv, start, 0], full, shared.k.index(slot))
    if VALUES:
        _copy(v_desc, [work.batch, work.h_kv, start + BLOCK_N, 0], full, shared.v.index(slot))


@gluon.jit
def _produce(shared, work, q_desc, k_desc, v_desc):
    """The warp that copies."""
    GROUPS: gl.constexpr = shared.q.shape[0]
    for group in gl.static_range(GROUPS):
        mbarrier.expect(shared.loaded, q_desc.block_type.nbytes)
        row = work.row_start + group * ROWS
        _copy(q_desc, [work.batch, work.h, row, 0], shared.loaded, shared.q.index(group))
    _load(0, shared, work, k_desc, v_desc, True, False)
    for i in range(1, work.n):
        _load(i, shared, work, k_desc, v_desc, True, True)
    _load(work.n, shared, work, k_desc, v_desc, False, True)


@gluon.jit
def _await_turn(i, shared, group):
    """Groups start their products in turn, so that one multiplies while another computes weights."""
    mbarrier.wait(shared.turns.index(group), (i & 1) ^ (group == 0).to(gl.int32))


@gluon.jit
def _end_turn(shared, group):
    GROUPS: gl.constexpr = shared.q.shape[0]
    mbarrier.arrive(shared.turns.index((group + 1) % GROUPS), count=1)


@gluon.jit
def _weights(s, running_max, total, scale_log2):
    """(weights, factor of the sums so far, new maximum, new sum)."""
    new_max = gl.maximum(running_max, gl.max(s, 1) * scale_log2)
    w = gl.exp2(s * scale_log2 - gl.expand_dims(new_max, 1))
    alpha = gl.exp2(running_max - new_max)
    return w, alpha, new_max, total * alpha + gl.sum(w, 1)


@gluon.jit
def _per_row(x, acc):
    """[ROWS, 1]: x beside the accumulator."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, acc.type.layout)), 1)


@gluon.jit
def _operand(w, acc, q):
    """Weights as the left operand, in registers."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return gl.convert_layout(w.to(q.dtype), LAYOUT)


@gluon.jit
def _masked_weights(i, state, zero, limit, shared, work, group):
    """Weights of tile i, which crosses a bound, and the state with the sums so far rescaled; stage i is empty then."""
    BLOCK_N: gl.constexpr = shared.k.shape[3]
    slot, parity = _slot(shared, i)
    mbarrier.wait(shared.full.index(slot), parity)
    _await_turn(i, shared, group)
    # [ROWS, BLOCK_N]
    s = hopper.warpgroup_mma(
        _tile(shared.q, group), _tile(shared.k, slot).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    _end_turn(shared, group)
    s = hopper.warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(shared.empty.index(slot), count=1)
    cols = (work.n - 1 - i) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))
    s = gl.where(gl.expand_dims(cols, 0) <= gl.expand_dims(limit, 1), s, float("-inf"))
    w, alpha, running_max, total = _weights(s, state.running_max, state.sum, work.scale_log2)
    return w, Softmax(state.acc * _per_row(alpha, state.acc), running_max, total)


@gluon.jit
def _add_values(i, w, acc, shared, group):
    """acc + the weights w of tile i - 1 times its values, from stage i."""
    slot, parity = _slot(shared, i)
    mbarrier.wait(shared.full.index(slot), parity)
    # [ROWS, D]
    acc = hopper.warpgroup_mma(_operand(w, acc, shared.q), _tile(shared.v, slot), acc, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _consume(shared, work, out_desc, group):
    """Four warps and their 64 queries."""
    BLOCK_N: gl.constexpr = shared.k.shape[3]
    D: gl.constexpr = shared.k.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    rows = work.row_start + group * ROWS + gl.arange(0, ROWS, ROW)
    limit = gl.minimum(rows + work.high, work.T_k - 1)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    state = Softmax(gl.zeros([ROWS, D], gl.float32, ACC), gl.full([ROWS], LOWEST, gl.float32, ROW),
                    gl.full([ROWS], 0.0, gl.float32, ROW))  # fmt: skip
    mbarrier.wait(shared.loaded, 0)
    for i in range(work.n_masked - 1):  # not overlapped: of weights from two loops ptxas would repack each pair
        w, state = _masked_weights(i, state, zero, limit, shared, work, group)
        state = Softmax(_add_values(i + 1, w, state.acc, shared, group), state.running_max, state.sum)
    w, state = _masked_weights(work.n_masked - 1, state, zero, limit, shared, work, group)
    acc = state.acc
    running_max = state.running_max
    total = state.sum
    p = _operand(w, acc, shared.q)
    for i in range(work.n_masked, work.n):
        slot, parity = _slot(shared, i)
        mbarrier.wait(shared.full.index(slot), parity)
        _await_turn(i, shared, group)
        # [ROWS, BLOCK_N]
        s = hopper.warpgroup_mma(
            _tile(shared.q, group), _tile(shared.k, slot).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        # [ROWS, D]
        acc = hopper.warpgroup_mma(p, _tile(shared.v, slot), acc, is_async=True)
        _end_turn(shared, group)
        s = hopper.warpgroup_mma_wait(1, deps=[s])
        w, alpha, running_max, total = _weights(s, running_max, total, work.scale_log2)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(shared.empty.index(slot), count=1)
        acc = acc * _per_row(alpha, acc)
        p = _operand(w, acc, shared.q)
    slot, parity = _slot(shared, work.n)
    mbarrier.wait(shared.full.index(slot), parity)
    acc = hopper.warpgroup_mma(p, _tile(shared.v, slot), acc, is_async=True)
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])

    some = total != 0.0  # true of NaN, so that a row with a NaN stays NaN
    total = gl.where(some, total, 1.0)
    lse = gl.where(some, running_max + gl.log2(total), float("-inf"))
    gl.store(work.lse_ptr + rows, lse, mask=rows < work.T_q)
    out = shared.q.index(group)  # nobody reads this consumer's queries any more
    _tile(shared.q, group).store((acc * _per_row(1.0 / total, acc)).to(shared.q.dtype))
    hopper.fence_async_shared()
    _copy_out(out_desc, [work.batch, work.h, work.row_start + group * ROWS, 0], out)  # rows past T_q are dropped
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["H", "group", "T_q", "T_k", "high", "section", "n_heads"])
def _attention_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, H, group, T_q, T_k, high, section, n_heads, scale,
    BLOCK_N: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: ROWS GROUPS queries of one head. Output and lse as in forward.py."""
    BLOCK_M: gl.constexpr = ROWS * GROUPS
    D: gl.constexpr = q_desc.block_type.shape[3]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    head, pid_m = _schedule((T_q + BLOCK_M - 1) // BLOCK_M, n_heads, section, True)
    h = head % H
    row_start = pid_m * BLOCK_M
    last = gl.minimum(T_k, row_start + BLOCK_M + high)
    n = gl.maximum((last + BLOCK_N - 1) // BLOCK_N, 1)
    n_unmasked = gl.maximum(gl.minimum(T_k, row_start + high + 1), 0) // BLOCK_N
    work = Work(head // H, h, h // group, row_start, n, gl.maximum(n - n_unmasked, 1), T_q, T_k, high,
                lse_ptr + head.to(gl.int64) * T_q, scale * LOG2E)  # fmt: skip

    shared = Shared(
        gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, ROWS, D], q_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout),
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER),
    )
    mbarrier.init(shared.loaded, count=GROUPS)
    for slot in gl.static_range(STAGES):
        mbarrier.init(shared.full.index(slot), count=1)
        mbarrier.init(shared.empty.index(slot), count=GROUPS)
    for group_ in gl.static_range(GROUPS):
        mbarrier.init(shared.turns.index(group_), count=1)
    hopper.fence_async_shared()
    copies = (shared, work, q_desc, k_desc, v_desc)
    first = (shared, work, out_desc, gl.to_tensor(0))
    second = (shared, work, out_desc, gl.to_tensor(1))
    if GROUPS == 2:
        gl.warp_specialize([(_consume, first), (_consume, second), (_produce, copies)], [4, 1], [REGISTERS, 24])
    else:
        third = (shared, work, out_desc, gl.to_tensor(2))
        gl.warp_specialize(
            [(_consume, first), (_consume, second), (_consume, third), (_produce, copies)],
            [4, 4, 1], [REGISTERS, REGISTERS, 24],
        )  # fmt: skip


def serves(features: mask.Features, dtype: torch.dtype) -> bool:
    """Whether this kernel computes calls with such features, of 16-byte aligned tensors with keys and queries."""
    plain = features._replace(HIGH=False, ALIGN=0, MASK_ALIGN=0, PRECISION="")
    others = any(x for name, x in plain._asdict().items() if name not in ("D", "DV", "BLOCK_D", "BLOCK_DV"))
    return not others and features.D == features.DV and features.D in TILES and dtype.itemsize == 2


def descriptors(q: Tensor, k: Tensor, v: Tensor, out: Tensor, block_n: int) -> tuple[TensorDescriptor, ...]:
    """What a copy reads or writes: ROWS queries or rows of the output, block_n keys or values, of one head."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    rows = ((q, ROWS.value), (k, block_n), (v, block_n), (out, ROWS.value))
    return tuple(TensorDescriptor.from_tensor(x, [1, 1, n, x.shape[3]], layout) for x, n in rows)
