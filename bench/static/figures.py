"""The figures of a launch: what its machine code holds (class A), its loops' pipes (B), what the model says (C)."""

import functools
import math
import re
from typing import Any

import torch

from tileformer.bench.calls import Call
from tileformer.bench.recording import Binary, Launch
from tileformer.bench.static import model
from tileformer.bench.static.rates import LOADS, RATES, STORES, TENSOR, Rates
from tileformer.bench.static.sass import Code, Instruction, accesses, cycles, occupancy, spills, tensor_shapes

PIPES = {"issue": "issue", "shared": "mio"}


@functools.lru_cache(maxsize=64)
def code_of(cubin: bytes, binary: Binary) -> Code:
    """The instructions of a binary."""
    return Code.parse(binary.sass)


def exact(launch: Launch) -> dict[str, Any]:
    """Class A: true of this binary, whatever runs it. Any supported architecture."""
    binary = launch.binary
    code = code_of(binary.cubin, binary).instructions
    widths = accesses(code)
    sizes = {name: x for name, x in launch.constants.items() if re.match("BLOCK|B[A-Z]$|TILE", name)}
    return dict(
        kernel=binary.name, arch=binary.arch, grid=list(launch.grid), warps=launch.warps, stages=launch.stages,
        tile={name: x for name, x in sizes.items() if type(x) is int and x > 1},
        **binary.usage, shared=binary.shared, **spills(code), accesses=widths,
        narrow=sum(n for width, n in widths.items() if width not in ("128", "bulk")),
        tensor=tensor_shapes(code), old_dots=sum(i.base == "HMMA" for i in code),
        short_loads=short_loads(code_of(binary.cubin, binary)),
        narrow_loads=sum(i.base in LOADS and i.bytes < 16 for i in main_loop(code_of(binary.cubin, binary))),
    )  # fmt: skip


def per_tensor(launch: Launch) -> dict[str, float]:
    """Class B: cycles of the main loop that the shared memory takes, and the issue, for one of the tensor cores."""
    rates = RATES.get(launch.binary.arch)
    of_pipe = cycles(main_loop(code_of(launch.binary.cubin, launch.binary)), rates) if rates else dict(tensor=0.0)
    if not of_pipe["tensor"]:
        return {}
    return {f"{of}_per_tensor": round(of_pipe[pipe] / of_pipe["tensor"], 3) for of, pipe in PIPES.items()}


def _flops(path: list[Instruction]) -> int:
    """FLOPs of a warp's matrix instructions; tcgen05's shapes are in descriptors and count 0."""
    total = 0
    for i in path:
        if shape := re.search(r"64x(\d+)x(\d+)", i.op) if TENSOR.match(i.op) else None:
            total += 2 * 64 * int(shape[1]) * int(shape[2]) // 4
        elif i.base == "HMMA":
            total += 4096 if ".16816." in i.op else 2048
    return total


def tensor_loops(code: Code) -> list[list[Instruction]]:
    """Paths of the innermost loops that multiply matrices and store nothing, the least other work first."""
    paths: list[list[Instruction]] = []
    inner: list[set[int]] = []
    for head, body in code.loops():
        path = code.path(head, body)
        stores = any(i.base in STORES | {"UTMASTG"} for i in path)
        if any(TENSOR.match(i.op) for i in path) and not stores and not any(other < body for other in inner):
            inner.append(body)
            paths.append(path)
    return sorted(paths, key=lambda path: (len(path) / max(_flops(path), 1), len(path)))


def main_loop(code: Code) -> list[Instruction]:
    """The path of the loop over whole tiles: the first of `tensor_loops`, or where tcgen05 hides what a loop multiplies
    the one with the most exponentials."""
    paths = tensor_loops(code)
    if paths and not _flops(paths[0]):
        return max(paths, key=lambda path: sum(i.op.startswith("MUFU.EX2") for i in path))
    return paths[0] if paths else []


def short_loads(code: Code) -> int:
    """Global loads below 32 bits, too narrow for a copy ahead of time, in the tensor loop that has the fewest.

    The other, over tiles that cross a bound, may read padding and masks element by element.
    """
    return min((sum(i.base in LOADS and i.bytes < 4 for i in path) for path in tensor_loops(code)), default=0)


def loop_figures(launch: Launch, rates: Rates, blocks: int) -> list[dict[str, Any]]:
    """Each tensor loop's cycles of a warp by pipe, the replay's share with a busy tensor pipe."""
    rows = []
    for path in tensor_loops(code_of(launch.binary.cubin, launch.binary)):
        of_pipe = cycles(path, rates)
        row: dict[str, Any] = {name: round(time, 1) for name, time in of_pipe.items()}
        if of_pipe["tensor"]:
            replay = model.band(path, rates, blocks, launch.warps, launch.stages)
            busy = of_pipe["tensor"] * blocks * launch.warps / 4
            row["tensor_share"] = round(busy / replay[0], 3)
        rows.append(row)
    return rows


