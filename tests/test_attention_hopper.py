"""The Hopper kernel with explicit warp roles: its text runs here on barriers, copies and products of this file's own, in
every order that a seed draws; and it compiles for sm_90. What the compiler makes of it has to run on a GPU."""

import random
import threading
import types
from typing import Any

import pytest
import torch
import triton

from tileformer.bench.calls import providers
from tileformer.bench.calls.workloads import WORKLOADS
from tileformer.bench.recording import SHARED, record
from tileformer.bench.static.figures import code_of, exact, per_tensor, tensor_loops
from tileformer.kernels import attention, reference, use_backend
from tileformer.kernels.attention import hopper, launchers
from tileformer.kernels.attention.mask import schedule
from tileformer.kernels.launch import cdiv

NAN, DTYPE = float("nan"), torch.float32


class Machine:
    """Threads of which one runs at a time, to its next wait or arrival; who is next, and which copy lands, is drawn."""

    def __init__(self, seed: int) -> None:
        self.draw, self.changed = random.Random(seed), threading.Condition()
        self.ready: dict[Any, Any] = {}
        self.outstanding: dict[Any, list[Any]] = {}
        self.copies: list[Any] = []
        self.errors: list[BaseException] = []
        self.running: Any = None

    def start(self, roles) -> None:
        threads = [threading.Thread(target=self._role, args=role) for role in roles]
        self.ready = dict.fromkeys(threads, lambda: True)
        for thread in threads:
            thread.start()
        self._next()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        assert not self.copies, "a program ended before its copies"

    def _role(self, function, arguments) -> None:
        self.outstanding[threading.current_thread()] = []
        try:
            self._resume()
            function(*arguments)
        except BaseException as error:
            self.errors.append(error)
        del self.ready[threading.current_thread()]
        self._next()

    def pause(self, ready=lambda: True) -> None:
        self.ready[threading.current_thread()] = ready
        self._next()
        self._resume()

    def _resume(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.running is threading.current_thread() or self.errors)
        if self.errors:
            raise self.errors[0]

    def _next(self) -> None:
        while self.ready and not self.errors:
            able = [thread for thread, ready in self.ready.items() if ready()]
            if not able and not self.copies:
                self.errors.append(RuntimeError("deadlock"))
                break
            chosen = self.draw.choice([*able, *self.copies])
            if chosen in able:
                self.running = chosen
                break
            self.copies.remove(chosen)
            chosen()
        with self.changed:
            self.changed.notify_all()


class Barrier:
    """PTX's mbarrier: a phase completes when `count` have arrived and every byte that was expected has come."""

    def init(self, count: int) -> None:
        self.count, self.left, self.bytes, self.phase = count, count, 0, 0

    def add(self, arrivals: int, size: int) -> None:
        self.left, self.bytes = self.left - arrivals, self.bytes + size
        assert self.left >= 0, "more arrivals than a phase has"
        if self.left == self.bytes == 0:
            self.left, self.phase = self.count, self.phase + 1


class Tile:
    """Shared memory that asynchronous reads and writes must not meet in."""

    def __init__(self, shape) -> None:
        self.data, self.readers = torch.full(shape[-2:], NAN), 0

    def reshape(self, shape):
        assert list(self.data.shape) == list(shape)
        return self

    def permute(self, order):
        return self.data.T, self

    def store(self, value) -> None:
        self.data = value


class Tiles(list):
    index = list.__getitem__  # type: ignore[assignment]

    def __init__(self, shape, kind) -> None:
        super().__init__(kind(shape) if kind is Tile else kind() for _ in range(shape[0]))
        self.shape, self.dtype = shape, DTYPE


class Lanes(torch.Tensor):
    type = types.SimpleNamespace(layout=None)  # type: ignore[assignment]


class Pointer(types.SimpleNamespace):
    def __add__(self, offset):
        return Pointer(memory=self.memory, at=self.at + offset)


