"""What a language model of texts and every classifier of it share: clean texts in parts, their ids, a model's files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tileformer.decoder import Classifier, DecoderLMConfig
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.files import quote, to_json, write
from tileformer.training import checkpoint
from tileformer.training.data import text
from tileformer.training.finetune.methods import METHODS, probabilities

LONGEST = 128  # tokens of a text that a model reads, begin included; 18 % of the reviews are longer
TOKENIZER = "tokenizer.json"  # beside the checkpoints of a run


def clean(line: str) -> str:
    """What every model and baseline reads of a text."""
    return text.clean(line, case=True)


def split(labelled: text.Labelled) -> tuple[dict[str, text.Labelled], str]:
    """Distinct texts, split by hash into train, valid and test, then cleaned; and a line that counts them."""
    distinct, counts = text.deduplicate(labelled, clean)
    parts = {name: replace(part, texts=tuple(map(clean, part.texts))) for name, part in text.split(distinct).items()}
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
    lost = ", ".join(f"{counts[why]:,} {why}" for why in ("repeated", "conflicting", "short") if counts[why])
    return parts, f"{counts['lines']:,} lines, {len(distinct):,} distinct texts ({lost or 'none'} left out): {sizes}"


def make_tokenizer(train: Sequence[str]) -> Tokenizer:
    """Characters that stand at least twice in the texts that may be learned from."""
    return Tokenizer.train(train, kind="characters", vocabulary=8000, minimum=2)


def make_config(tokenizer: Tokenizer, dropout: float = 0.1) -> DecoderLMConfig:
    return DecoderLMConfig(tokenizer.size, dropout=dropout, max_length=LONGEST)


def to_rows(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each cleaned text, begin first, as the language model saw them; what is longer is cut."""
    return [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_all(texts, LONGEST - 1)]


def load_tokenizer(path: Path, meta: Mapping[str, Any], config: DecoderLMConfig) -> Tokenizer:
    """The tokenizer in a checkpoint's folder or in its run's. CheckpointError: it is not the one of this model."""
    file = (path if (path / TOKENIZER).exists() else path.parent) / TOKENIZER
    tokenizer = Tokenizer.load(file)
    if tokenizer.fingerprint != meta.get("tokenizer"):
        raise checkpoint.CheckpointError(f"{file}: not the tokenizer that {path} was trained with")
    checkpoint.check_vocabulary(path, (config.vocab,), (tokenizer.size,))
    return tokenizer


def save_classifier(
    folder: Path, model: Classifier, config: DecoderLMConfig, tokenizer: Tokenizer, **meta: Any
) -> None:
    """Write a fine-tuned classifier for `tileformer generate`; state.json, which makes it one, comes last.

    meta: recipe, method and the names of the classes.
    """
    tokenizer.save(folder / TOKENIZER)
    checkpoint.save_weights(model, folder / checkpoint.WEIGHTS)
    meta |= {"model": asdict(config), "tokenizer": tokenizer.fingerprint}
    write(folder / checkpoint.STATE, to_json({"format": checkpoint.FORMAT, "meta": meta}, indent=1) + "\n")


def load_classifier(path: Path, device: torch.device) -> tuple[Any, tuple[Tokenizer, list[str]]]:
    """What `save_classifier` wrote, in eval mode: model, and its tokenizer with the names of the classes."""
    meta = checkpoint.read_state(path)["meta"]
    method, names = meta["method"], meta.get("names")
    if not (isinstance(method, str) and method in METHODS and isinstance(names, list) and len(names) > 1):
        found = f"{quote(method)} and {quote(names)}"
        raise checkpoint.CheckpointError(f"{path}: damaged; expected a method and the names of classes, found {found}")
    model: Any = checkpoint.build(path, DecoderLMConfig, lambda config: METHODS[method].make(config, len(names)))
    return model.to(device).eval(), (load_tokenizer(path, meta, model.backbone.config), names)


def parse(vocabulary: tuple[Tokenizer, list[str]], line: str) -> tuple[str, list[int]]:
    """A text and its ids."""
    return line, to_rows(vocabulary[0], [clean(line)])[0]


def show(model: Any, vocabulary: tuple[Tokenizer, list[str]], inputs: Sequence[tuple[str, list[int]]]) -> list[str]:
    """`class share  text` for each text."""
    shares, classes = probabilities(model, [row for _, row in inputs]).max(1)
    judged = zip(classes.tolist(), shares.tolist(), inputs, strict=True)
    return [f"{vocabulary[1][number]} {share:.1%}  {line}" for number, share, (line, _) in judged]
