"""pairs and text: your own data, an encoder-decoder of `source<TAB>target` lines or a decoder alone of texts.

tileformer train pairs --data FILE.tsv
tileformer train text --data FILE.txt --tokenizer bpe
"""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tileformer import arguments
from tileformer.decoder import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig
from tileformer.decoder.generation import Options
from tileformer.decoder.pretrained import TARGET, TOKENIZER, Writing, load_tokenizer
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.training import checkpoint
from tileformer.training.data import own
from tileformer.training.data.batches import Batches, PackedBatches
from tileformer.training.losses import language_loss, sequence_loss
from tileformer.training.measure import lines_about, measured_pairs
from tileformer.training.recipes.recipe import Data, Recipe, Scale, configured
from tileformer.training.settings import Settings

LONGEST = 512  # ids of a row; a longer pair is left out, a longer text goes on in the next row
# A small file is read about a hundred times, a large one as often as twenty minutes of a core allow.
LEAST, MOST, EPOCHS = 200_000, 10_000_000, 40
LEARNING = Settings(LEAST, lr=2e-3, schedule="wsd", decay=0.5, save_every=1000, valid_every=100, keep_best=True)
QUICK = Scale(LEARNING, 32, {"dropout": 0.1})
SHOWN = 5


def add_arguments(parser: Any) -> None:
    add = parser.add_argument
    about = "your own data; any number of files"
    add("--data", type=arguments.input_file, action="append", default=[], metavar="FILE", help=about)
    about = "what to validate on (default 5 %% of --data by hash)"
    add("--valid", type=arguments.input_file, metavar="FILE", help=about)
    about = "characters, bpe, or a tokenizer.json (default characters)"
    add("--tokenizer", type=own.tokenizer_kind, default="characters", metavar="KIND", help=about)
    add("--encoding", type=arguments.encoding, default="utf-8", metavar="E", help="of the files (default utf-8)")
    add("--skip-bad-lines", action="store_true", help="leave out lines that cannot be read, and say how many")


def read_pairs(args: argparse.Namespace) -> Data:
    """The pairs, split, as ids of a vocabulary for each side."""
    _check(args)
    how = {"encoding": args.encoding, "skip_bad_lines": args.skip_bad_lines}
    pairs = [pair for path in args.data for pair in own.pairs_of(path, **how)]
    if args.valid:
        train, valid = pairs, own.pairs_of(args.valid, **how)
    else:
        train, valid = own.hold_out(pairs, lambda pair: pair[0])
    sides = [own.tokenizer_of(args.tokenizer, side, args.options["vocabulary"]) for side in zip(*train, strict=True)]
    rows = {name: _encoded(part, sides, args.options["longest"]) for name, part in (("train", train), ("valid", valid))}
    lost = len(train) + len(valid) - sum(map(len, rows.values()))
    frame = own.Frame(*(getattr(sides[1], f"{name}_id") for name in ("pad", "bos", "eos")))
    frame = frame if frame == own.OURS else frame._replace(ignored=-100)
    tokens = sum(len(source) + len(target) + 1 for source, target in rows["train"])
    sizes = f"{sides[0].size:,} and {sides[1].size:,} ids of {sides[0].kind}"
    sides[0].target = sides[1]
    counts = ", ".join(f"{name} {len(part):,}" for name, part in rows.items())
    gone = f"; {lost:,} of over {args.options['longest']} ids left out" if lost else ""
    return Data(
        Batches(rows["train"], args.scale.batch, seed=args.seed, frame=frame),
        Batches(rows["valid"], 256, frame=frame),
        vocabulary=sides[0],
        test=valid,
        facts=(f"{len(pairs):,} pairs: {counts}{gone}; {sizes}",),
        meta=_meta(args, *sides),
        files={TOKENIZER: sides[0], TARGET: sides[1]},
        tokens=min(max(LEAST, EPOCHS * tokens), MOST),
        tokenizer=sides[0],
        target_tokenizer=sides[1],
        longest=max(max(map(len, pair)) for part in rows.values() for pair in part) + 1,
    )


def _check(args: argparse.Namespace) -> None:
    if not args.data:
        raise ValueError("your own data are needed: --data FILE")


def _encoded(pairs: list[own.TextPair], sides: list[Tokenizer], longest: int) -> list[Any]:
    columns = [side.encode_all(texts) for side, texts in zip(sides, zip(*pairs, strict=True), strict=True)]
    rows = [pair for pair in zip(*columns, strict=True) if 0 < len(pair[0]) <= longest and 0 < len(pair[1]) < longest]
    if not rows:
        raise ValueError(f"all {len(pairs):,} pairs are over {longest} ids; cut them, or --set data.longest=N")
    return rows


def _meta(args: argparse.Namespace, *tokenizers: Tokenizer) -> dict[str, Any]:
    content = hashlib.sha256(b"".join(path.read_bytes() for path in args.data)).hexdigest()
    return {"data": content, "tokenizers": [made.fingerprint for made in tokenizers]}


