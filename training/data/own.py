"""A user's own data: a file of `source<TAB>target` lines, or texts; what is held out of them; and their ids."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tileformer import arguments
from tileformer.decoder.tokenizer import KINDS, Tokenizer
from tileformer.files import lines_of, quote
from tileformer.training.data.batches import OURS, PAD, Frame
from tileformer.training.data.text import hash_bucket, key

DOCUMENTS = ("auto", "lines", "paragraphs", "files")
HELD_OUT = 5  # %
T = TypeVar("T")
TextPair = tuple[str, str]


def pairs_of(content: Any, encoding: str = "utf-8", *, skip_bad_lines: bool = False) -> list[TextPair]:
    """Pairs of texts: of a file with `source<TAB>target` lines, whose blank ones are skipped, or of any iterable of
    pairs, or of {"source": ..., "target": ...} as a `datasets.Dataset` has them.

    Raises ValueError, one line that names file:line or the row, for one that is no pair, and where there is none;
    skip_bad_lines leaves such lines out, with one warning that counts them."""
    if not isinstance(content, str | Path):
        return [_pair(row, number) for number, row in enumerate(content)] or _nothing("the data")
    result: list[TextPair] = []
    faults: list[str] = []
    lines = lines_of(Path(content).read_bytes(), content, encoding, skip_bad_lines)
    for number, line in enumerate(lines, 1):
        if isinstance(line, ValueError):
            faults.append(str(line))
            continue
        source, *others = (part.strip() for part in line.removeprefix("\ufeff").split("\t"))
        if not source and not any(others):
            continue
        if len(others) == 1 and source and others[0]:
            result.append((source, others[0]))
        else:
            columns = f"{len(others) + 1} column{'s' * bool(others)}" if len(others) != 1 else "an empty one"
            faults.append(f"{content}:{number}: expected source<TAB>target, found {columns} in {quote(line, 40)}")
    if faults and not skip_bad_lines:
        more = f"; {len(faults) - 1:,} more bad lines" if faults[1:] else ""
        raise ValueError(f"{faults[0]}{more}; mend them, or leave them out with --skip-bad-lines")
    if faults:
        warnings.warn(f"{content}: {len(faults):,} lines are left out, the first: {faults[0]}", stacklevel=2)
    return result or _nothing(content)


def texts_of(
    content: Any, encoding: str = "utf-8", *, documents: str = "auto", skip_bad_lines: bool = False
) -> list[str]:
    """Texts: the documents of files, or of any iterable of texts or of {"text": ...}.

    documents: what is one in a file: each of the "lines"; "paragraphs", which a blank line ends; all of the "files".
    "auto": paragraphs where a blank line follows another line than each one does, else lines."""
    if documents not in DOCUMENTS:
        raise ValueError(f"documents must be one of {', '.join(DOCUMENTS)}, got {quote(documents)}")
    if isinstance(content, str | Path):
        content = [Path(content)]
    result: list[str] = []
    for number, one in enumerate(content):
        if isinstance(one, Path):
            lines = [x for x in lines_of(one.read_bytes(), one, encoding, skip_bad_lines) if isinstance(x, str)]
            result += [*_documents(lines, documents)]
        else:
            text = one.get("text") if hasattr(one, "get") else one
            if not isinstance(text, str):
                raise ValueError(
                    f"row {number}: expected a text, or an object with one under 'text', found {quote(one)}"
                )
            result.append(text)
    return [text for text in result if text.strip()] or _nothing("the data")


def _documents(lines: list[str], how: str) -> Iterator[str]:
    filled = [bool(line.strip()) for line in lines]
    if how == "auto":
        joined = sum(a and b for a, b in zip(filled, filled[1:], strict=False))
        how = "paragraphs" if joined and not all(filled[:-1]) else "lines"
    if how == "files":
        yield "\n".join(lines)
    elif how == "lines":
        yield from lines
    else:
        paragraph: list[str] = []
        for line, full in zip([*lines, ""], [*filled, False], strict=True):
            if full:
                paragraph.append(line)
            elif paragraph:
                yield "\n".join(paragraph)
                paragraph = []


def hold_out(items: Sequence[T], of: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """What is learned and the 5 % that are not, by the hash of each item's key: copies stay together, whatever the
    order of the lines. Where that holds out less than half of 5 % of the text, the next hashes are too.

    Raises ValueError where all items are copies of one."""
    buckets = [hash_bucket(key(of(item)) or of(item), 10_000) for item in items]
    if len(set(buckets)) < 2:
        raise ValueError(f"all {len(items):,} rows are copies of one: give others, or hold out some with --valid FILE")
    sizes: Counter[int] = Counter()
    for item, bucket in zip(items, buckets, strict=True):
        sizes[bucket] += len(of(item))
    held: set[int] = set()
    for bucket in sorted(sizes)[:-1]:
        if bucket >= 100 * HELD_OUT and 200 * sum(sizes[x] for x in held) >= HELD_OUT * sizes.total():
            break
        held.add(bucket)
    parts: tuple[list[T], list[T]] = ([], [])
    for item, bucket in zip(items, buckets, strict=True):
        parts[bucket in held].append(item)
    return parts


def tokenizer_kind(text: str) -> str:
    """A kind of tokenizer, or a file that is there: the type of an argument."""
    return text if text in KINDS else str(arguments.input_file(text))


def tokenizer_of(kind: str, texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of a kind, learned on ``texts``, or a file's. ValueError for a file without three ids."""
    if kind in KINDS:
        return Tokenizer.train(texts, kind, vocabulary, 1)
    tokenizer = Tokenizer.load(kind)
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("pad", "bos", "eos")}
    if None in ids.values() or len(set(ids.values())) < 3:
        told = ", ".join(f"{name} {number}" for name, number in ids.items())
        raise ValueError(f"{kind}: a model wants three ids for padding, begin and end, the file has {told}: add tokens")
    return tokenizer


def frame_of(model: Any, add_bos: bool = True) -> Frame:
    """How rows of a model's ids are framed for its losses: padding's label is left out where nothing else is 0."""
    bos = model.bos_id if add_bos else None
    frame = Frame(model.pad_id, bos, model.eos_id, PAD)
    return frame if frame == OURS else frame._replace(ignored=-100)


def _pair(row: Any, number: int) -> TextPair:
    two = (row.get("source"), row.get("target")) if hasattr(row, "get") else row
    if not isinstance(two, Sequence) or len(two) != 2 or not all(isinstance(x, str) and x for x in two):
        raise ValueError(f"row {number}: expected a source and a target, found {quote(row)}")
    return two[0], two[1]


def _nothing(where: Any) -> Any:
    raise ValueError(f"{where}: nothing to read")
