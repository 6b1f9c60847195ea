"""Generation: 128 new tokens of a batch by `generate`, beside transformers, torch.nn without a cache, and CTranslate2.

Models of the same shape with random weights, float32, an end that never comes; seconds of the processor, not of the
clock. Rounds alternate, so a machine that slows down slows all; a figure is the least of the rounds. torch.nn reads
everything again for each token: timed at five lengths, and integrated. CTranslate2 runs our weights, transformers a
BART of its own, with the cache that grows: its static one took 8 to 19 % longer in six of these jobs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tileformer import arguments
from tileformer.bench.tables import Column, Growing, as_json, head, line
from tileformer.decoder import Seq2Seq, Seq2SeqConfig, generate, revert, to_ctranslate2
from tileformer.extras import optional_import

OURS, NEW_TOKENS, QUICK_TOKENS = "tileformer", 128, 8
NOT_QUICK = "base batch 64 5 beams"
MODELS = {  # a configuration, and the length of the longest source
    "g2p": (Seq2SeqConfig(32, 75, 128, 4, 3, 3, 512, max_length=NEW_TOKENS), 12),
    "base": (Seq2SeqConfig(8000, 8000, 512, 8, 6, 6, 2048, max_length=NEW_TOKENS), 32),
}
# How many times our seconds a peer should take, where more than its own are asked: row, peer, at least, aim.
GOALS = (
    ("g2p batch 1 greedy", "transformers", 2.8, 3.2),
    ("g2p batch 64 greedy", "transformers", 1.1, 1.3),
    ("base batch (1|16) greedy", "transformers", 1.2, 1.5),
    ("base batch 64 greedy", "transformers", 1.0, 1.1),
    ("batch (16|64) 5 beams", "transformers", 1.5, 1.8),
    ("g2p batch 1 greedy", "torch.nn", 4.5, 6.0),
    ("base batch 1 greedy", "torch.nn", 4.0, 5.0),
    ("batch 64 greedy", "torch.nn", 20.0, None),
    ("base .* greedy", "CTranslate2", 0.65, 0.75),
    ("batch (16|64) 5 beams", "CTranslate2", 0.8, 1.0),
    ("", "transformers|torch.nn", 1.0, None),
)
TABLE = [
    Column("job", "job", "<21"),
    Column("by", "provider", "<12"),
    Column("CPU s", "seconds", ">9.3f"),
    Column("tokens/s", "rate", ">9.1f"),
    Column("/ ours", "over_ours", ">7.2f"),
    Column("must", "must", ">5.2f"),
    Column("aim", "aim", ">5.2f"),
]


class Job(NamedTuple):
    """One batch to go on from: token ids (B, T_s), padded with 0 behind; beams; new tokens of a row."""

    name: str
    source: Tensor
    beams: int
    tokens: int


Provider = Callable[[Job], float]  # the seconds that it takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer bench generate`."""
    add = parser.add_argument
    add("--threads", type=arguments.THREADS, default=1, metavar="N", help="of each of them (default: 1)")
    add("--rounds", type=arguments.COUNT, default=3, metavar="N", help="rounds whose least is printed (default: 3)")
    add("--json", type=arguments.output_file, metavar="FILE", help="also write every figure to FILE")
    add("--quick", action="store_true", help=f"one round of {QUICK_TOKENS} tokens, in a minute: all but {NOT_QUICK}")
    about = "only jobs whose name this regular expression finds, such as 'g2p batch 1 '"
    add("--only", type=arguments.name, metavar="PATTERN", help=about)