def pairs_config(args: argparse.Namespace, data: Data) -> Any:
    source, target = data.tokenizer, data.target_tokenizer
    ids = {f"{name}_id": getattr(target, f"{name}_id") for name in ("pad", "bos", "eos")}
    sizes = {"src_vocab": getattr(source, "size", 0), "tgt_vocab": getattr(target, "size", 0)}
    return configured(args, Seq2SeqConfig, **sizes, **ids, max_length=max(16, data.longest or 0))


def evaluate_pairs(model: Any, data: Data, report: Any, args: argparse.Namespace) -> Iterator[str]:
    """Scores of what is held out, and some of it as the model writes it."""
    scores, written = measured_pairs(model, data.vocabulary, data.test)
    yield from lines_about(scores, f"held out, {len(data.test):,} pairs, greedy:")
    for (source, target), text in [*zip(data.test, written, strict=True)][:SHOWN]:
        yield f"  {source}  ->  {text}" + ("" if text == target else f"   true: {target}")


def read_texts(args: argparse.Namespace) -> Data:
    """The documents, split, as ids."""
    _check(args)
    how = {"encoding": args.encoding, "skip_bad_lines": args.skip_bad_lines, "documents": args.options["documents"]}
    texts = own.texts_of(args.data, **how)
    if args.valid:
        train, valid = texts, own.texts_of(args.valid, **how)
    elif len(texts) == 1:  # one long text: its end is held out
        cut = len(texts[0]) * (100 - own.HELD_OUT) // 100
        train, valid = [texts[0][:cut]], [texts[0][cut:]]
    else:
        train, valid = own.hold_out(texts, str)
    tokenizer = own.tokenizer_of(args.tokenizer, train, args.options["vocabulary"])
    frame = own.Frame(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    frame = frame if frame == own.OURS else frame._replace(ignored=-100)
    rows = {name: [*filter(None, tokenizer.encode_all(part))] for name, part in (("train", train), ("valid", valid))}
    longest = args.scale.model.get("max_length", 256)
    counts = ", ".join(f"{name} {len(part):,} of {sum(map(len, part)):,} ids" for name, part in rows.items())
    batch = max(args.scale.batch, longest)
    return Data(
        PackedBatches(rows["train"], batch, seed=args.seed, longest=longest - 1, frame=frame),
        PackedBatches(rows["valid"], batch, longest=longest - 1, frame=frame),
        vocabulary=tokenizer,
        test=sum(map(len, valid)) / max(1, sum(map(len, rows["valid"]))),
        facts=(f"{len(texts):,} documents: {counts}; {tokenizer.size:,} ids of {tokenizer.kind}",),
        meta=_meta(args, tokenizer),
        files={TOKENIZER: tokenizer},
        tokens=min(max(LEAST, EPOCHS * sum(map(len, rows["train"]))), MOST),
        tokenizer=tokenizer,
        writing=WRITTEN,
        longest=longest,
    )


WRITTEN = Writing(Options(temperature=0.8, top_p=0.95, seed=0), None, True, "{prompt}{text}")


def text_config(args: argparse.Namespace, data: Data) -> Any:
    ids = {f"{name}_id": getattr(data.tokenizer, f"{name}_id") for name in ("pad", "bos", "eos")}
    return configured(args, DecoderLMConfig, vocab=getattr(data.tokenizer, "size", 0), max_length=data.longest, **ids)


def evaluate_text(model: Any, data: Data, report: Any, args: argparse.Namespace) -> Iterator[str]:
    """Perplexity of what is held out."""
    yield from lines_about({"loss": report.valid_loss or 0.0, "characters_per_token": data.test}, "held out:")


def tokenizer_in(path: Path, meta: Any, config: Any) -> Tokenizer:
    """The tokenizer of a run that a checkpoint is of. CheckpointError where it is another."""
    folder = path if (path / TOKENIZER).exists() else path.parent
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise checkpoint.CheckpointError(f"{folder}: expected a {TOKENIZER} beside the checkpoints")
    made = [tokenizer] if tokenizer.target is tokenizer else [tokenizer, tokenizer.target]
    if [one.fingerprint for one in made] != meta.get("tokenizers"):
        raise checkpoint.CheckpointError(f"{folder}: not the tokenizer that {path} was trained with")
    return tokenizer


COMMON = {"vocabulary": 8000}
PAIRS = Recipe(
    name="pairs",
    about="pairs: your own source<TAB>target lines, an encoder-decoder",
    quick=QUICK,
    data=read_pairs,
    config=pairs_config,
    config_type=Seq2SeqConfig,
    model=Seq2Seq,
    loss=sequence_loss,
    evaluate=evaluate_pairs,
    arguments=add_arguments,
    vocabulary=tokenizer_in,
    writing=Writing(),
    options=COMMON | {"longest": LONGEST},
    example="TEXT",
)
TEXT = Recipe(
    name="text",
    about="text: your own texts, a decoder alone",
    quick=replace(QUICK, batch=1024),
    data=read_texts,
    config=text_config,
    config_type=DecoderLMConfig,
    model=DecoderLM,
    loss=language_loss,
    evaluate=evaluate_text,
    arguments=add_arguments,
    vocabulary=tokenizer_in,
    writing=WRITTEN,
    options=COMMON | {"documents": "auto"},
    example="TEXT",
)
