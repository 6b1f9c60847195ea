"""Labelled texts: cleaning, the `label<TAB>text` file, duplicates, and splits that follow from the texts alone.

A text's part is decided by the hash of its key (its letters, ideographs and digits, without case, width, punctuation
and spacing), so the same text never stands on both sides of a split, whatever the order or the number of lines.
"""

import hashlib
import html
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tileformer.files import PathLike, lines_of, quote

HIDDEN = re.compile(r"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
# Tags that end a line of text are a space; the others (<b>, <span>) stand inside words of Chinese, and leave nothing.
BREAK = re.compile(r"</?(?:br|p|div|li|ul|ol|t[dhr]|table|h[1-6]|hr|blockquote)\b[^<>]*>", re.IGNORECASE)
TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9:-]*(?:\s[^<>]*)?/?>")  # not <PRADA的恶魔>, which is the title of a book
LONGEST = 20_000  # characters of one text; a longer line is most often a file whose lines lost their ends


@dataclass(frozen=True)
class Labelled:
    """Texts and their labels: `labels[i]` is the index in `names` of what `texts[i]` is."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def pick(self, indices: Iterable[int]) -> "Labelled":
        """The texts at `indices`, in that order, under the same names."""
        indices = list(indices)
        return Labelled(tuple(self.texts[i] for i in indices), tuple(self.labels[i] for i in indices), self.names)


def clean(text: str, *, markup: bool = True, width: bool = True, case: bool = False) -> str:
    """`text` on one line: white space in runs of one space, without control and zero-width characters.

    markup: drop tags, comments and scripts, and decode entities (`&amp;`). width: NFKC, so that full-width letters,
    digits and punctuation become half-width, and half-width kana full. case: lower the case of letters.
    """
    if markup:
        text = html.unescape(TAG.sub("", BREAK.sub(" ", HIDDEN.sub(" ", text))))
    if width:
        text = unicodedata.normalize("NFKC", text)
    # Cc: control, Cf: zero-width, direction and byte-order marks, Cs: halves of characters, which no file can hold.
    kept = (c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    text = " ".join("".join(kept).split())
    return text.lower() if case else text


def key(text: str) -> str:
    """What two copies of a text share: NFKC, word characters only (letters, ideographs, digits), lower case."""
    text = unicodedata.normalize("NFKC", text)
    # Combining marks belong to a word: they make other vowels of a letter in Hindi, Thai or Arabic.
    return "".join(c for c in text if c.isalnum() or c == "_" or unicodedata.category(c).startswith("M")).lower()


def hash_bucket(key: str, modulo: int = 100) -> int:
    """Where a key falls, 0 to `modulo` - 1: the first 8 bytes of its sha256, big-endian, modulo that."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") % modulo