def _lanes(x) -> torch.Tensor:
    return torch.as_tensor(x).as_subclass(Lanes)


def _emulated(machine: Machine, pid: int, rows: int):
    """The kernel's own functions, over this file's barriers, copies and products."""

    def product(left, right, acc, use_acc=True, is_async=False):
        (right, *transposed), left_tile = (right if isinstance(right, tuple) else (right.data, right)), left
        tiles = [x for x in (left_tile, *transposed) if isinstance(x, Tile)]
        left = left.data if isinstance(left, Tile) else left
        for tile in tiles:
            tile.readers += 1
        result = types.SimpleNamespace(value=_lanes(left @ right) + (acc if use_acc else 0), tiles=tiles)
        machine.outstanding[threading.current_thread()].append(result)
        return result

    def wait_products(left, deps):
        queue = machine.outstanding[threading.current_thread()]
        machine.pause()  # the others run on while these products read
        while len(queue) > left:
            for tile in queue.pop(0).tiles:
                tile.readers -= 1
        assert all(x is not deps[0] for x in queue)
        return deps[0].value

    def copy(desc, at, barrier, tile) -> None:
        assert not tile.readers, "written while it is read"
        batch, head, row, _ = map(int, at)
        shape = tile.data.shape
        tile.data = torch.full(shape, NAN)  # until it lands

        def land() -> None:
            tile.data = torch.zeros(shape)
            found = desc.memory[batch, head, row : row + shape[0]]
            tile.data[: len(found)] = found
            barrier.add(0, -desc.block_type.nbytes)

        machine.copies.append(land)

    def copy_out(desc, at, tile) -> None:
        assert not tile.readers
        batch, head, row, _ = map(int, at)
        into = desc.memory[batch, head, row : row + len(tile.data)]
        into[:] = tile.data[: len(into)]

    def wait(barrier, parity) -> None:
        assert parity in (0, 1)
        machine.pause(lambda: barrier.phase & 1 != parity)

    def arrive(barrier, count) -> None:
        machine.pause()
        barrier.add(count, 0)

    def store(pointer, value, mask) -> None:
        pointer.memory[pointer.at[mask]] = value[mask]

    either = lambda of: lambda x, y: of(_lanes(x), _lanes(y))  # noqa: E731
    gl = types.SimpleNamespace(
        **dict.fromkeys(("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout"), lambda *_: None),
        **{name: getattr(torch, name) for name in ("exp2", "log2", "float32", "int32", "int64")},
        maximum=either(torch.maximum), minimum=either(torch.minimum), max=torch.amax, sum=torch.sum, where=torch.where,
        expand_dims=torch.unsqueeze, convert_layout=lambda x, layout: x, to_tensor=_lanes, static_range=range,
        arange=lambda low, high, layout: _lanes(torch.arange(low, high)), store=store, program_id=lambda axis: _lanes(pid),
        zeros=lambda shape, dtype, layout: _lanes(torch.zeros(shape)), constexpr=None,
        full=lambda shape, value, dtype, layout: _lanes(torch.full(shape, value)),
        allocate_shared_memory=lambda dtype, shape, _: Tiles(shape, Barrier if dtype == torch.int64 else Tile)
        if len(shape) > 1 else Barrier(), warp_specialize=lambda roles, warps, registers: machine.start(roles),
    )  # fmt: skip
    mbarrier = types.SimpleNamespace(
        init=Barrier.init, expect=lambda x, size: x.add(1, size), wait=wait, arrive=arrive, MBarrierLayout=lambda: None
    )
    names = dict(vars(hopper), gl=gl, tl=gl, mbarrier=mbarrier, _copy=copy, _copy_out=copy_out)
    names |= {name: x.value for name, x in names.items() if type(x).__name__ == "constexpr"} | {"ROWS": rows}
    names["hopper"] = types.SimpleNamespace(
        warpgroup_mma=product, warpgroup_mma_wait=wait_products, fence_async_shared=lambda: None
    )
    names["tma"] = types.SimpleNamespace(store_wait=lambda left: None)
    functions = {name: x.fn for name, x in names.items() if hasattr(x, "fn")} | {"_schedule": schedule.fn}
    names |= {name: types.FunctionType(fn.__code__, names, name, fn.__defaults__) for name, fn in functions.items()}
    return types.SimpleNamespace(**names)


