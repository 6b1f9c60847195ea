"""Read machine code: instructions with their control bits, natural loops, the path of an iteration, its cost by pipe.

All but the cycles of a pipe is exact for the compiler that made the code. The listing is `nvdisasm -hex -c`; the high
word of a 128-bit instruction has its scheduling bits: stall 41-44, write barrier 46-48, read barrier 49-51, wait mask
52-57 (arXiv:1804.06826).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable

from tileformer.bench.static.rates import LOADS, LOCAL, STORES, TENSOR, Rates, pipe


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a warp. Barriers are scoreboard numbers 0-5, 7 for none."""

    predicate: str
    op: str
    args: str
    stall: int
    writes: int
    reads: int
    waits: tuple[int, ...]

    @property
    def base(self) -> str:
        """The name without its suffixes."""
        return self.op.split(".")[0]

    @property
    def bytes(self) -> int:
        """Bytes that each lane of a memory instruction moves."""
        sizes = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
        return next((size for suffix, size in sizes.items() if suffix in self.op), 4)

    @property
    def target(self) -> str | None:
        """Label of a branch."""
        label = re.search(r"`\((\.L_\w+)\)", self.args) if self.base in ("BRA", "JMP") else None
        return label[1] if label else None

    @property
    def conditional(self) -> bool:
        """Whether the next instruction may follow a branch."""
        return bool(self.predicate) or bool(re.match(r"!?U?P\d", self.args))


_LOW = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?(\S+?)(?:\s+(.*?))?\s*;\s+/\* 0x[0-9a-f]{16} \*/")
_HIGH = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_\w+):")


@dataclasses.dataclass(frozen=True)
class Code:
    """One kernel's instructions in order, and the index that each label stands for."""

    instructions: list[Instruction]
    labels: dict[str, int]

    @classmethod
    def parse(cls, listing: str) -> Code:
        """From `nvdisasm -hex -c`."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        low = None
        for line in listing.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(instructions)
            elif match := _LOW.match(line):
                low = match
            elif low and (match := _HIGH.match(line)):
                bits = int(match[1], 16)
                waits = tuple(n for n in range(6) if bits >> 52 + n & 1)
                control = (bits >> 41 & 15, bits >> 46 & 7, bits >> 49 & 7, waits)
                instructions.append(Instruction(low[1] or "", low[2], low[3] or "", *control))
                low = None
        return cls(instructions, labels)

    def _blocks(self) -> tuple[dict[int, int], dict[int, list[int]]]:
        """End and successors of each basic block, by the index of its first instruction."""
        n, ends = len(self.instructions), ("EXIT", "RET", "KILL", "BRX")
        leaders = {0, *self.labels.values()}
        for k, i in enumerate(self.instructions):
            if i.target or i.base in ends:
                leaders |= {k + 1} | ({self.labels[i.target]} if i.target else set())
        starts = sorted(x for x in leaders if x < n)
        end = dict(zip(starts, [*starts[1:], n], strict=True))
        follow = {}
        for start in starts:
            last = self.instructions[end[start] - 1]
            after = [self.labels[last.target]] if last.target else []
            if last.base == "BRX":
                named = [self.labels[x] for x in re.findall(r"\.L_\w+", last.args) if x in self.labels]
                after = named or sorted(self.labels.values())
            elif not (last.target or last.base in ends) or last.conditional:
                after.append(end[start])
            follow[start] = [x for x in dict.fromkeys(after) if x < n]
        return end, follow

    def loops(self) -> list[tuple[int, set[int]]]:
        """Natural loops, smallest first: (index of the head, indices of the body).

        A back edge goes to a block that dominates its origin. Position would not do: blocks that wait for a barrier
        stand at the end of the code and jump back.
        """
        end, follow = self._blocks()
        before: dict[int, list[int]] = collections.defaultdict(list)
        for block, after in follow.items():
            for x in after:
                before[x].append(block)
        seen = _reached(0, follow, set())
        dominators = {block: set(seen) for block in sorted(seen)}
        dominators[0], changed = {0}, True
        while changed:
            changed = False
            for block in sorted(seen - {0}):
                new = set.intersection(*(dominators[x] for x in before[block] if x in seen)) | {block}
                if new != dominators[block]:
                    dominators[block], changed = new, True
        bodies: dict[int, set[int]] = collections.defaultdict(set)
        for block in seen:
            for head in set(follow[block]) & dominators[block]:
                bodies[head] |= {head} | (_reached(block, before, {head}) & seen)
        loops = [(head, {k for block in body for k in range(block, end[block])}) for head, body in bodies.items()]
        return sorted(loops, key=lambda loop: (len(loop[1]), loop[0]))

    def path(self, head: int = 0, body: set[int] | None = None) -> list[Instruction]:
        """One iteration from `head`, conditional branches inside `body` not taken; without a body the whole kernel."""
        k, path, seen = head, [], set()
        while k < len(self.instructions) and k not in seen and (body is None or k in body):
            seen.add(k)
            i = self.instructions[k]
            path.append(i)
            if i.base in ("EXIT", "RET") and not i.conditional:
                break
            k += 1
            if i.target and (not i.conditional or (body is not None and k not in body)):
                k = self.labels[i.target]
            if k == head:
                break
        return path


def _reached(start: int, edges: dict[int, list[int]], without: set[int]) -> set[int]:
    seen, waiting = set(without), [start]
    while waiting:
        block = waiting.pop()
        if block not in seen:
            seen.add(block)
            waiting += edges[block]
    return seen


def spills(code: Iterable[Instruction]) -> dict[str, int]:
    """Instructions that move spilled registers, and the bytes a thread moves with them."""
    local = [i for i in code if i.base in LOCAL]
    return dict(spill_instructions=len(local), spill_bytes=sum(i.bytes for i in local))


def accesses(code: Iterable[Instruction]) -> dict[str, int]:
    """Number of global loads and stores by width in bits ("128": 4); "bulk" are tensor-map copies."""
    count = collections.Counter(
        "bulk" if i.base in ("UTMALDG", "UTMASTG", "UBLKCP") else str(8 * i.bytes)
        for i in code
        if i.base in LOADS | STORES | {"UTMALDG", "UTMASTG", "UBLKCP"}
    )
    return dict(sorted(count.items()))


def tensor_shapes(code: Iterable[Instruction]) -> dict[str, int]:
    """Number of matrix instructions by name and shape ("HGMMA.64x128x16")."""
    count: collections.Counter[str] = collections.Counter()
    for i in code:
        if TENSOR.match(i.op):
            shape = re.search(r"\.(\d+x\d+x\d+|16816|1688)", i.op)
            count[i.base + (f".{shape[1]}" if shape else "")] += 1
    return dict(sorted(count.items()))


def cycles(path: list[Instruction], rates: Rates) -> dict[str, float]:
    """Cycles of one warp's `path` on each pipe of its sub-partition; "issue" is one for each instruction."""
    busy: dict[str, float] = dict(tensor=0.0, xu=0.0, fma=0.0, alu=0.0, mio=0.0)
    for i in path:
        name, time, _ = pipe(i.op, i.args, rates)
        if name in busy:
            busy[name] += time
    return busy | dict(issue=float(len(path)))


def occupancy(registers: int, shared: int, warps: int, rates: Rates) -> int:
    """Blocks that fit one multiprocessor: registers come in 256 a warp; the system takes 1 KB of shared memory each."""
    by_registers = rates.registers // (-(-max(registers, 1) * 32 // 256) * 256 * warps)
    return min(by_registers, rates.shared // (shared + 1024), rates.warps // warps, rates.blocks)
