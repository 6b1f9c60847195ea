"""Dropout on the host side: drawing seeds, thresholds, and the fast generator of the torch backend."""

import functools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tileformer.kernels import checks
from tileformer.kernels.autograd import register
from tileformer.kernels.backend import current_backend

SEED_LIMIT = 2**62


def new_seed(device: torch.device) -> Tensor:
    """A one-element int64 tensor from torch's generator of that device: no synchronisation, safe in a CUDA graph."""
    return torch.randint(SEED_LIMIT, (1,), device=device)


def new_seeds(device: torch.device, n: int) -> list[Tensor]:
    """n such tensors in one draw, each 16-byte aligned, as the launches want their tensors."""
    return list(torch.randint(SEED_LIMIT, (n, 2), device=device)[:, :1].unbind())


def given(seed: Tensor | None, like: Tensor) -> Tensor:
    """The seed, or what a kernel is handed in its place and does not read: of the same dtype, for the same binary."""
    return _absent(like.device) if seed is None else seed


@functools.lru_cache(maxsize=64)
def _absent(device: torch.device) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Philox words whose upper 31 bits reach this are kept: a rate exact to 2**-31 that fits an int32 argument."""
    return min(int(p * 2**31), 2**31 - 1)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied with; 0 for p = 1, where nothing is kept."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def dropout_keep(seed: Tensor | int, shape: Sequence[int], p: float) -> Tensor:
    """The keep mask of a call: which elements survive dropout with this seed and rate, on the backend in force.

    Args:
        seed: what the call was given as `seed`: int64, one element. An integer stands for one on the CPU.
        shape: of attention's weights, (B, H, T_q, T_k) (of packed ones, (sequences, H, longest queries, longest keys)),
            or of `dropout`'s rows, (rows, N).
        p: the call's dropout rate.

    Returns:
        Boolean, of `shape`. All backends draw the same bits, but the torch backend on a CPU its own.

    Source: Philox-4x32-7 (Salmon et al., SC 2011).
    """
    p = checks.number("dropout_keep", "p", p)
    words = checks.seeded("dropout_keep", seed, torch.device("cpu"))
    if words is None:
        raise TypeError("dropout_keep: seed is None: pass the seed that the call was given")
    checks.rate("dropout_keep", p, words, words)
    if current_backend() in ("auto", "fastest", "torch") and not words.is_cuda:
        return fast_keep(words, list(shape), p, 1.0, torch.float32) != 0.0
    return philox_keep(words, shape, p)


def philox_keep(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The keep mask, of `shape` (..., rows, columns), that `tile_ops.dropout_keep` draws; on the seed's device."""
    *lead, rows, cols = shape
    heads, low = math.prod(lead), 2**32 - 1
    along = [torch.arange(n, device=seed.device) for n in (-(-cols // 4), heads, rows)]
    word, head, row = torch.meshgrid(*along, indexing="ij")
    counter = philox([word, head, row, torch.zeros_like(row)], [seed & low, seed >> 32 & low])
    drawn = torch.stack(counter, -1).permute(1, 2, 0, 3).flatten(2)[..., :cols]
    return (drawn >> 1 >= threshold(p)).view(tuple(shape))


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four words of 32 random bits for each counter of four and key of two such words, all int64; they broadcast.

    Source: Philox-4x32-7 (Salmon et al., SC 2011).
    """
    low = 2**32 - 1
    for _ in range(7):  # a product of 32-bit words wraps in int64, and keeps its bits
        even, odd = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [odd >> 32 & low ^ counter[1] ^ key[0], odd & low, even >> 32 & low ^ counter[3] ^ key[1], even & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return counter


class _Generator(threading.local):
    """numpy's SFC64, the fastest generator at hand, restarted for every draw: that costs less than making a new one."""

    def __init__(self) -> None:
        self.sfc64 = np.random.SFC64(0)

    def words(self, seed: int, n: int) -> np.ndarray:
        """n 16-bit words, the same for the same seed."""
        words: Any = {"state": np.array([seed, seed, seed, 1], np.uint64)}
        self.sfc64.state = {"bit_generator": "SFC64", "state": words, "has_uint32": 0, "uinteger": 0}
        self.sfc64.random_raw(12, output=False)  # its author's way to mix a 64-bit seed
        return self.sfc64.random_raw(-(-n // 4)).view(np.uint16)[:n]


_generator = _Generator()


def fast_keep(seed: Tensor, shape: Sequence[int], p: float, value: float, dtype: torch.dtype) -> Tensor:
    """`value` with probability 1 - p (exact to 2**-16), else 0: what the torch backend multiplies with.

    The same seed gives the same tensor, but on the CPU not the elements that the kernels keep: Philox costs far more
    there. On a GPU, where reading the seed would stall the host, they are those of the kernels.
    """
    if seed.is_cuda:
        return philox_keep(seed, (1, *shape), p)[0].to(dtype) * value
    kept = _generator.words(int(seed), math.prod(shape)) >= min(round(p * 2**16), 2**16 - 1)
    number = _scalar(value, dtype)
    out = kept.view(np.uint8).astype(number.dtype)
    out *= number
    return torch.from_numpy(out).view(dtype).view(shape)


@functools.lru_cache
def _scalar(x: float, dtype: torch.dtype) -> Any:
    """x for numpy, which knows no bfloat16: the bits of a 16-bit float, so that 0 or 1 times them is 0 or x."""
    rounded = torch.tensor(x, dtype=dtype)
    return (rounded.view(torch.uint16) if dtype.itemsize == 2 else rounded).numpy()[()]


# torch.compile and torch.export see one op, and numpy never.
fast_keep = register(fast_keep, lambda seed, shape, *how: torch.empty(shape, dtype=how[-1], device=seed.device))