def _run(q, k, v, high: int, seed: int, rows=4, block_n=8, groups=2, stages=2):
    (b, h, t_q, d), (h_kv, t_k) = q.shape, k.shape[1:3]
    out, lse = torch.full_like(q, NAN), torch.full((b * h * t_q,), NAN)
    sizes = zip((q, k, v, out), (rows, block_n, block_n, rows), strict=True)
    descs = [
        types.SimpleNamespace(
            memory=x, dtype=DTYPE, layout=None, block_type=types.SimpleNamespace(shape=[1, 1, n, d], nbytes=2 * n * d)
        )
        for x, n in sizes
    ]
    for pid in range(b * h * cdiv(t_q, rows * groups)):
        kernel = _emulated(Machine(seed + pid), pid, rows)
        kernel._attention_fwd_hopper_kernel(
            *descs, Pointer(memory=lse, at=0), h, h // h_kv, t_q, t_k, high, 3, b * h, d**-0.5,
            block_n, groups, stages, 0,
        )  # fmt: skip
    return out, lse.view(b, h, t_q)


def _qkv(t_q: int, t_k: int, heads: int = 2, heads_kv: int = 1):
    generator = torch.Generator().manual_seed(0)
    draw = lambda h, t: torch.randn(1, h, t, 8, generator=generator)  # noqa: E731
    return draw(heads, t_q), draw(heads_kv, t_k), draw(heads_kv, t_k)


LENGTHS = [(1, 1), (8, 17), (17, 63), (30, 9), (3, 64)]  # one key, whole tiles, tails, rows without a key, many stages


@pytest.mark.parametrize(("groups", "stages"), [(2, 2), (3, 2), (2, 4)])
@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_its_text_computes_the_definition_in_every_order(lengths, causal, groups, stages):
    """Also of rows that see no key: bottom right, with more queries than keys."""
    q, k, v = _qkv(*lengths)
    high = (0 if causal else 2**30) + (k.shape[2] - q.shape[2] if causal == "bottom_right" else 0)
    expected = reference.attention(q, k, v, causal=causal, return_lse=True)
    out, lse = _run(q, k, v, high, seed=groups * stages, groups=groups, stages=stages)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse * torch.log(torch.tensor(2.0)), expected[1])


@pytest.mark.parametrize(
    ("counts", "said"), [({1: 2}, "deadlock"), ({2: 1}, "written while|arrivals"), ({2: 3}, "deadlock")]
)
def test_an_emulated_barrier_that_counts_wrong_is_noticed(monkeypatch, counts, said):
    right = Barrier.init
    monkeypatch.setattr(Barrier, "init", lambda self, count: right(self, counts.get(count, count)))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        for seed in range(20):
            _run(*_qkv(8, 64), 2**30, seed)


# Issue / tensor cycles of the main loop. With Triton 3.8 ptxas repacks the weights of head size 64 in each step.
BUSY = {64: 0.86 if triton.__version__.startswith("3.8.") else 0.8, 128: 0.45}


@pytest.fixture
def opted_in(monkeypatch):
    monkeypatch.setattr(launchers, "HOPPER", True)


