"""Where kernels read and write: nothing outside their tensors, and the right place beyond 2**31 elements.

Interpreted kernels use real addresses, so the operating system can tell: inputs and outputs lie directly before a page
    that may not be touched (an access past the end ends the process), and views with enormous strides lie in memory
    that is reserved and hardly used.
"""

import mmap
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch

from tileformer.kernels import (
    attention,
    bias_activation_dropout,
    cross_entropy,
    dropout,
    layer_norm,
    rotary,
    softmax,
    use_backend,
)

GUARDED = """
    import ctypes, faulthandler, importlib, itertools, sys
    import torch
    from tileformer import kernels
    from tileformer.bench.calls import Call, describe, leaves_of
    from tileformer.bench.calls.cases import CASES

    faulthandler.enable()
    torch.use_deterministic_algorithms(True)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    PAGE, NONE, READ_WRITE = 4096, 0, 3

    def guarded(shape, dtype, at_end):
        "A tensor that ends (or begins) where memory ends (or begins)."
        size = dtype.itemsize
        for n in shape:
            size *= n
        if size == 0:
            return empty(shape, dtype=dtype)
        pages = -(-size // PAGE)
        start = libc.mmap(None, (pages + 2) * PAGE, READ_WRITE, 0x22, -1, 0)
        libc.mprotect(start, PAGE, NONE)
        libc.mprotect(start + (pages + 1) * PAGE, PAGE, NONE)
        start += PAGE + (pages * PAGE - size if at_end else 0)
        raw = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=torch.uint8)
        return raw.view(dtype).view(shape).fill_(float("nan") if dtype.is_floating_point else -1 if dtype.is_signed else 1)

    empty = torch.empty
    AT_END = True

    def patched(*shape, dtype=torch.float32, device=None, **rest):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guarded(shape, dtype, AT_END)

    def patched_like(x, dtype=None, device=None, memory_format=None, **rest):
        if x.is_contiguous() or memory_format is torch.contiguous_format:
            return guarded(x.shape, dtype or x.dtype, AT_END)
        return empty_like(x, dtype=dtype)

    def patched_new(x, *shape, dtype=None, **rest):
        return patched(*shape, dtype=dtype or x.dtype)

    def move(x):
        "The same strides, in guarded memory."
        if not isinstance(x, torch.Tensor) or x.numel() == 0:
            return x
        elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        return guarded((elements,), x.dtype, AT_END).as_strided(x.shape, x.stride()).copy_(x)

    def run(case, dtype):
        tensors, options = case.inputs()
        leaves = leaves_of(case, {n: move(x.to(dtype)) for n, x in tensors.items()})
        options = {n: move(x) for n, x in options.items()}
        out = getattr(kernels, case.op)(**leaves, **options)
        outs = out if isinstance(out, tuple) else (out,)
        grads = [move(torch.ones_like(o)) for o in outs]
        if outs[0].requires_grad:
            torch.autograd.grad(outs, list(leaves.values()), grads)

    def options_of_attention(lengths, **options):
        def build(generator, sizes):
            draw = lambda *shape: torch.randn(shape, generator=generator)
            b = 1 if "cu_seqlens_q" in lengths else 2
            tensors = dict(q=draw(b, 4, 33, 20), k=draw(b, 2, 35, 20), v=draw(b, 2, 35, 12))
            if "bias" in options:
                tensors["bias"] = draw(*options["bias"])
            return tensors, {n: torch.tensor(x) for n, x in lengths.items()} | {n: o for n, o in options.items() if n != "bias"}
        return dict(build=build)

    MORE = [
        describe("attention", "mask to the last element", "", 2, 4, 2, 33, 35, 20, lse=True, mask="boolean", padding="holes"),
        describe("attention", "additive mask", "", 2, 4, 2, 33, 35, 20, lse=True, mask="additive", causal=True, dropout_p=0.2),
        describe("attention", "one row more than a tile", "", 1, 2, 1, 65, 33, 17, lse=True, padding="right"),
        Call("attention", "bias", **options_of_attention({}, bias=(4, 33, 35), causal="bottom_right")),
        Call("attention", "bias of a column, a row, a head", **options_of_attention({}, bias=(2, 1, 1, 35))),
        Call("attention", "lengths past the end", **options_of_attention(dict(query_lengths=[40, 20], key_lengths=[17, 99]), window=(5, 3))),
        Call("attention", "packed", **options_of_attention(dict(cu_seqlens_q=[0, 9, 30], cu_seqlens_k=[0, 20, 35]), causal=True, softcap=5.0)),
        Call("attention", "weights", **options_of_attention({}, return_weights=True, return_lse=True)),
        describe("softmax", "mask", "", 2, 3, 5, 13, mask="additive", causal=True),
        describe("layer_norm", "odd", "", 7, 13, params=("weight", "bias"), axes=1),
        describe("cross_entropy", "odd", "", 7, 13, ignored=2, weighted=True, label_smoothing=0.1, z_loss=0.01, softcap=4.0),
        describe("bias_activation_dropout", "odd", "", 7, 13, params=("bias", "up"), activation="gelu", p=0.3),
        describe("dropout", "odd", "", 7, 13, params=("residual",), p=0.3),
    ]
    small = [case for case in CASES if case.quick or case.name in ("cross padded", "bottom right", "no keys in sight", "two axes")] + MORE
    rooms = {op: importlib.import_module("tileformer.kernels." + op) for op in ("layer_norm", "softmax", "cross_entropy", "dropout")}
    rooms["bias_activation_dropout"] = rooms["dropout"]
    empty_like = torch.empty_like
    torch.empty, torch.empty_like, torch.Tensor.new_empty = patched, patched_like, patched_new
    with kernels.use_backend("interpret"):
        for AT_END, limit in itertools.product((True, False), (None, 8)):
            for room in rooms.values() if limit else ():
                for name in ("MAX_FWD", "MAX_BWD", "MAX_TILE"):
                    if hasattr(room, name):
                        setattr(room, name, limit)
                for value in vars(room).values():  # launches are kept for each shape, with their tiles
                    getattr(value, "cache_clear", int)()
            for case in small if AT_END else MORE:
                if limit is None or case.op in rooms:
                    print(case.op, case.name, "end" if AT_END else "start", "of memory, tiles of", limit, flush=True)
                    run(case, torch.float32)
    print("all inside")
"""


