"""Memory that tells on a kernel: inputs between red zones of NaN, fresh memory that is NaN between guard bands.

    memory = Memory(device)
    x = memory.place(x)                      # the same values, strides and alignment
    with memory:
        y = kernels.softmax(x)               # every torch.empty of the op is guarded
    memory.problems()                        # what was written where nothing should have been

An element that is never written, and a read beyond an input that reaches a result, end as NaN; a write outside an
output, or into an input, changes a band. Unseen: a read whose value is thrown away, a write beyond `BAND` bytes.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BAND = 1 << 16  # bytes on either side: more than a tile of rows could overshoot in a call of this size
RED, FRESH = -1, 0x7FC1  # 16-bit patterns: NaN in every floating dtype, and not each other's
BEYOND = 2**31  # a "far" tensor ends after this many elements
ALLOCATORS = [(torch, name) for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "zeros")]
_allocate = torch.empty


class Memory:
    """Guards what is placed, and what is allocated inside `with`. Other patterns tell `red` NaNs from `fresh` ones."""

    def __init__(self, device: torch.device, red: int = RED, fresh: int = FRESH) -> None:
        self.device, self.red, self.fresh = device, red, fresh
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []  # all of the memory, a copy of it, the tensor in it
        self.outputs: list[tuple[Tensor, int, Tensor]] = []  # all of the memory, the tensor's bytes of it, the tensor
        self._patches = contextlib.ExitStack()

    def place(self, x: Tensor, like: Tensor | None = None, far: int | None = None) -> Tensor:
        """x on the device with the strides and misalignment of `like` (default: x), NaN around and between its rows.

        far: an axis whose stride becomes so long that the last element lies beyond 2**31 of them; nothing is filled.
        """
        like = x if like is None else like
        stride, lead = list(like.stride()), int(like.storage_offset()) % 16
        if far is not None:
            stride[far] = 16 * math.ceil(BEYOND / (x.shape[far] - 1) / 16)
        extent = 1 + sum((int(n) - 1) * int(s) for n, s in zip(x.shape, stride, strict=True)) if x.numel() else 0
        memory, flat = self._flat(lead + extent, x.dtype, self.red, lazily=far is not None)
        view = flat.as_strided(x.shape, stride, flat.storage_offset() + lead)
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in stride)
        view[once].copy_(x[once])
        if far is None:
            self.inputs.append((memory, memory.clone(), view))
        return view

    def _flat(self, count: int, dtype: torch.dtype, pattern: int, lazily: bool = False) -> tuple[Tensor, Tensor]:
        """All of the memory as 16-bit words, and the `count` elements in its middle."""
        words = BAND + math.ceil(count * dtype.itemsize / 16) * 8
        if lazily and self.device.type == "cpu":  # pages that nobody touches cost nothing
            pages = mmap.mmap(-1, 2 * words, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
            memory = torch.frombuffer(pages, dtype=torch.int16)
        else:
            memory = _allocate(words, dtype=torch.int16, device=self.device)
            if not lazily:
                memory.fill_(pattern)
        return memory, memory[BAND // 2 : words - BAND // 2].view(torch.uint8)[: count * dtype.itemsize].view(dtype)

    def __enter__(self) -> Memory:
        for owner, name in [*ALLOCATORS, (Tensor, "new_empty")]:
            self._patches.enter_context(mock.patch.object(owner, name, self._guarded(getattr(owner, name))))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _guarded(self, original: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            where = kwargs.get("device")
            shape = original(*args, **{**kwargs, "device": "meta"})  # what the caller asked for
            if where is None and args and isinstance(args[0], Tensor):
                where = args[0].device
            if torch.device(where or "cpu").type != self.device.type:
                return original(*args, **kwargs)
            size = shape.untyped_storage().nbytes()
            memory, flat = self._flat(size // shape.itemsize, shape.dtype, self.fresh)
            x = flat.as_strided(shape.shape, shape.stride(), flat.storage_offset())
            self.outputs.append((memory, size, x))
            return (x.zero_() if original.__name__ == "zeros" else x).requires_grad_(shape.requires_grad)

        return allocate

    def problems(self) -> list[str]:
        """One line for each tensor around which, or into which, something was written that should not have been."""
        wrong = []
        for memory, before, x in self.inputs:
            if changed := int((memory != before).sum()):
                wrong.append(f"wrote {2 * changed} bytes into or around an input of shape {tuple(x.shape)}")
        for memory, size, x in self.outputs:
            bands = torch.cat([memory[: BAND // 2], memory[BAND // 2 + math.ceil(size / 2) :]])
            if changed := int((bands != self.fresh).sum()):
                wrong.append(f"wrote {2 * changed} bytes outside a tensor of shape {tuple(x.shape)}")
        return wrong
