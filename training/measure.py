"""How good a model is on a file: loss and perplexity, and the scores of its task.

Examples:
    tileformer evaluate --checkpoint runs/pairs --data test.tsv          source<TAB>target: exact, CER, WER, BLEU, chrF
    tileformer evaluate --checkpoint runs/text --data test.txt --json    texts: perplexity
    tileformer evaluate --checkpoint runs/labels --data test.tsv         label<TAB>text: accuracy, F1

A source that stands in several lines is written once, and judged beside the closest of its targets. Where targets are
names with spaces between, as phonemes are, WER is the phoneme error rate, and 100 minus exact the word error rate.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tileformer import arguments
from tileformer.decoder.chat import framed
from tileformer.decoder.generation import Options, generate
from tileformer.decoder.heads import Classifier
from tileformer.decoder.pretrained import load, load_writing
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.extras import optional_import
from tileformer.files import lines_of, to_json
from tileformer.kernels.info import require_device
from tileformer.training import loop, process
from tileformer.training.data import own
from tileformer.training.data.batches import Batches, PackedBatches, pad
from tileformer.training.data.text import read_labelled
from tileformer.training.finetune import metrics
from tileformer.training.losses import language_loss, sequence_loss

GREEDY = Options()
BATCH, LONGEST = 64, 2048  # rows decoded at once; tokens scored at once, unless a row is longer
PRINTED = {"loss": "loss {:.4f} nats a token", "perplexity": "perplexity {:.2f}", "exact": "exact {:.2f} %"}
PRINTED |= {"cer": "CER {:.2f} %", "wer": "WER {:.2f} %", "bleu": "BLEU {:.2f}", "chrf": "chrF {:.2f}"}
PRINTED |= {"accuracy": "accuracy {:.2f} %", "macro_f1": "macro F1 {:.2f} %"}
PRINTED |= {"bits_per_character": "{:.3f} bits a character"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tileformer evaluate`."""
    add = parser.add_argument
    add("--checkpoint", type=arguments.input_path, required=True, metavar="DIR", help="the folder of a model")
    add("--data", type=arguments.input_file, required=True, metavar="FILE", help="what to judge it on")
    add("--encoding", type=arguments.encoding, default="utf-8", metavar="E", help="of the file (default utf-8)")
    add("--skip-bad-lines", action="store_true", help="leave out lines that cannot be read, and say how many")
    add("--beams", type=arguments.COUNT, default=1, metavar="K", help="write with K beams (default 1)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    add("--threads", type=arguments.THREADS, default=1, metavar="N", help="CPU threads (default 1)")
    add("--json", action="store_true", help="one object instead of a line")


def main(args: argparse.Namespace) -> int:
    """Print the scores. ValueError: a folder or a file that cannot be read."""
    process.require_single()
    device = require_device(args.device)
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.checkpoint, device=device)
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint}: a model without tokenizer.json reads no text")
    how = {"encoding": args.encoding, "skip_bad_lines": args.skip_bad_lines}
    if isinstance(model, Classifier):
        scores, rows = _labels(model, tokenizer, args.data, how), "texts"
    elif model.conditioned or _is_pairs(args.data, args.encoding):
        pairs, rows = own.pairs_of(args.data, **how), "pairs"
        scores = pair_loss(model, tokenizer, pairs, load_writing(args.checkpoint).add_bos)
        scores |= measured_pairs(model, tokenizer, pairs, Options(num_beams=args.beams))[0]
    else:
        scores, rows = (
            text_loss(model, tokenizer, own.texts_of(args.data, **how), load_writing(args.checkpoint).add_bos),
            "texts",
        )
    if args.json:
        print(to_json({"data": str(args.data), **scores}))
    else:
        print(*lines_about(scores, f"{args.data}, {scores['rows']:,} {rows}:"), sep="\n")
    return 0


def lines_about(scores: Mapping[str, float], title: str) -> Iterator[str]:
    """The scores, named."""
    scores = dict(scores)
    if "loss" in scores:
        scores["perplexity"] = metrics.perplexity(scores["loss"])
        if each := scores.get("characters_per_token"):
            scores["bits_per_character"] = scores["loss"] / math.log(2) / each
    yield title
    yield "  " + "   ".join(form.format(scores[name]) for name, form in PRINTED.items() if name in scores)