@pytest.mark.interprets
def test_no_kernel_touches_memory_outside_its_tensors() -> None:
    source = str(pathlib.Path(__file__).parents[1] / "src")
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(GUARDED)], capture_output=True, text=True, env=env)
    last = done.stdout.strip().splitlines()[-1:]
    assert last == ["all inside"], (
        f"touched memory outside a tensor (exit status {done.returncode}) in: {last}\n{done.stderr[-3000:]}"
    )


NORESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on
FAR = 2**26  # 32 rows apart this far are 2**31 elements apart: one more than an int32 can count


def far(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The numbers of x with these strides, in memory of which only the touched pages exist."""
    elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    try:
        memory = mmap.mmap(-1, elements * x.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        pytest.skip(f"this system reserves no {elements * x.element_size() >> 30} GB of address space: {error}")
    view = torch.frombuffer(memory, dtype=torch.uint8).view(x.dtype)[:elements].as_strided(x.shape, strides)
    return view.copy_(x)


def results(op, far_or_near, given):
    leaves = {name: x.requires_grad_() for name, x in far_or_near.items()}
    with use_backend("interpret"):
        out = op(**leaves)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), given)]


def assert_same(op, near, moved, given, far_given):
    """`moved` are the same numbers as `near`, far apart: same bits in every result."""
    expected = results(op, near, given)
    for got, want in zip(results(op, moved, far_given), expected, strict=True):
        assert torch.equal(got, want)


NEAR = 2**23 - 16  # rows of a tile this far apart are read in place, and 300 of them reach beyond 2**31 elements
# What lies far apart: rows that are read in place, rows that are copied, heads or batches (three of them, 2**30 apart).
AXES = {
    "rows": ((1, 1, 300, 8), (0, 0, NEAR, 1)),
    "rows of a tile": ((1, 1, 40, 8), (0, 0, FAR + FAR // 16, 1)),
    "heads": ((1, 3, 5, 8), (0, 2**30, 8, 1)),
    "batches": ((3, 1, 5, 8), (2**30, 0, 8, 1)),
}


@pytest.mark.interprets
@pytest.mark.parametrize("what", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("axis", AXES)
def test_attention_reads_beyond_two_to_the_31(axis, what):
    (b, h, t, d), strides = AXES[axis]
    other = min(t, 8)
    t_q, t_k = (t, other) if what in ("q", "dout") else (other, t)
    torch.manual_seed(0)
    near = {name: torch.randn(b, h, t_q if name == "q" else t_k, d).half() for name in ("q", "k", "v")}
    given = torch.randn(b, h, t_q, d).half()
    if what == "dout":
        assert_same(attention, near, {n: x.clone() for n, x in near.items()}, given, far(given, strides))
    else:
        moved = {n: far(x, strides) if n == what else x.clone() for n, x in near.items()}
        assert_same(attention, near, moved, given, given)


MASKS = {
    "rows": ((1, 1, 300, 8), (0, 0, NEAR, 1)),
    "columns": ((1, 1, 8, 300), (0, 0, 1, NEAR)),
    "rows of a tile": ((1, 1, 40, 8), (0, 0, FAR + FAR // 16, 1)),
    "columns of a tile": ((1, 1, 8, 40), (0, 0, 1, FAR + FAR // 16)),
    "heads": ((1, 3, 5, 8), (0, 2**30, 8, 1)),
    "batches": ((3, 1, 5, 8), (2**30, 0, 8, 1)),
}


@pytest.mark.interprets
@pytest.mark.parametrize("kind", [torch.bool, torch.float16], ids=str)
@pytest.mark.parametrize("axis", MASKS)
def test_a_mask_is_read_beyond_two_to_the_31(axis, kind):
    shape, strides = MASKS[axis]
    torch.manual_seed(0)
    b, h, t_q, t_k = shape
    drawn = torch.randn(shape)
    mask = drawn > -0.5 if kind == torch.bool else drawn.half()
    near = dict(q=torch.randn(b, h, t_q, 8), k=torch.randn(b, h, t_k, 8), v=torch.randn(b, h, t_k, 8))
    given, scores = torch.randn(b, h, t_q, 8), {"x": torch.randn(shape)}
    moved = far(mask, strides)
    for op, leaves, dout in ((attention, near, given), (softmax, scores, torch.randn(shape))):
        if op is softmax and axis.startswith("columns"):
            continue  # a tile spans the row: columns that far apart do not exist
        clones = {n: x.clone() for n, x in leaves.items()}
        expected = results(lambda op=op, **x: op(**x, mask=mask), leaves, dout)
        for got, want in zip(results(lambda op=op, **x: op(**x, mask=moved), clones, dout), expected, strict=True):
            assert torch.equal(got, want)


ROWS = {
    "layer_norm": (lambda x: layer_norm(x, (8,)), "x"),
    "softmax": (softmax, "x"),
    "cross_entropy": (lambda x: cross_entropy(x, torch.arange(40) % 8, reduction="none"), "x"),
    "dropout": (lambda x: dropout(x, 0.4, seed=torch.tensor([5])), "x"),
    "activation": (
        lambda x: bias_activation_dropout(x, "gelu", bias=torch.ones(8).half(), p=0.4, seed=torch.tensor([5])),
        "x",
    ),
    "up": (lambda up: bias_activation_dropout(torch.ones(40, 8).half(), "silu", up=up), "up"),
    "rotary": (
        lambda x: rotary(x.view(2, 4, 5, 8), torch.ones(5, 3), torch.ones(5, 3)).view(40, 8),
        "x",
    ),
    "residual": (
        lambda residual: dropout(torch.ones(40, 8).half(), 0.4, seed=torch.tensor([5]), residual=residual),
        "residual",
    ),
}


@pytest.mark.interprets
@pytest.mark.parametrize("longest", [None, 4], ids=["whole rows", "tiles of rows"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_read_beyond_two_to_the_31(name, longest, monkeypatch):
    op, argument = ROWS[name]
    room = sys.modules["tileformer.kernels." + ("dropout" if name in ("residual", "activation", "up") else name)]
    for limit in ("MAX_FWD", "MAX_BWD", "MAX_TILE") if longest else ():
        monkeypatch.setattr(room, limit, longest, raising=False)
    torch.manual_seed(0)
    x = torch.randn(40, 8).half()
    given = torch.randn(40) if name == "cross_entropy" else torch.randn(40, 8)
    given = given.half()
    assert_same(op, {argument: x.clone()}, {argument: far(x, (FAR, 1))}, given, given)
    if name != "cross_entropy":
        assert_same(op, {argument: x.clone()}, {argument: x.clone()}, given, far(given, (FAR, 1)))