def read_labelled(
    path: PathLike,
    *,
    encoding: str = "utf-8",
    names: Sequence[str] | None = None,
    longest: int = LONGEST,
    skip_bad_lines: bool = False,
) -> Labelled:
    """A file of `label<TAB>text` lines; blank lines are skipped, and tabs after the first belong to the text.

    names: the labels that may occur and their order (those of the training file); without, the labels found, sorted.
    skip_bad_lines: leave out the lines that would be an error, with one warning that counts them.
    Raises ValueError, one line that names `file:line`, for a wrong encoding, a line without a tab, label or text, a
    text over `longest` characters, a label not in `names`, a file without texts or with a single label, and for what
    looks like `text<TAB>label`; OSError when the file cannot be read.
    """
    texts: list[str] = []
    seen: list[str] = []
    faults: list[tuple[int, str]] = []
    lines = lines_of(Path(path).read_bytes(), path, encoding, skip_bad_lines)
    for number, line in enumerate(lines, 1):
        if isinstance(line, ValueError):
            faults.append((number, str(line).removeprefix(f"{path}:{number}: ")))
            continue
        line = line.removeprefix("\ufeff")  # of joined files
        label, tab, text = (part.strip(" \u3000") for part in line.partition("\t"))
        if not (label or tab):
            continue
        if not tab:
            faults.append((number, f"expected label<TAB>text, found no tab in {quote(line, 40)}"))
        elif not (label and text.strip()):
            faults.append((number, f"expected label<TAB>text, found no {'text' if label else 'label'}"))
        elif len(text) > longest:
            faults.append((number, f"a text of {len(text):,} characters, over {longest:,}; cut it"))
        elif names is not None and label not in names:
            faults.append((number, f"unknown label {quote(label, 40)}; there is: {quote(', '.join(names), 100)}"))
        else:
            texts.append(text)
            seen.append(label)
    if faults:
        (number, fault), *others = faults
        more = f"; {len(others):,} more bad lines, the next is {others[0][0]}" if others else ""
        if not skip_bad_lines:
            raise ValueError(f"{path}:{number}: {fault}{more}")
        said = f"{path}: {len(faults):,} of {len(lines):,} lines are left out, the first is {number}: {fault}"
        warnings.warn(said, stacklevel=2)
    if not texts:
        raise ValueError(f"{path}: expected lines of label<TAB>text, the file holds none")
    known = tuple(sorted(set(seen)) if names is None else names)
    if len(set(seen)) == 1:
        raise ValueError(f"{path}: expected two labels or more, all {len(texts):,} lines have {quote(seen[0], 40)}")
    if len(known) > max(20, len(texts) // 2):
        raise ValueError(f"{path}: {len(known):,} labels in {len(texts):,} lines; swap columns that are text<TAB>label")
    ids = {name: number for number, name in enumerate(known)}
    return Labelled(tuple(texts), tuple(ids[label] for label in seen), known)


def deduplicate(labelled: Labelled, clean: Callable[[str], str] = clean) -> tuple[Labelled, dict[str, int]]:
    """One text for each key, the first; none for a key under 2 characters, or one that stands under several labels.

    A key is that of the cleaned text: what a model would read twice is there once. `clean`: how.
    The counts say where the "lines" went: "short", "conflicting", "repeated", "kept".
    """
    keys = [key(clean(text)) for text in labelled.texts]
    labels: dict[str, set[int]] = {}
    for word, label in zip(keys, labelled.labels, strict=True):
        labels.setdefault(word, set()).add(label)
    counts = {"lines": len(keys), "short": 0, "conflicting": 0, "repeated": 0}
    kept: dict[str, int] = {}
    for number, word in enumerate(keys):
        if len(word) < 2:
            counts["short"] += 1
        elif len(labels[word]) > 1:
            counts["conflicting"] += 1
        elif word in kept:
            counts["repeated"] += 1
        else:
            kept[word] = number
    return labelled.pick(kept.values()), counts | {"kept": len(kept)}


def split(labelled: Labelled, test: int = 10, valid: int = 5) -> dict[str, Labelled]:
    """Parts "train", "valid" and "test" by the bucket of each text's key: below `test` %, the next `valid` %, the rest.

    Raises ValueError for a part with fewer than two labels, and for a label of valid or test that train does not have.
    """
    if not (test > 0 and valid > 0 and test + valid < 100):
        raise ValueError(f"test and valid must be above 0 and leave train something, got {test} % and {valid} %")
    rows: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for number, text in enumerate(labelled.texts):
        where = hash_bucket(key(text))
        rows["test" if where < test else "valid" if where < test + valid else "train"].append(number)
    parts = {name: labelled.pick(chosen) for name, chosen in rows.items()}
    for name, part in parts.items():
        if len(labels := set(part.labels)) < 2:
            found = f"{len(part):,} texts of {len(labels)} label{'s' * (len(labels) != 1)}"
            raise ValueError(f"the {name} part has {found}, two are needed; give more texts than {len(labelled):,}")
        if unknown := sorted(labels - set(parts["train"].labels)):
            label = labelled.names[unknown[0]]
            raise ValueError(f"label {label!r} stands in {name} but never in train; give more texts of it")
    return parts


def subset(labelled: Labelled, n: int, seed: int) -> Labelled:
    """`n` texts, their labels in the proportions of all, at least one each; in their order in `labelled`.

    Within a label texts are taken in the order of sha256(seed, key): another order of lines gives the same texts, and a
    smaller subset of the same seed is part of a larger one. Raises ValueError for `n` below the labels or above all.
    """
    order = [hash_bucket(f"{seed}/{key(text)}", 1 << 64) for text in labelled.texts]
    groups: dict[int, list[int]] = {}
    for number in sorted(range(len(order)), key=order.__getitem__):
        groups.setdefault(labelled.labels[number], []).append(number)
    if not len(groups) <= n <= len(labelled):
        raise ValueError(f"a subset must have {len(groups)} to {len(labelled):,} texts (labels to all), got {n:,}")
    # How much of its label is used up by each text: the n smallest shares are n texts in the proportions of all.
    shares: list[tuple[float, int]] = []
    for group in groups.values():
        shares += [((rank + 0.5) / len(group) if rank else 0.0, number) for rank, number in enumerate(group)]
    return labelled.pick(sorted(number for _, number in sorted(shares)[:n]))
