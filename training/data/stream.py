"""Text files larger than memory: lines as id sequences, shuffled, resumable at the exact line, packed into batches.

One pass at the start notes where blocks of whole lines begin and checks that every line is text. An epoch shuffles the
blocks, reads GROUP of them at a time and shuffles their lines: that group is all the text ever held. The order follows
from the seed and the epoch alone, so a position is two numbers, and to resume is to read one group.
"""

import itertools
import os
import random
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tileformer.decoder.tokenizer import Tokenizer
from tileformer.files import decode, is_damaged
from tileformer.training.data.batches import PackedBatch, Resumable, check_fits, pack, pieces

GROUP = 16  # blocks whose lines are shuffled together: neighbours come from as many parts of the corpus


@dataclass(frozen=True)
class Block:
    """Whole lines of one file: `size` bytes from byte `start`, the first one line `line`; `count` are not blank."""

    path: Path
    start: int
    size: int
    line: int
    count: int


class StreamedRows(Resumable[list[int]]):
    """The ids of each line of text files, one epoch in one `for` loop; blank lines are skipped.

    With a `seed` every epoch has another order, without the lines keep theirs. buffer: bytes of text held at once.
    prepare: what is done to a line before it becomes ids (`text.clean`); what it leaves empty is an empty row.
    skip_bad_lines: leave out lines with bytes that are no text, with one warning a file that counts them.

    Raises ValueError, one line that names file:line, for bytes that are not text in `encoding` (one in which a line end
    is a byte of its own: not utf-16), a line over `longest_line` bytes, files without text, and a file that changed
    after it was opened.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        tokenizer: Tokenizer,
        *,
        seed: int | None = None,
        buffer: int = 4 << 20,
        encoding: str = "utf-8",
        longest_line: int = 1 << 20,
        prepare: Callable[[str], str] = str.strip,
        skip_bad_lines: bool = False,
    ) -> None:
        self.tokenizer, self.seed, self.buffer, self.encoding, self.prepare = tokenizer, seed, buffer, encoding, prepare
        self.skip_bad_lines = skip_bad_lines
        self.blocks: list[Block] = []
        self.paths = [Path(path) for path in paths]
        for path in self.paths:
            self.blocks += _blocks(path, max(1, buffer // GROUP), encoding, longest_line, skip_bad_lines)
        if not any(block.count for block in self.blocks):
            raise ValueError(f"no text in {', '.join(map(str, self.paths)) or 'no files'}")
        # Asked for at every step of a run, and the blocks of a large corpus are many.
        lines, size = (sum(getattr(block, name) for block in self.blocks) for name in ("count", "size"))
        order = {"buffer": buffer, "seed": seed, "tokenizer": tokenizer.fingerprint}
        self.facts = {"files": [path.name for path in self.paths], "lines": lines, "bytes": size, **order}

    def _identity(self) -> dict[str, Any]:
        return self.facts

    def _plan(self, epoch: int) -> "_Epoch":
        return _Epoch(self, epoch)

    def _collate(self, entry: list[int]) -> list[int]:
        return entry

    def read(self, block: Block) -> list[list[int]]:
        """The rows of one block, in the file's order."""
        with block.path.open("rb") as file:
            file.seek(block.start)
            content = file.read(block.size)
        if self.skip_bad_lines:
            text = content.decode(self.encoding, "replace")
            text = text if block.start else text.removeprefix("\ufeff")
        else:
            text = decode(content, block.path, self.encoding, line=block.line, at=block.start)
        lines = [line for line in text.split("\n") if line.strip() and not (self.skip_bad_lines and is_damaged(line))]
        if len(lines) != block.count:
            found = f"{len(lines)} lines from byte {block.start:,} on, {block.count} when it was opened"
            raise ValueError(f"{block.path}:{block.line}: the file changed while it was read: {found}")
        return self.tokenizer.encode_all(map(self.prepare, lines))


