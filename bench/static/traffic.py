"""Bytes that a launch moves and FLOPs that its dots do, counted while the interpreter runs it. Exact, and the same for every Triton version."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from triton.runtime import interpreter as stock

from tileformer.bench.recording import Launch
from tileformer.kernels import interpreter

PAGE = 16  # log2 of the bytes of a page of addresses


class Counter:
    """Counts by phase ("forward", "backward"): `dots` in FLOPs, and every byte that is loaded or stored, by address."""

    def __init__(self) -> None:
        self.phase = "forward"
        self.dots: collections.Counter[str] = collections.Counter()
        self.moved: dict[tuple[str, str, int], np.ndarray] = {}  # (phase, "load" | "store", page) -> times that each byte moved

    def launch(self, launch: Launch) -> None:
        """Interpret a launch and count."""
        arguments = {param.name: x for param, x in zip(launch.kernel.params, launch.arguments, strict=True)}
        with self._counting():
            interpreter.run(launch.kernel, launch.grid, (), arguments)

    def _touch(self, kind: str, pointers: Any, mask: Any) -> None:
        element = getattr(pointers.dtype, "scalar", pointers.dtype).element_ty
        size = max(1, element.primitive_bitwidth // 8)
        at = pointers.data.reshape(-1).astype(np.uint64)
        if mask is not None:
            at = at[np.broadcast_to(mask.data, pointers.data.shape).reshape(-1).astype(bool)]
        pages = at >> np.uint64(PAGE)
        for page in np.unique(pages):
            count = self.moved.setdefault((self.phase, kind, int(page)), np.zeros(1 << PAGE, np.uint32))
            inside = (at[pages == page] & np.uint64((1 << PAGE) - 1)).astype(np.int64)
            np.add.at(count, inside, 1) if len(np.unique(inside)) < len(inside) else count.__setitem__(inside, count[inside] + 1)
            for byte in range(1, size):
                count[inside + byte] = count[inside]

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        builder, counter = stock.InterpreterBuilder, self
        originals = {name: getattr(builder, name) for name in _HOOKS if hasattr(builder, name)}

        def counted(name: str, original: Any) -> Any:
            @functools.wraps(original)
            def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
                _HOOKS[name](counter, *args)
                return original(self, *args, **kwargs)

            return hook

        for name, original in originals.items():
            setattr(builder, name, counted(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(builder, name, original)


def _pairs(counter: Counter, a: Any, b: Any, *rest: Any) -> None:
    counter.dots[counter.phase] += 2 * a.data.size * b.data.shape[-1]


# Everything else that loads or stores (blocks, tensor descriptors) ends in these.
_HOOKS: dict[str, Any] = {
    "create_masked_load": lambda counter, pointers, mask, *rest: counter._touch("load", pointers, mask),
    "create_masked_store": lambda counter, pointers, value, mask, *rest: counter._touch("store", pointers, mask),
    "create_atomic_rmw": lambda counter, op, pointers, value, mask, *rest: counter._touch("store", pointers, mask),
    "create_dot": _pairs,
}
