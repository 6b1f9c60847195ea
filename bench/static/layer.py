"""A decoder layer's training step, counted beside eager torch.nn's: launches, what is saved, what is moved.

Counted from the tensors that each operator and kernel is called with, on the CPU, where our kernels are named and not
run. What a GPU has as one kernel counts as one: torch's dropout, and its fused attention (one launch forward, three
backward: FlashAttention-2's). Bytes are in U, the size of the layer's input: once for each tensor that a launch reads
or writes; GEMMs and attention are left out.
"""

import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tileformer import decoder
from tileformer.kernels import autograd, launch, use_backend

Row = dict[str, Any]
SHAPE = dict(B=2, T=64, C=512, H=8)
FORMS: dict[str, dict[str, Any]] = {
    "post-norm": dict(norm_first=False),
    "post-norm, lean": dict(norm_first=False, lean=True),
    "pre-norm": dict(norm_first=True),
}
_FREE = ("empty", "detach", "alias", "_unsafe_view", "new_empty", "_reshape_alias", "promote_types", "fill_")
_PRODUCTS = ("mm", "addmm", "bmm")


class _Tally(TorchDispatchMode):
    """Launches by name, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (view or name.startswith((*_FREE, "tileformer"))):
            self.add(name, tree_leaves((args, kwargs, out)))
        return out

    def add(self, name: str, values: Any) -> None:
        tensors = {(x.data_ptr(), x.numel()): x for x in values if isinstance(x, Tensor)}
        self.launches[name] += 1
        self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors.values())

    def moved(self) -> int:
        """Bytes beside those of GEMMs and attention."""
        return sum(n for name, n in self.bytes.items() if name not in _PRODUCTS and "attention" not in name)


_tally: list[_Tally] = []  # the one that counts


class _FusedAttention(torch.autograd.Function):
    """What torch's is on a GPU, for counting: nothing is computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3]))
        _tally[-1].launches["attention"] += 1
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _tally[-1].launches["attention"] += 3
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


@contextmanager
def _counting() -> Iterator[_Tally]:
    with _Tally() as tally:
        _tally.append(tally)
        try:
            yield tally
        finally:
            _tally.pop()


def _count_launch(launched: Any, *tensors: Tensor) -> None:
    _tally[-1].add(launched.kernel.fn.__name__, tensors)


def _native_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0]


def rows(arch: int) -> list[Row]:
    """A row for each form of the layer and who computes it; `arch` only names the run: the counts are every one's."""
    # The dispatch mode that counts is nobody's: the short ways stay open.
    alone = mock.patch.object(autograd, "listens_to_ops", lambda: 0)
    attend = lambda q, k, v, *_, **__: _FusedAttention.apply(q, k, v)  # noqa: E731
    fused = mock.patch.object(F, "scaled_dot_product_attention", attend)
    one = mock.patch.object(F, "dropout", _native_dropout)
    found = []
    named = mock.patch.object(launch.Launch, "__call__", _count_launch)
    with named, alone, use_backend("interpret"):
        for form, options in FORMS.items():
            found.append(_row("tileformer", decoder.TransformerDecoderLayer, form, options))
    with fused, one:
        for form, options in FORMS.items():
            if "lean" not in options:
                found.append(_row("torch.nn", nn.TransformerDecoderLayer, form, options))
    head = dict(op="decoder_layer", arch=arch, dtype="bf16")
    return [head | row for row in found]


def _row(provider: str, kind: Callable[..., nn.Module], form: str, options: dict[str, Any]) -> Row:
    b, t, c, h = SHAPE.values()
    options = dict(options)
    lean = options.pop("lean", False)
    layer: Any = kind(c, h, 4 * c, 0.1, "gelu", batch_first=True, dtype=torch.bfloat16, **options)
    layer.lean = lean
    x, memory = (torch.zeros(b, t, c, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    mask = torch.ones(t, t).triu(1) > 0
    given = {a.untyped_storage().data_ptr() for a in (x, memory, mask, *layer.parameters())}
    saved: dict[int, int] = {}

    def keep(a: Any) -> Any:
        saved[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
        return a

    hooks = torch.autograd.graph.saved_tensors_hooks
    also = lambda pack, unpack: hooks(lambda a: keep(b) if isinstance(b := pack(a), Tensor) else b, unpack)  # noqa: E731
    inner = mock.patch.object(torch.autograd.graph, "saved_tensors_hooks", also)  # or a lean layer's would hide its own
    with hooks(keep, lambda a: a), inner, _counting() as forward:
        y = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
    given.add(y.untyped_storage().data_ptr())
    dy = torch.zeros_like(y)
    with _counting() as backward:
        torch.autograd.grad(y, [x, memory, *layer.parameters()], dy)
    unit = x.numel() * x.element_size()
    u = lambda n: round(n / unit, 1)  # noqa: E731
    return dict(
        provider=provider, workload=form, launches_forward=sum(forward.launches.values()),
        launches_backward=sum(backward.launches.values()), moved_forward=u(forward.moved()),
        moved_backward=u(backward.moved()), moved=u(forward.moved() + backward.moved()),
        saved=u(sum(n for place, n in saved.items() if place not in given)),
    )  # fmt: skip
