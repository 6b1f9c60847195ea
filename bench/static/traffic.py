"""Bytes that a launch moves and FLOPs of its dots, counted while it is interpreted: exact for every Triton version."""

import collections
import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

from tileformer.bench.recording import Launch
from tileformer.kernels import interpreter

PAGE = 16  # log2 of the bytes of a page of addresses


class Counter:
    """Counts by phase ("forward", "backward"): `dots` in FLOPs, and every byte that is loaded or stored, by address."""

    def __init__(self) -> None:
        self.phase = "forward"
        self.dots: collections.Counter[str] = collections.Counter()
        # Phase, "load" or "store", bytes of an element, page -> times of each.
        self.moved: dict[tuple[str, str, int, int], np.ndarray] = {}

    def launch(self, launch: Launch) -> None:
        """Interpret a launch and count."""
        # What a Python float is on a GPU; the interpreter leaves it a float.
        float32 = lambda x: tl.tensor(stock.TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)  # noqa: E731
        arguments = {
            param.name: float32(x) if type(x) is float and not param.is_constexpr else x
            for param, x in zip(launch.kernel.params, launch.arguments, strict=True)
        }
        with self.counting():
            interpreter.run(launch.kernel, launch.grid, (), arguments)

    def _touch(self, kind: str, pointers: Any, mask: Any) -> None:
        size = max(1, getattr(pointers.dtype, "scalar", pointers.dtype).element_ty.primitive_bitwidth // 8)
        at = pointers.data.reshape(-1)
        if mask is not None:
            seen = mask if isinstance(mask, np.ndarray) else mask.data  # a descriptor's is an array
            at = at[seen.reshape(-1).astype(bool)]
        at = at.astype(np.int64)
        if len(at) > 1 and not (at[1:] > at[:-1]).all():
            at = np.unique(at)  # lanes that ask for the same address in one access are one access
        if not len(at):
            return
        first, last = int(at[0]) >> PAGE, int(at[-1]) >> PAGE
        ends = np.searchsorted(at, np.arange(first + 1, last + 1) << PAGE)
        for page, inside in enumerate(np.split(at, ends), first):
            if len(inside):
                key = (self.phase, kind, size, page)
                if key not in self.moved:
                    self.moved[key] = np.zeros((1 << PAGE) // size, np.uint16)
                self.moved[key][(inside - (page << PAGE)) // size] += 1

    def bytes(self, phase: str, x: Tensor) -> tuple[int, int]:
        """(bytes moved, different bytes moved: read and written are two) of a tensor's memory."""
        start, length = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        total = distinct = 0
        for (when, _, size, page), count in self.moved.items():
            low, high = max(0, start - (page << PAGE)), start + length - (page << PAGE)
            if when == phase and low < 1 << PAGE and high > 0:
                total += size * int((here := count[low // size : high // size]).sum(dtype=np.int64))
                distinct += size * int(np.count_nonzero(here))
        return total, distinct

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        def counted(kind: str, pointers: int, mask: int, original: Any) -> Any:
            @functools.wraps(original)
            def hook(*args: Any, **kwargs: Any) -> Any:
                self._touch(kind, args[pointers], args[mask])
                return original(*args, **kwargs)

            return hook

        def dot(semantic: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
            self.dots[self.phase] += 2 * math.prod(getattr(n, "value", n) for n in (*a.shape, b.shape[-1]))
            return multiply(semantic, a, b, *args, **kwargs)

        multiply = TritonSemantic.dot
        with contextlib.ExitStack() as stack:
            for name, how in _HOOKS.items():
                hook = counted(*how, getattr(stock.InterpreterBuilder, name))
                stack.enter_context(mock.patch.object(stock.InterpreterBuilder, name, hook))
            stack.enter_context(mock.patch.object(TritonSemantic, "dot", dot))
            yield


# Kind, and which arguments are pointers and mask. Blocks and tensor descriptors end in these too.
_HOOKS = {
    "create_masked_load": ("load", 1, 2),
    "create_masked_store": ("store", 1, 3),
    "create_atomic_rmw": ("store", 2, 4),
}