def measured_pairs(
    model: Any, tokenizer: Tokenizer, pairs: Sequence[own.TextPair], options: Options = GREEDY
) -> tuple[dict[str, float], list[str]]:
    """Scores of what the model writes for each pair's source, and that."""
    device = next(model.parameters()).device
    prompt = prompt_of(model, tokenizer)
    sources = sorted({source for source, _ in pairs}, key=len)
    said: dict[str, str] = {}
    for first in range(0, len(sources), BATCH):
        some = sources[first : first + BATCH]
        rows = [prompt(source) for source in some]
        room = model.max_length if model.conditioned else model.max_length - max(map(len, rows)) + 1
        fits = [i for i, row in enumerate(rows) if 0 < len(row) <= model.max_length - (not model.conditioned)]
        said |= dict.fromkeys(some, "")
        if fits and room > 0:
            new = generate(model, pad([rows[i] for i in fits], model.pad_id).to(device), room, options=options)
            for i, ids in zip(fits, new.tolist(), strict=True):
                ids = [number for number in ids if number not in (model.pad_id, model.eos_id)]
                said[some[i]] = tokenizer.target.decode(ids).strip()
    return scored(pairs, said), [said[source] for source, _ in pairs]


def scored(pairs: Sequence[own.TextPair], said: Mapping[str, str]) -> dict[str, float]:
    """Scores in % of what was ``said`` for each source. Needs rapidfuzz; BLEU and chrF where sacrebleu is installed."""
    distance = optional_import("rapidfuzz.distance").Levenshtein.distance
    references: dict[str, list[str]] = {}
    for source, target in pairs:
        references.setdefault(source, []).append(target)
    characters, words = [0, 0], [0, 0]
    exact = 0
    for source, known in references.items():
        exact += said[source] in known
        for counts, parts in ((characters, list), (words, str.split)):
            errors = [(distance(parts(said[source]), parts(target)), len(parts(target))) for target in known]
            best = min(errors)
            counts[0], counts[1] = counts[0] + best[0], counts[1] + best[1]
    result = {"rows": len(pairs), "exact": 100 * exact / len(references)}
    result |= {"cer": 100 * characters[0] / max(1, characters[1]), "wer": 100 * words[0] / max(1, words[1])}
    try:
        sacrebleu = optional_import("sacrebleu")
    except ValueError:
        return result
    firsts = [known[0] for known in references.values()]
    written = [said[source] for source in references]
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in "".join(firsts)) * 4 > len("".join(firsts))
    bleu = sacrebleu.corpus_bleu(written, [firsts], tokenize="zh" if chinese else "13a")
    return result | {"bleu": bleu.score, "chrf": sacrebleu.corpus_chrf(written, [firsts]).score}


def prompt_of(model: Any, tokenizer: Tokenizer, add_bos: bool = True) -> Any:
    """A function of a source that gives the ids which a model reads: of a decoder alone, through its chat template
    where it has one, else a line that a line end closes."""
    if model.conditioned:
        return tokenizer.encode
    if tokenizer.chat_template:
        frame = framed(tokenizer)
        return lambda text: tokenizer.encode_all([frame([{"role": "user", "content": text}])], special=True)[0]
    begin = [model.bos_id] * add_bos
    return lambda text: [*begin, *tokenizer.encode(f"{text}\n")]


def pair_rows(
    model: Any, tokenizer: Tokenizer, pairs: Sequence[own.TextPair], add_bos: bool
) -> tuple[list[Any], list[int] | None]:
    """What a loss reads of pairs: (source, target) ids; of a decoder alone rows, and how many ids of each are prompt.
    Pairs that a model has no room for are left out."""
    most = model.max_length
    if model.conditioned:
        sides = [tokenizer.encode_all([a for a, _ in pairs]), tokenizer.target.encode_all([b for _, b in pairs])]
        both = zip(*sides, strict=True)
        return [(a, b) for a, b in both if 0 < len(a) <= most and 0 < len(b) < most], None
    prompt, begin = prompt_of(model, tokenizer, add_bos), add_bos and not tokenizer.chat_template
    prompts = [prompt(source)[begin:] for source, _ in pairs]  # the frame begins a row
    joined = [(a, tokenizer.encode(b)) for a, (_, b) in zip(prompts, pairs, strict=True)]
    joined = [(a, b) for a, b in joined if a and b and len(a) + len(b) + begin <= most]
    return [a + b for a, b in joined], [len(a) for a, _ in joined]