@pytest.mark.aot
@pytest.mark.compat
@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        (64, torch.bfloat16),
        pytest.param(128, torch.bfloat16, marks=pytest.mark.aot_full),
        pytest.param(64, torch.float16, marks=pytest.mark.aot_full),
        pytest.param(128, torch.float16, marks=pytest.mark.aot_full),
    ],
)
def test_it_compiles_without_a_spill(opted_in, d, dtype):
    q, k = torch.empty(1, 2, 300, d, dtype=dtype), torch.empty(1, 1, 500, d, dtype=dtype)
    with record(90) as launches, use_backend("triton"):
        for causal in (False, True):
            attention(q, k, k, causal=causal)
    plain, causal = launches
    assert plain.binary is causal.binary, "one kernel serves both"
    assert plain.binary.name == "_attention_fwd_hopper_kernel"
    figures, rows = exact(plain), 64 * hopper.TILES[d]["GROUPS"]
    assert plain.grid == (2 * cdiv(300, rows), 1, 1)
    assert figures["stack"] == figures["spill_instructions"] == figures["old_dots"] == 0
    assert figures["shared"] <= SHARED[90] and figures["accesses"]["bulk"] >= 7
    assert figures["tensor"].keys() == {"HGMMA.64x128x16", f"HGMMA.64x{d}x16"}
    assert per_tensor(plain)["issue_per_tensor"] <= BUSY[d]
    for path in tensor_loops(code_of(plain.binary.cubin, plain.binary)):
        met = [i.op.split(".")[0] + "." + i.op.split(".")[1] for i in path if i.base in ("BAR", "SYNCS", "WARPGROUP")]
        arrivals = [n for n, op in enumerate(met) if op == "SYNCS.ARRIVE"]
        assert len(arrivals) == 2 and all(met[n - 1] == "BAR.SYNC" for n in arrivals), "one warp arrives for all four"


@pytest.mark.aot
def test_a_dry_benchmark_compiles_it_for_its_row(monkeypatch):
    monkeypatch.setattr(providers, "compile_backend", "aot_eager")
    call = next(call for call in WORKLOADS if call.name == "D 64 causal T 512").small(1)
    with record(90) as launches, use_backend("triton"):
        providers.providers("attention")["hopper"](call)(*call.inputs("cpu", torch.bfloat16))
    assert [launch.binary.name for launch in launches] == ["_attention_fwd_hopper_kernel"]
    assert not launchers.HOPPER


REFUSED = {
    "head size": dict(d=32),
    "head size of v": dict(dv=128),
    "float32": dict(dtype=torch.float32),
    "no key": dict(t_k=0),
    "an odd stride": dict(pad=3),
    "window": dict(window=(3, 3)),
    "mask": dict(mask=torch.ones(8, 8, dtype=torch.bool)),
    "lengths": dict(key_lengths=torch.tensor([3])),
    "soft cap": dict(softcap=1.0),
    "ALiBi": dict(alibi_slopes=torch.ones(1)),
    "dropout": dict(dropout_p=0.1, seed=1),
    "scale 0": dict(scale=0.0),
    "expanded": dict(expand=2),
    "another architecture": dict(arch=100),
    "not opted in": dict(enabled=False),
}


@pytest.mark.parametrize("reason", ["", *REFUSED])
def test_what_it_does_not_serve_is_left_to_the_portable_kernel(monkeypatch, reason):
    options = dict(REFUSED.get(reason, {}))
    take = lambda name, usual: options.pop(name, usual)  # noqa: E731
    d, t_k, dtype, pad, copies = (
        take("d", 64),
        take("t_k", 8),
        take("dtype", torch.float16),
        take("pad", 0),
        take("expand", 1),
    )
    monkeypatch.setattr(launchers, "HOPPER", take("enabled", True))
    q, k, v = (torch.empty(1, 1, t, x + pad, dtype=dtype)[..., :x] for t, x in ((8, d), (t_k, d), (t_k, take("dv", d))))
    q, k, v = (x.expand(copies, -1, -1, -1) for x in (q, k, v))
    chosen = []
    monkeypatch.setattr(launchers.Launch, "__call__", lambda self, *x: chosen.append(self.kernel.fn.__name__))
    with record(take("arch", 90)), use_backend("triton"):
        attention(q, k, v, **options)
    assert (chosen[-1] == "_attention_fwd_hopper_kernel") == (reason == "")