def main(args: argparse.Namespace) -> int:
    """Print a row for each job and provider; 0."""
    tokens, rounds = (QUICK_TOKENS, 1) if args.quick else (NEW_TOKENS, args.rounds)
    wanted = chosen(args.only, tokens, args.quick)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    figures = dict(threads=args.threads, rounds=rounds, tokens=tokens, torch=torch.__version__, rows=rows)
    try:
        with Growing(args.json, lambda: as_json(figures)) as file:
            said = f"{tokens} new tokens, float32, threads {args.threads}, rounds {rounds}"
            short = f"; quick: the ratios of so few tokens are not those of {NEW_TOKENS}; without {NOT_QUICK}"
            print(said + short * args.quick)
            for name, jobs in wanted.items():
                by = providers(MODELS[name][0])
                print(head(TABLE))
                for job in jobs:
                    found = measured(by, job, rounds)
                    rows += found
                    print("\n".join(line(TABLE, row) for row in found), flush=True)
                    file.write()
    finally:
        torch.set_num_threads(before)
    return 0


def chosen(pattern: str | None, tokens: int, quick: bool = False) -> dict[str, list[Job]]:
    """The jobs of each model whose name the pattern finds; ValueError if it finds none."""
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"--only {pattern!r} is no regular expression: {error}") from None
    jobs: dict[str, list[Job]] = {}
    names = []
    for (model, (config, longest)), size, beams in itertools.product(MODELS.items(), (1, 16, 64), (1, 5)):
        name = f"{model} batch {size} " + ("greedy" if beams == 1 else f"{beams} beams")
        if quick and name == NOT_QUICK:
            continue
        names.append(name)
        if wanted.search(name):
            source = _source(size, longest, config.src_vocab)
            jobs.setdefault(model, []).append(Job(name, source, beams, tokens))
    if not jobs:
        raise ValueError(f"--only {pattern!r} finds none of: {', '.join(names)}")
    return jobs


def measured(by: dict[str, Provider], job: Job, rounds: int) -> list[dict[str, Any]]:
    """A row for each provider, ours first."""
    for provider in by.values():
        provider(job._replace(tokens=2))  # what a first call makes, and keeps
    taken: dict[str, list[float]] = {name: [] for name in by}
    for _ in range(rounds):
        for name, provider in by.items():
            gc.collect()
            taken[name].append(provider(job))
    rows: list[dict[str, Any]] = []
    for name, seconds in taken.items():
        least, made, (must, aim) = min(seconds), len(job.source) * job.tokens, goal(job.name, name)
        ratio = None if name == OURS else least / min(taken[OURS])
        figures = dict(seconds=least, rate=made / least, over_ours=ratio, must=must, aim=aim, rounds=seconds)
        rows.append(dict(job=job.name, provider=name, **figures))
    return rows


def goal(job: str, provider: str) -> tuple[float | None, float | None]:
    """At least how many of our seconds a provider should take for a job, and the aim; None where none is set."""
    for name, peer, must, aim in GOALS:
        if re.search(name, job) and re.match(peer, provider):
            return must, aim
    return None, None


def providers(config: Seq2SeqConfig) -> dict[str, Provider]:
    """Who generates, ours first; those that are not installed are named, and left out."""
    torch.manual_seed(0)
    model = Seq2Seq(config).eval().requires_grad_(False)
    _never_end(model)
    by: dict[str, Provider] = {OURS: _timed(lambda job: generate(model, job.source, job.tokens, num_beams=job.beams))}
    for build in (_transformers, _recomputing, _ctranslate2):
        try:
            by |= build(model)
        except ValueError as error:
            print(f"skipped: {error}")
    return by


