"""What the machine code's cycles suggest for the time of a launch: leads, with their error, not results.

Class B, `bound`: the busiest pipe of a loop if everything overlapped. Class C, `replay` and `row_time`: in-order warps
of one sub-partition with their stall counts and scoreboards. Against published times (no GPU was at hand) the replay is
1.15 to 1.6 times too fast for attention on H100 and 1.0 to 1.15 on A100; `row_time` is within 25 % for norms from 2048
columns, up to 2 times too fast for short rows, no use for cross-entropy. Bank conflicts, clocks, atomics and tcgen05's
waits are not modelled.
"""

import collections
import dataclasses
import math
import re

from tileformer.bench.static.rates import LOADS, STORES, TENSOR, Rates, pipe
from tileformer.bench.static.sass import Instruction, cycles

SKEWS = (3, 61, 173, 307, 499)  # cycles between the starts of warps: the replay is chaotic, one start alone says little
MEMORY_LATENCY = 600  # cycles until a global load's data is there, when it comes from the L2 or DRAM


def bound(path: list[Instruction], rates: Rates, blocks: int, warps: int, l2_bytes: float = 0.0) -> dict[str, float]:
    """Cycles of each pipe of a sub-partition for one iteration of all `blocks` resident blocks of `l2_bytes` each."""
    of_pipe = {name: time * blocks * warps / 4 for name, time in cycles(path, rates).items()}
    return of_pipe | dict(l2=blocks * l2_bytes / (4 * rates.per_cycle(rates.l2)))


@dataclasses.dataclass(frozen=True)
class _Step:
    kind: str
    pipe: str
    cycles: float
    latency: float
    stall: int
    writes: int
    reads: int
    waits: tuple[int, ...]
    grouped: bool  # ends a group of asynchronous matrix instructions
    keep: int  # groups that may stay in flight behind a wait
    bytes: int  # of global memory, a warp


def _step(i: Instruction, rates: Rates) -> _Step:
    name, busy, latency = pipe(i.op, i.args, rates)
    kinds = {"LDGDEPBAR": "commit", "UTMALDG": "tile", **dict.fromkeys(LOADS, "load"), "LDGSTS": "copy"}
    kind = kinds.get(i.base, "")
    if TENSOR.match(i.op) and i.base != "HMMA":
        kind = "matrix"
    elif i.op.startswith("WARPGROUP.DEPBAR"):
        kind = "drain"
    elif i.base == "BAR" and "SYNC" in i.op:
        kind = "barrier"
    elif i.base == "DEPBAR" and i.args.startswith("SB0"):
        kind = "arrive"
    elif i.op.startswith("SYNCS.PHASECHK"):
        kind = "await tile"
    groups = re.search(r",\s*0x([0-9a-f]+)", i.args) if kind in ("drain", "arrive") else None
    keep = int(groups[1], 16) if groups else 0
    moved = 32 * i.bytes if i.base in LOADS | STORES else 0
    own = (max(1, i.stall), i.writes, i.reads, i.waits)
    return _Step(kind, name, busy, latency, *own, "gsb" in i.args, keep, moved)


