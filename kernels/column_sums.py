"""Sums over rows, such as the gradient of a bias: the same input gives the same bits.

A fixed number of programs keep their parts in registers, and store them behind each other as (programs, sums, N). This
adds them up in a fixed order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileformer.kernels import device
from tileformer.kernels.launch import Launch, cdiv


@triton.jit(do_not_specialize=["G"])
def _column_sums_kernel(
    partial_ptr, out0_ptr, out1_ptr, out2_ptr, G, N, ACC: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Program (j, s): BLOCK_N columns of sum s, from partial (G, sums, N)."""
    near = tl.arange(0, BLOCK_G)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums, which = tl.num_programs(1), tl.program_id(1)
    total = tl.zeros([BLOCK_G, BLOCK_N], ACC)
    for start in range(0, G, BLOCK_G):
        offsets = ((start + near).to(tl.int64)[:, None] * sums + which) * N + cols
        # [BLOCK_G, BLOCK_N]
        total += tl.load(partial_ptr + offsets, mask=(start + near < G)[:, None] & (cols < N), other=0.0)
    # [BLOCK_N]
    out = tl.sum(total, 0)
    if which == 0:
        tl.store(out0_ptr + cols, out.to(out0_ptr.dtype.element_ty), mask=cols < N)
    elif which == 1:
        tl.store(out1_ptr + cols, out.to(out1_ptr.dtype.element_ty), mask=cols < N)
    else:
        tl.store(out2_ptr + cols, out.to(out2_ptr.dtype.element_ty), mask=cols < N)


@functools.lru_cache(maxsize=1024)
def _launch(programs: int, sums: int, n: int, dtype: torch.dtype) -> Launch:
    grid = lambda tile: (cdiv(n, tile["BLOCK_N"]), sums)  # noqa: E731
    flags = dict(ACC=tl.float64 if dtype == torch.float64 else tl.float32)
    return Launch(_column_sums_kernel, grid, flags, [dict(BLOCK_G=64, BLOCK_N=32, num_warps=4)], (programs, n))


def add_parts(parts: Tensor, *outs: Tensor) -> None:
    """Fill 1 to 3 tensors (N,) of any dtype with the sums of parts (programs, sums, N)."""
    programs, sums, n = parts.shape
    _launch(programs, sums, n, parts.dtype)(parts, *outs, *[outs[0]] * (3 - sums))


def programs_for(x: Tensor) -> int:
    """How many programs share the rows of such a kernel: two for each multiprocessor."""
    return 2 * device.multiprocessors(x.device) if x.is_cuda or device.recording() else 3
