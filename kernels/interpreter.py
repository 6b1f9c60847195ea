"""Run a `@triton.jit` kernel on CPU tensors through Triton's interpreter, one call at a time.

Triton decides between compiling and interpreting when a function is decorated (TRITON_INTERPRET). Here the interpreter
runs the Python of an ordinary JITFunction, and puts back all that it patches: the process can still compile kernels.
It also repairs what the stock interpreter computes differently from a GPU: bfloat16 arithmetic and dots work on raw
bits there, casts to bfloat16 truncate, and TF32 dots keep all 23 mantissa bits.

It relies on private names of `triton.runtime.interpreter` (Triton 3.6 and later), held by `tests/test_interpreter.py`.
"""

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

Handle, Builder = stock.TensorHandle, stock.InterpreterBuilder
_lock = threading.RLock()  # the interpreter patches module globals: one launch at a time
if hasattr(os, "register_at_fork"):
    # A child has no thread that would end a launch it was born in: no fork while Triton is patched.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_PATCHED: tuple[Any, ...] = (
    *(tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base),
    *(JITFunction, Builder, stock.interpreter_builder, stock),
)


def run(kernel: JITFunction, programs: tuple[int, ...], args: Sequence[Any], constexprs: dict[str, Any]) -> None:
    """`kernel[programs](*args, **constexprs)`, interpreted. Launch options such as num_warps have no effect."""
    # A GPU does not warn about infinity and NaN either.
    with _lock, _patched(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        _interpreted(kernel.fn).run(*args, grid=programs, warmup=False, **constexprs)


@functools.cache  # on the plain function: hashing a JITFunction would parse everything it calls
def _interpreted(function: Callable[..., Any]) -> stock.InterpretedFunction:
    return stock.InterpretedFunction(function)


class _BothNamespaces:
    __globals__ = {"tl": tl, "core": tl.core}  # what _patch_lang looks through for language modules


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    before = [(owner, dict(vars(owner))) for owner in _PATCHED]
    # A device function called by a kernel (ours, or tl.sum and its like) is a JITFunction too: run its Python directly.
    JITFunction.__call__ = lambda self, *args, **kwargs: _interpreted(self.fn).rewrite()(*args, **kwargs)
    stock._patch_lang_tensor = _patch_tensor
    stock._patch_lang(_BothNamespaces)
    stock.interpreter_builder.options = stock.InterpreterOptions(sanitize_overflow=False)
    for name, repair in _REPAIRS.items():
        setattr(Builder, name, repair)
    try:
        yield
    finally:
        for owner, names in before:
            for name in set(vars(owner)) - set(names):
                delattr(owner, name)
            for name, value in names.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


_patch_lang_tensor = stock._patch_lang_tensor


def _patch_tensor(tensor: Any, *scope: Any) -> None:
    _patch_lang_tensor(tensor, *scope)
    # Triton 3.6 makes an index of an array with one element, which numpy 2.4 refuses.
    tensor.__index__ = lambda self: int(self.handle.data.item())


def _to_bf16_bits(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    # to nearest, ties to even
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0), rounded)  # NaN stays NaN


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _computed_in_fp32(name: str) -> Any:
    original = getattr(Builder, name)

    @functools.wraps(original)
    def repaired(self: Any, *args: Any) -> Any:
        if not any(map(_is_bf16, args)):
            return original(self, *args)
        result = original(self, *map(_widened, args))
        data = result.data if result.data.dtype == np.bool_ else _to_bf16_bits(result.data)
        return Handle(data, tl.bfloat16)

    return repaired


_cast, _fp_to_fp, _dot = Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot


def _cast_rounded(self: Any, src: Any, dst_type: Any) -> Any:
    if dst_type.scalar == tl.bfloat16:
        return src if _is_bf16(src) else Handle(_to_bf16_bits(src.data.astype(np.float32)), tl.bfloat16)
    if _is_bf16(src):
        src = _widened(src)
        return src if dst_type.scalar == tl.float32 else _cast(self, src, dst_type)
    return _cast(self, src, dst_type)


def _fp_to_fp_rounded(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
        return _cast_rounded(self, src, dst_type)
    return _fp_to_fp(self, src, dst_type, rounding_mode)


def _dot_exact(self: Any, a: Any, b: Any, d: Any, precision: Any, max_num_imprecise_acc: Any) -> Any:
    if a.dtype.scalar == tl.float32 and precision == stock._ir.INPUT_PRECISION.TF32:
        a, b = _rounded_to_tf32(a), _rounded_to_tf32(b)
    return _dot(self, _widened(a), _widened(b), d, precision, max_num_imprecise_acc)


def _bf16_constant(self: Any, value: float) -> Any:  # the stock builder has none
    return Handle(_to_bf16_bits(np.array([value], np.float32)), tl.bfloat16)


def _rounded_to_tf32(handle: Any) -> Any:
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    return Handle(((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32), handle.dtype)


_REPAIRS: dict[str, Any] = {
    "cast_impl": _cast_rounded,
    "create_fp_to_fp": _fp_to_fp_rounded,
    "create_dot": _dot_exact,
    "get_bf16": _bf16_constant,
    **{name: _computed_in_fp32(name) for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_erf")},
}
