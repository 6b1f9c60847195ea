"""How a call is described: its tensors, how they lie in memory, and what the checks of an op need to know. The calls are in bench/check/cases.py."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Tensors = dict[str, Tensor]
Options = dict[str, Any]
Build = Callable[[Generator], tuple[Tensors, Options]]

# Ways to lay out a tensor in memory. The values stay, except that "expanded" and "scalar" repeat the first ones.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # no 16-byte alignment
    "padded": lambda x: F.pad(x, (0, 3))[..., :-3],  # rows an odd number of elements apart
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),  # the last axis is not contiguous
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1].expand(x.shape),  # stride 0 along the first axis
    "scalar": lambda x: x.flatten()[0].expand(x.shape),  # stride 0 everywhere, as the gradient of a sum
    "far": lambda x: x,  # bench/check/memory.py: the first axis reaches beyond 2**31 elements
    "far rows": lambda x: x,  # the last but one does
}
FAR_AXIS = {"far": 0, "far rows": -2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op, forward and backward.

    Args:
        build: draws its differentiable tensors (float32, to be rounded to the dtype under test) and its other arguments.
        quick: one of the few calls of `tileformer check --quick`.
        dtypes: which dtypes it is run in; the first is the one that the tests compile beside a GPU.
        suite: whether the tests compile it beside a GPU (they may compile 120 specialisations in all).
        edit: changes tensors and options in place.
        layouts: how a tensor, an option or "out" (its gradient) lies in memory: a name of LAYOUTS.
        fp32: tensors and options that stay float32.
        interpret: False for a call that would keep the interpreter busy for minutes.
        not_torch: why the torch backend is not held to it.
    """

    op: str
    name: str
    reason: str
    build: Build
    quick: bool = False
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    suite: bool = True
    edit: Callable[[Tensors, Options], Any] = lambda tensors, options: None
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fp32: tuple[str, ...] = ()
    interpret: bool = True
    not_torch: str = ""

    def inputs(self) -> tuple[Tensors, Options]:
        """The same numbers in every process."""
        tensors, options = self.build(Generator().manual_seed(zlib.crc32(f"{self.op} {self.name}".encode())))
        self.edit(tensors, options)
        for named in (tensors, options):
            named.update({name: LAYOUTS[kind](named[name]) for name, kind in self.layouts.items() if name in named})
        return tensors, options

    def unfit(self, backend: str) -> str:
        """Why a backend is not checked with this call; "" if it is."""
        if backend == "interpret" and not self.interpret:
            return "it would take minutes to interpret"
        rates = [float(x) for name, x in self.inputs()[1].items() if name in ("p", "dropout_p")]
        if backend == "torch" and any(0.0 < rate < 1.0 for rate in rates):
            return "the torch backend draws other bits"
        return self.not_torch if backend == "torch" else ""


@dataclasses.dataclass(frozen=True)
class Draw:
    """The dropout bits of an op: their rate, independence, and replay."""

    op: str
    name: str
    reason: str
    p: float
    quick: bool = False
    dtypes: tuple[str, ...] = ("bf16",)
    suite: bool = True


@dataclasses.dataclass(frozen=True)
class Op:
    """What the checks need to know about an op.

    Args:
        sizes: of (tensors, options, truth), all float64 on the CPU: for each result whose error budget is not the largest |truth|, the sum of
            the absolute values of what is added up (bench/check/budget.py). truth holds the results, and as "given out" the gradient of the output.
        draw: of (op, p, seed, device, dtype): (..., rows, columns) once from the forward and once from the backward, 0 where an element is
            dropped and else what a 1 becomes. None for an op without dropout.
    """

    sizes: Callable[[Tensors, Options, Tensors], Mapping[str, Tensor | float]] = lambda tensors, options, truth: {}
    draw: Callable[..., tuple[Tensor, Tensor]] | None = None