def causal_trips(length: int, rows: int, block: int) -> tuple[float, float]:
    """Mean trips of a tile of `rows` queries over key tiles of `block`: (all that it sees, those on the diagonal)."""
    tiles = math.ceil(length / rows)
    every = sum(math.ceil(min(length, (n + 1) * rows) / block) for n in range(tiles)) / tiles
    return every, every - sum((n * rows + 1) // block for n in range(tiles)) / tiles


def attention_share(launch: Launch, call: Call, rates: Rates, blocks: int) -> dict[str, Any]:
    """Forward attention on sm_80 and sm_90: shares of the tensor cores' peak, class B (`bound`) and C (`share`)."""
    paths, s, size = tensor_loops(code_of(launch.binary.cubin, launch.binary)), call.sizes, 2
    per_trip = _flops(paths[0]) * launch.warps if paths else 0
    if not per_trip or not blocks:
        return {}
    programs = math.prod(launch.grid)
    rows = s["B"] * s["H"] * s["T_q"] // programs
    keys = per_trip // (4 * rows * s["D"])
    every, edge = causal_trips(s["T_k"], rows, keys) if call.options.get("causal") else (s["T_k"] / keys, 0.0)
    edge = edge if len(paths) > 1 else 0.0
    useful = call.flops("forward") / programs * blocks / rates.tensor_flops  # cycles at the peak

    def time(n: int) -> tuple[float, ...]:
        l2 = size * _flops(paths[n]) * launch.warps / (2 * rows)  # keys and values of a trip
        floor = model.bound(paths[n], rates, blocks, launch.warps, l2)
        band = model.band(paths[n], rates, blocks, launch.warps, launch.stages)
        return max(floor.values()), *(max(x, floor["l2"]) for x in band)

    wide = _flops(paths[0]) / _flops(paths[1]) if edge else 0.0  # a masked tile may be narrower
    of_loops = zip(time(0), time(1 if edge else 0), strict=True)
    times = ((every - edge) * main + edge * wide * masked for main, masked in of_loops)
    bound, middle, most, least = (round(useful / t, 3) for t in times)
    return dict(tile_rows=rows, tile_keys=keys, bound=bound, share=middle, share_band=[least, most])


def row_figures(launch: Launch, rates: Rates, blocks: int, moved: int | None) -> dict[str, Any]:
    """Row kernels: bytes that resident blocks keep in flight (B), the modelled time against DRAM's floor (C)."""
    code = code_of(launch.binary.cubin, launch.binary)
    loops = [code.path(head, body) for head, body in code.loops()]
    size = lambda path, kinds: sum(i.bytes for i in path if i.base in kinds) * 32 * launch.warps  # noqa: E731
    loop = max(loops, key=lambda path: size(path, LOADS | STORES), default=[])
    whole, programs = code.path(), math.prod(launch.grid)
    loaded = max(size(loop, LOADS), size(whole, LOADS) - size(loop, LOADS))
    result: dict[str, Any] = dict(bytes_in_flight=min(blocks, math.ceil(programs / rates.multiprocessors)) * loaded)
    if moved and blocks:
        busy, floor = model.row_time(whole, loop, rates, blocks, launch.warps, programs, moved)
        result |= dict(us_busy=round(busy, 1), us_dram=round(floor, 1), roof=round(floor / max(busy, floor), 3))
    return result


def figures(launch: Launch, call: Call, mode: str, alone: bool) -> dict[str, Any]:
    """Every figure of one launch of a workload's pass; `alone`: the pass is this launch, so its bytes are known."""
    result = exact(launch)
    rates = RATES.get(launch.binary.arch)
    if rates is None:
        return result
    result["blocks"] = blocks = occupancy(result["registers"], launch.binary.shared, launch.warps, rates)
    if call.flops("forward"):
        result["loops"] = loop_figures(launch, rates, blocks)
        result |= per_tensor(launch)
        if mode == "forward" and not {"mask", "padding"} & call.options.keys() and call.sizes["T_q"] >= 128:
            result |= attention_share(launch, call, rates, blocks)
    else:
        result |= row_figures(launch, rates, blocks, call.bytes(torch.bfloat16, mode) if alone else None)
    return result


def best(choices: list[dict[str, Any]], tried: int) -> dict[str, Any]:
    """Of an autotuner's choices the one that the model likes best; how many compiled, and how many binaries spill."""

    def merit(row: dict[str, Any]) -> tuple[float, ...]:
        loops = [loop.get("tensor_share", 0.0) for loop in row.get("loops", [])]
        return (
            row.get("share", row.get("roof", 0.0)), -row.get("us_busy", 0.0), min(loops, default=0.0),
            -row["spill_instructions"], row.get("blocks", 0) * row["warps"], -row["narrow"],
        )  # fmt: skip

    chosen = max(choices, key=merit)  # the first of equals: the list's order
    return chosen | dict(configurations=tried, spilling=sum(bool(row["spill_instructions"]) for row in choices))


def grouped(launches: list[Launch]) -> list[tuple[list[Launch], int]]:
    """For each launch of a run its choices, each binary once, and how many there were: 1 if it is not autotuned."""
    groups: dict[Any, list[Launch]] = {}
    for n, launch in enumerate(launches):
        groups.setdefault(("plain", n) if launch.candidate is None else ("tuned", launch.candidate), []).append(launch)
    once = lambda group: {(x.binary.cubin, x.grid): x for x in reversed(group)}  # noqa: E731
    return [(list(once(group).values())[::-1], len(group)) for group in groups.values()]