def _source(size: int, longest: int, vocabulary: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(longest // 2, longest + 1, (size, 1), generator=draw)
    lengths[0] = longest
    tokens = torch.randint(3, vocabulary, (size, longest), generator=draw)
    return tokens.masked_fill(torch.arange(longest) >= lengths, 0)


def _never_end(model: Seq2Seq) -> None:
    """Give the end of a row the logit -100 in every step: the last norm's first output is 1, which it reads alone."""
    norm, words = model.transformer.decoder.norm, model.tgt_embedding.weight
    norm.weight[0], norm.bias[0] = 0.0, 1.0
    words[model.eos_id] = 0.0
    words[model.eos_id, 0] = -100.0


def _timed(run: Callable[[Job], Any]) -> Provider:
    """Seconds of a run that gives the new tokens of each row; RuntimeError where they are not all there."""

    def seconds(job: Job) -> float:
        start = time.process_time()
        rows = run(job)
        taken = time.process_time() - start
        if len(rows) != len(job.source) or any(len(row) != job.tokens for row in rows):
            raise RuntimeError(f"{job.name}: {[len(row) for row in rows]} tokens were made, not {job.tokens} a row")
        return taken

    return seconds


def _transformers(model: Seq2Seq) -> dict[str, Provider]:
    library, c = optional_import("transformers"), model.config
    layers = dict(encoder_layers=c.num_encoder_layers, decoder_layers=c.num_decoder_layers)
    widths = dict(encoder_ffn_dim=c.dim_feedforward, decoder_ffn_dim=c.dim_feedforward, d_model=c.d_model)
    heads = dict(encoder_attention_heads=c.nhead, decoder_attention_heads=c.nhead)
    ids = dict(pad_token_id=c.pad_id, bos_token_id=c.bos_id, decoder_start_token_id=c.bos_id, eos_token_id=None)
    config = library.BartConfig(
        vocab_size=max(c.src_vocab, c.tgt_vocab), max_position_embeddings=2 * c.max_length, scale_embedding=True,
        forced_eos_token_id=None, **layers, **widths, **heads, **ids,
    )  # fmt: skip
    bart = library.BartForConditionalGeneration(config).eval()

    def run(job: Job) -> Tensor:
        mask = (job.source != c.pad_id).long()
        settings = library.GenerationConfig(max_new_tokens=job.tokens, num_beams=job.beams, do_sample=False, **ids)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bart.generate(job.source, attention_mask=mask, generation_config=settings)[:, 1:]

    return {"transformers": _timed(run)}


def _recomputing(model: Seq2Seq) -> dict[str, Provider]:
    """torch.nn's layers with our weights: the logits of the last token of each row, whose length grows."""
    ours = copy.deepcopy(model)
    revert(ours)

    def seconds(job: Job) -> float:
        lengths = sorted({round(1 + (job.tokens - 1) * part / 4) for part in range(5)})
        decoder = ours.transformer.decoder
        with torch.no_grad():
            start = time.process_time()
            memory, padding = (x.repeat_interleave(job.beams, 0) for x in ours.encode(job.source))
            encoding, taken = time.process_time() - start, []
            for length in lengths:
                start = time.process_time()
                words = ours.tgt_embedding(torch.full((len(memory), length), ours.bos_id))
                x = (words + ours.tgt_position.weight[:length]) * ours.config.d_model**0.5
                causal = torch.ones(length, length, dtype=torch.bool).triu(1)
                x = decoder(x, memory, tgt_mask=causal, memory_key_padding_mask=padding, tgt_is_causal=True)
                F.linear(x[:, -1], ours.tgt_embedding.weight).log_softmax(-1).topk(job.beams)
                taken.append(time.process_time() - start)
        return encoding + float(np.interp(np.arange(1, job.tokens + 1), lengths, taken).sum())

    return {"torch.nn": seconds}


def _ctranslate2(model: Seq2Seq) -> dict[str, Provider]:
    library, c = optional_import("ctranslate2"), model.config
    with tempfile.TemporaryDirectory() as folder:
        to_ctranslate2(model, folder)
        translator = library.Translator(folder, intra_threads=torch.get_num_threads(), inter_threads=1)

    def run(job: Job) -> list[list[str]]:
        texts = [[str(token) for token in row if token != c.pad_id] for row in job.source.tolist()]
        options = dict(beam_size=job.beams, max_decoding_length=job.tokens, disable_unk=True)
        return [found.hypotheses[0] for found in translator.translate_batch(texts, **options)]

    return {"CTranslate2": _timed(run)}
