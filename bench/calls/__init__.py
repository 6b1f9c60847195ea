"""One call of an op: lists of it say what is checked (cases.py, pairs.py), compiled (matrix.py), timed (workloads.py).

    call = describe("attention", "causal", "ragged tiles", 1, 2, 2, 70, 70, 64, causal=True, padding="right")
    tensors, options = call.inputs()
    out = kernels.attention(**tensors, **options)
    call.flops("forward"), call.bytes(torch.bfloat16, "backward")

What an op is (its tensors, costs and error sizes) is in ops.py, who computes it beside us in providers.py.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tileformer.bench.calls.op import MODES, Build, Options, Sizes, Tensors
from tileformer.bench.calls.ops import OPS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DROPOUT_NAMES = ("dropout_p", "p", "dropout")  # what the ops call the rate
Function = Callable[[Tensors, Options], Any]  # who computes a call: its tensors to differentiate, its other arguments

# Ways to lay out a tensor in memory. The values stay, except that "expanded" and "scalar" repeat the first ones.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # no 16-byte alignment
    "padded": lambda x: F.pad(x, (0, 3))[..., :-3],  # rows an odd number of elements apart
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),  # the last axis is not contiguous
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),  # stride 0 along the first axis
    "scalar": lambda x: x.flatten()[0].expand(x.shape),  # stride 0 everywhere, as the gradient of a sum
    "far": lambda x: x,  # bench/check/memory.py: the first axis reaches beyond 2**31 elements
    "far rows": lambda x: x,  # the last but one does
}
FAR_AXIS = {"far": 0, "far rows": -2}


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of an op, forward and backward."""

    op: str  # name of the public op, or "decoder_layer"
    name: str  # unique within a list and op
    sizes: Sizes = dataclasses.field(default_factory=dict)  # as the op's `build` wants them; of an op on rows the shape
    # What the op's `build` takes: plain arguments, and kinds of tensors that are made (mask="boolean").
    options: Options = dataclasses.field(default_factory=dict)
    build: Build | None = None  # instead of the op's own
    edit: Callable[[Tensors, Options], Any] = lambda tensors, options: None  # changes tensors and options in place
    # How a tensor, an option or "out" (its gradient) lies in memory: a name of LAYOUTS.
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reason: str = ""  # why it is in its list
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")  # it is checked in; the tests compile the first beside a GPU
    quick: bool = False  # one of the few calls of `tileformer check --quick`
    suite: bool = True  # the tests compile it beside a GPU (they may compile 120 specialisations in all)
    fp32: tuple[str, ...] = ()  # tensors and options that stay float32
    interpret: bool = True  # False for a call that would keep the interpreter busy for minutes
    not_torch: str = ""  # why the torch backend is not held to it
    draws: bool = False  # check the dropout bits of the op (rate, independence, replay) at its rate, and no values
    axis: str = ""  # the size on a plot's x-axis, if this belongs to a sweep over it; the curve is `name` without it
    modes: tuple[str, ...] = MODES  # the passes that are timed

    def inputs(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Tensors, Options]:
        """Tensors to differentiate and other arguments, rounded to `dtype`: the same numbers in every process."""
        generator = Generator(device).manual_seed(zlib.crc32(f"{self.op} {self.name}".encode()))
        tensors, options = (self.build or OPS[self.op].build)(generator, self.sizes, **self.options)
        self.edit(tensors, options)
        for named in (tensors, options):
            for name, x in named.items():
                if dtype and is_floating(x):
                    named[name] = x.to(torch.float32 if name in self.fp32 else dtype)
            named.update({name: LAYOUTS[kind](named[name]) for name, kind in self.layouts.items() if name in named})
        return tensors, options

    def untouched_inputs(self, dtype: torch.dtype) -> tuple[Tensors, Options]:
        """The same shapes on CPU memory that nobody touches, so that a large call costs nothing; integers are 0."""

        def allocate(x: Any) -> Any:
            make = torch.empty if is_floating(x) else torch.zeros
            return make(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x

        with FakeTensorMode():
            drawn = self.inputs("cpu", dtype)
        tensors, options = ({name: allocate(x) for name, x in named.items()} for named in drawn)
        return tensors, options

    @property
    def curve(self) -> str:
        """Name of the sweep that this is a point of."""
        return self.name.rsplit(" ", 2)[0]

    @property
    def dropout(self) -> float:
        """Rate of dropout, 0.0 if there is none."""
        return max((float(self.options.get(name, 0.0)) for name in DROPOUT_NAMES), default=0.0)

    def without_dropout(self) -> Call:
        """The same call with a rate of 0: what providers with different random bits agree on."""
        return dataclasses.replace(self, options=without_dropout(self.options))

    def small(self, scale: int = 1) -> Call:
        """The same call in milliseconds of a CPU: fewer batches, heads, rows and keys, same D, N, V and feature."""
        most = dict(B=2, R=8 * scale**2, T_q=64 * scale, T_k=64 * scale, F=256 * scale, C=128 * scale)
        sizes = {name: min(size, most.get(name, size)) for name, size in self.sizes.items()}
        if "H" in sizes:
            group = self.sizes["H"] // self.sizes.get("H_kv", self.sizes["H"])
            sizes["H"] = max(group, 2)
            if "H_kv" in sizes:
                sizes["H_kv"] = sizes["H"] // group
        return dataclasses.replace(self, sizes=sizes)

    def flops(self, mode: str) -> int:
        """Useful FLOPs of the matrix products; 0 for row ops. A multiply-add is two."""
        forward, backward = OPS[self.op].cost(self.sizes, self.options, 1).flops
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    def bytes(self, dtype: torch.dtype, mode: str) -> int:
        """Least bytes that must move between memory and the chip."""
        cost = OPS[self.op].cost(self.sizes, self.options, dtype.itemsize)
        return {"forward": cost.bytes[0], "backward": cost.bytes[1], "both": cost.both or sum(cost.bytes)}[mode]

    def unfit(self, backend: str) -> str:
        """Why a backend is not checked with this call; "" if it is."""
        if backend == "interpret" and not self.interpret:
            return "it would take minutes to interpret"
        if backend == "torch" and not self.draws and 0.0 < self.dropout < 1.0:
            return "the torch backend draws other bits"
        return self.not_torch if backend == "torch" else ""


def leaves_of(call: Call, tensors: Tensors) -> Tensors:
    """The tensors, asking for a gradient where the op has one."""
    return {name: x.requires_grad_(OPS[call.op].differentiable) for name, x in tensors.items()}


def is_floating(x: Any) -> bool:
    """Whether x is a floating tensor."""
    return isinstance(x, Tensor) and x.is_floating_point()


def without_dropout(options: Options) -> Options:
    """Options with a rate of 0, where there is one."""
    return {name: 0.0 if name in DROPOUT_NAMES else x for name, x in options.items()}


def function_of(namespace: Any, op: str) -> Function:
    """The op of `kernels` or of `kernels.reference`."""
    if op == "append_kv_cache":  # returns nothing: the caches are its outputs
        return lambda tensors, options: (
            getattr(namespace, op)(**tensors, **options), options["k_cache"], options["v_cache"],
        )[1:]  # fmt: skip
    return lambda tensors, options: getattr(namespace, op)(**tensors, **options)


def differentiate(
    function: Function, leaves: Tensors, options: Options, grad_output: Callable[[str, Tensor], Tensor]
) -> tuple[Tensors, Tensors]:
    """Outputs ("out", "lse", "weights") and, where any requires one, gradients ("dq"); and the outputs' gradients.

    The backward starts from grad_output(name, output).
    """
    outputs = function(leaves, options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = dict(zip(("out", "lse", "weights"), outputs, strict=False))
    results = {name: x.detach() for name, x in named.items()}
    if not any(x.requires_grad for x in outputs):
        return results, {}
    grads = {name: grad_output(name, x) for name, x in named.items()}
    gradients = torch.autograd.grad(list(named.values()), list(leaves.values()), list(grads.values()))
    return results | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}, grads


def describe(op: str, name: str, reason: str, *shape: int, **more: Any) -> Call:
    """A call by its sizes in order (Op.axes); `more` are fields of Call, and what the op's `build` takes."""
    fields = {key: more.pop(key) for key in Call.__dataclass_fields__.keys() & more.keys()}
    if not OPS[op].differentiable:
        fields.setdefault("modes", MODES[:1])
    axes = next(names.split() for names in OPS[op].axes if len(names.split()) == len(shape))
    return Call(op, name, dict(zip(axes, shape, strict=True)), more, reason=reason, **fields)