class _Epoch(Sequence[list[int]]):
    """The rows of one epoch by their position in it; the group that holds the last one asked for stays in memory."""

    def __init__(self, rows: StreamedRows, epoch: int) -> None:
        self.rows, self.epoch, self.loaded = rows, epoch, -1
        blocks = list(rows.blocks)
        if rows.seed is not None:
            random.Random(f"{rows.seed}/{epoch}").shuffle(blocks)
        self.groups = [blocks[at : at + GROUP] for at in range(0, len(blocks), GROUP)]
        self.ends = list(itertools.accumulate(sum(block.count for block in group) for group in self.groups))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, position: Any) -> Any:
        group = bisect_right(self.ends, position)
        if group != self.loaded:
            self.held_rows = [row for block in self.groups[group] for row in self.rows.read(block)]
            if self.rows.seed is not None:
                random.Random(f"{self.rows.seed}/{self.epoch}/{group}").shuffle(self.held_rows)
            self.loaded = group
        return self.held_rows[position - self.ends[group]]


class StreamedBatches(Resumable[PackedBatch]):
    """Batches of the documents of `rows` end to end, as `PackedBatches` makes them of documents in memory.

    batch_tokens and longest as there; a batch takes whole lines in the order of `rows`, and a line that is cut may go
    on in the next one. The position is (epoch, line in it, piece of the line). Iterating moves `rows`, which belong to
    the batches. Raises ValueError for a line that fits no batch, when its turn comes.
    """

    position = ("epoch", "index", "piece")
    piece = 0

    def __init__(self, rows: StreamedRows, batch_tokens: int, *, longest: int | None = None) -> None:
        self.rows, self.batch_tokens, self.longest = rows, batch_tokens, longest

    def __iter__(self) -> Iterator[PackedBatch]:
        rows, piece = self.rows, self.piece
        rows.epoch, rows.index = self.epoch, self.index
        documents: list[Sequence[int]] = []
        free = self.batch_tokens
        for row in rows:
            parts = pieces(row, self.longest)
            while piece < len(parts):
                check_fits(parts[piece], self.batch_tokens, f"line {rows.index} of epoch {rows.epoch}")
                if len(parts[piece]) < free:
                    documents.append(parts[piece])
                    free -= len(parts[piece]) + 1
                    piece += 1
                else:
                    self.epoch, self.index, self.piece = rows.epoch, rows.index - 1, piece  # what comes next
                    yield pack(documents)
                    documents, free = [], self.batch_tokens
            piece = 0
        self.epoch, self.index, self.piece = rows.epoch, 0, 0
        if documents:
            yield pack(documents)

    def __len__(self) -> int:
        raise TypeError("the number of batches is known when the epoch has been read; len(rows) is the number of lines")

    def _identity(self) -> dict[str, Any]:
        return {**self.rows._identity(), "batch_tokens": self.batch_tokens, "longest": self.longest}


def _blocks(path: Path, size: int, encoding: str, longest_line: int, skip_bad_lines: bool) -> Iterator[Block]:
    """`path` as blocks of whole lines, each of `size` bytes or, by its last line, a little more."""
    start = at = first = count = 0
    bad: list[int] = []
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(longest_line + 1)
            if len(line) > longest_line:
                raise ValueError(f"{path}:{number}: a line of over {longest_line:,} bytes; give a file with line ends")
            if not line or at - start >= size:
                yield Block(path, start, at - start, first + 1, count)
                start, first, count = at, number - 1, 0
            if not line:
                break
            if skip_bad_lines and is_damaged(line.decode(encoding, "replace")):
                bad.append(number)
            else:
                count += bool(decode(line, path, encoding, line=number, at=at).strip())
            at += len(line)
    if bad:
        lost = f"{len(bad):,} lines are no {encoding} text and left out"
        warnings.warn(f"{path}: {lost}, the first is {bad[0]}", stacklevel=3)