def pair_batches(
    model: Any, tokenizer: Tokenizer, pairs: Sequence[own.TextPair], add_bos: bool, batch: int, seed: int | None = None
) -> Any:
    """Batches of pairs for ``model``: ``batch`` rows, or ids where it is a decoder alone. ValueError: none fits."""
    rows, prompts = pair_rows(model, tokenizer, pairs, add_bos)
    if not rows:
        raise ValueError(f"none of {len(pairs):,} pairs fits the model's {model.max_length:,} positions")
    begin = add_bos and not (prompts and tokenizer.chat_template)
    frame = own.frame_of(model, begin or model.conditioned)
    if prompts is None:
        return Batches(rows, batch, seed=seed, frame=frame)
    return PackedBatches(rows, max(batch, *(len(row) + 1 for row in rows)), seed=seed, frame=frame, prompts=prompts)


def text_batches(
    model: Any, tokenizer: Tokenizer, texts: Sequence[str], add_bos: bool, batch: int, seed: int | None = None
) -> PackedBatches:
    """Batches of texts for a decoder alone."""
    rows = [*filter(None, tokenizer.encode_all(texts))]
    longest = min(model.max_length, max(batch, 2)) - 1
    return PackedBatches(rows, max(batch, longest + 1), seed=seed, longest=longest, frame=own.frame_of(model, add_bos))


def pair_loss(model: Any, tokenizer: Tokenizer, pairs: Sequence[own.TextPair], add_bos: bool) -> dict[str, float]:
    """Loss in nats a token of the targets, and their number."""
    loss = sequence_loss if model.conditioned else language_loss
    size = BATCH if model.conditioned else LONGEST
    nats = loop.evaluate(model, pair_batches(model, tokenizer, pairs, add_bos, size), loss)
    return {"rows": len(pairs), "loss": nats, "perplexity": metrics.perplexity(nats)}


def text_loss(model: Any, tokenizer: Tokenizer, texts: Sequence[str], add_bos: bool) -> dict[str, float]:
    """Loss in nats a token, and what it is by character."""
    batches = text_batches(model, tokenizer, texts, add_bos, LONGEST)
    nats = loop.evaluate(model, batches, language_loss)
    each = sum(map(len, texts)) / len(batches.ids)
    bits = nats / math.log(2) / each
    scores = {"rows": len(texts), "loss": nats, "perplexity": metrics.perplexity(nats)}
    return scores | {"characters_per_token": each, "bits_per_character": bits}


def _labels(model: Any, tokenizer: Tokenizer, path: Path, how: dict[str, Any]) -> dict[str, float]:
    found = read_labelled(path, names=model.classes or None, **how)
    longest = model.backbone.config.max_length
    guesses: list[int] = []
    for first in range(0, len(found), BATCH):
        texts = found.texts[first : first + BATCH]
        rows = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_all(texts, longest - 1)]
        with torch.no_grad():
            guesses += model(pad(rows, tokenizer.pad_id).to(next(model.parameters()).device)).argmax(1).tolist()
    scores = metrics.classification(found.labels, guesses, found.names)
    return {"rows": len(found), "accuracy": 100 * scores["accuracy"], "macro_f1": 100 * scores["macro"]["f1"]}


def _is_pairs(path: Path, encoding: str) -> bool:
    """Whether each line that is not blank has one tab."""
    lines = [x for x in lines_of(path.read_bytes(), path, encoding, True) if isinstance(x, str) and x.strip()]
    return bool(lines) and all(line.count("\t") == 1 for line in lines)