def replay(
    path: list[Instruction], rates: Rates, blocks: int, warps: int, skew: int = 3, iterations: int = 8,
    memory: float = math.inf, once: bool = False, stages: int = 2,
) -> float:  # fmt: skip
    """Cycles of one iteration of `path` by the warps of all `blocks` resident blocks that share a sub-partition.

    Args:
        skew: cycles between the starts of warps.
        memory: bytes of global memory a cycle that this sub-partition gets.
        once: the cycles from start to end of a single iteration instead of those of a steady state.
        stages: of the loop's pipeline: a descriptor's tile is awaited `stages` - 1 iterations after it is asked for.
    """
    steps = [_step(i, rates) for i in path]
    tile_steps = {kind: [n for n, step in enumerate(steps) if step.kind == kind] for kind in ("tile", "await tile")}
    # The machine code does not say a tile's size: together they are the products' right operands, N x 16 elements each.
    shapes = [re.search(r"64x(\d+)x16", i.op) for i in path if TENSOR.match(i.op)]
    tile_bytes = sum(32 * int(shape[1]) for shape in shapes if shape) / max(1, len(tile_steps["tile"]))
    # Of a block, a descriptor: when each tile is there.
    tiles: dict[tuple[int, int], list[float]] = collections.defaultdict(list)
    per_block = max(1, warps // 4)
    n = max(1, round(blocks * warps / 4))
    iterations = 1 if once else iterations
    at, rounds = [0] * n, [0] * n
    ready = [float(skew * w) for w in range(n)]  # when a warp's own waits are over
    after = list(ready)  # when its last instruction's stall is over
    boards = [[0.0] * 6 for _ in range(n)]
    groups: list[list[float]] = [[] for _ in range(n)]
    copied = [0.0] * n  # when a warp's last asynchronous copy is there
    batches: list[list[float]] = [[] for _ in range(n)]
    ends: list[list[float]] = [[] for _ in range(n)]
    waiting: dict[int, list[int]] = {}
    free: dict[str, float] = dict.fromkeys(("tensor", "xu", "fma", "alu", "mio"), 0.0)
    issued = memory_free = 0.0
    running, last = list(range(n)), 0
    while running:
        best, when = -1, math.inf
        for w in running[last + 1 :] + running[: last + 1]:  # of equals the one that has waited longest
            step = steps[at[w]]
            t = ready[w] if ready[w] > issued else issued
            busy = free.get(step.pipe, 0.0) - (256 if step.kind == "matrix" else 0)  # a queue of matrix instructions
            t = busy if busy > t else t
            if t < when:
                best, when = w, t
        w, step = best, steps[at[best]]
        last, issued = running.index(w), when + 1
        done = when + step.cycles + step.latency
        if step.kind == "matrix":
            free["tensor"] = max(when, free["tensor"]) + step.cycles
            done = free["tensor"] + step.latency
            if step.grouped:
                groups[w].append(done)
        elif step.pipe in free:
            free[step.pipe] = when + step.cycles
        if step.kind == "drain":
            groups[w] = groups[w][-step.keep :] if step.keep else []
        if step.bytes:
            memory_free = max(memory_free, when) + step.bytes / memory
            arrived = max(memory_free, when + step.cycles) + MEMORY_LATENCY
            if step.kind == "load":
                done = arrived
            elif step.kind == "copy":
                copied[w] = arrived
        if step.kind == "commit":
            batches[w].append(copied[w])
        if step.kind == "tile":
            asked = tiles[w // per_block, tile_steps["tile"].index(at[w])]
            if rounds[w] == len(asked):  # one thread of the block asks
                memory_free = max(memory_free, when) + tile_bytes / 4 / memory
                asked.append(memory_free + MEMORY_LATENCY)
        if step.writes < 6:
            boards[w][step.writes] = max(boards[w][step.writes], done)
        if step.reads < 6:
            boards[w][step.reads] = max(boards[w][step.reads], when + step.cycles + 8)
        after[w] = when + step.stall
        at[w] += 1
        if at[w] == len(steps):
            at[w], rounds[w] = 0, rounds[w] + 1
            ends[w].append(max(after[w], *boards[w]) if once else after[w])
            if rounds[w] == iterations:
                running.remove(w)
                last = 0
        if step.kind == "barrier":
            there = waiting.setdefault(w // per_block, [])
            there.append(w)
            if rounds[w] < iterations:
                running.remove(w)
            if len(there) == per_block:
                for x in there:
                    after[x] = max(after[x], when + 12)
                    if rounds[x] < iterations:
                        running.append(x)
                running.sort()
                there.clear()
            last = 0
        for x in [w] if step.kind != "barrier" else range(n):
            following = steps[at[x]]
            ready[x] = max([after[x], *(boards[x][b] for b in following.waits)])
            if following.kind == "drain" and len(groups[x]) > following.keep:
                ready[x] = max(ready[x], groups[x][-following.keep - 1])
            if following.kind == "arrive" and len(batches[x]) > following.keep:
                ready[x] = max(ready[x], batches[x][-following.keep - 1])
            if following.kind == "await tile":
                asked = tiles[x // per_block, tile_steps["await tile"].index(at[x])]
                ready[x] = max([ready[x], *asked[: max(0, rounds[x] - stages + 2)]])
    if once:
        return max(memory_free, *(e[-1] for e in ends))
    half = iterations // 2
    return (sum(e[-1] for e in ends) - sum(e[half - 1] for e in ends)) / (n * (iterations - half))


def band(path: list[Instruction], rates: Rates, blocks: int, warps: int, stages: int = 2) -> tuple[float, float, float]:
    """Median, least and largest replay over the start skews; what is loaded comes at the L2's rate."""
    memory = rates.per_cycle(rates.l2)
    times = sorted(replay(path, rates, blocks, warps, skew=skew, memory=memory, stages=stages) for skew in SKEWS)
    return times[len(times) // 2], times[0], times[-1]


def row_time(
    whole: list[Instruction], loop: list[Instruction], rates: Rates, blocks: int, warps: int, programs: int, moved: int
) -> tuple[float, float]:
    """(microseconds on the multiprocessors, microseconds at 92 % of DRAM's rate) of a launch that moves `moved` bytes.

    `whole` is the way through the kernel, `loop` the loop that moves the most bytes (or empty); its trips follow from
    the bytes of a program. Loads come at the L2's rate; resident blocks start together, and the next when they end.
    """
    memory = rates.per_cycle(rates.l2)
    size = lambda path: sum(i.bytes for i in path if i.base in LOADS | STORES) * 32 * warps  # noqa: E731
    resident = min(blocks, math.ceil(programs / rates.multiprocessors))
    time = replay(whole, rates, resident, warps, memory=memory, once=True)
    if loop and size(loop):
        trips = max(0.0, (moved / programs - size(whole) + size(loop)) / size(loop) - 1)
        time += trips * replay(loop, rates, resident, warps, memory=memory)
    waves = math.ceil(programs / (resident * rates.multiprocessors))
    return waves * time / rates.ghz * 1e-3, moved / (0.92 * rates.dram * 1e12) * 1e6
