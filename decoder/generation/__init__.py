"""generate and stream: the next tokens of a batch, by any model that is `Decodable`, ours or yours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, overload

import torch
from torch import Tensor

from tileformer.decoder.generation.options import Beams, Constraints, Options, Sampling
from tileformer.decoder.generation.search import DecodeBatch, beam_search, checked, decode_loop
from tileformer.decoder.generation.state import Decodable, DecodeState, JoinedState

__all__ = [
    "Beams",
    "Constraints",
    "Decodable",
    "DecodeState",
    "JoinedState",
    "Options",
    "Sampling",
    "generate",
    "stream",
]


@overload
def generate(
    model: Decodable, src: Tensor, max_length: int | None = None, use_cache: bool = True, *, options: Options
) -> Any: ...


@overload
def generate(
    model: Decodable,
    src: Tensor,
    max_length: int | None = None,
    use_cache: bool = True,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    n_best: None = None,
) -> Tensor: ...


@overload
def generate(
    model: Decodable,
    src: Tensor,
    max_length: int | None = None,
    use_cache: bool = True,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    n_best: int,
) -> tuple[Tensor, Tensor]: ...


def generate(
    model: Decodable,
    src: Tensor,
    max_length: int | None = None,
    use_cache: bool = True,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    n_best: int | None = None,
    options: Options | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The next tokens of each row, step by step: the most probable one, unless sampling or beams are asked for.

    Args:
        model: a `Decodable`.
        src: int64 (B, T_s), padded with ``pad_id`` behind or before each row. A Seq2Seq's source; else the prompts,
            with ``bos_id`` where the model was trained with one, each at least one token long and of any lengths.
        max_length: new tokens of a row at most; default: what the model has room for behind each.
        use_cache: False computes everything again at each step, by our own models: the same tokens, for comparison.
        temperature: sample from the softmax of logits / temperature; None takes the most probable token.
        top_k, top_p: sample only among the k most probable tokens; and only among the fewest of these whose
            probabilities together reach p.
        generator: where the random numbers come from; a seeded one on the tokens' device makes a run repeatable.
        num_beams: beam search keeps that many rows for each of ``src``, best sum of log-probabilities / length **
            ``length_penalty`` first. Rows that ended stay and compete; the greedy row is never dropped, so that the
            best one scores no lower than it.
        n_best: return the best n of the beams, or n samples of each row, with their scores.
        options: all of these and more, in place of them: penalties, bans, stop strings, seeds, groups of beams, a
            function of yours (see `Options`).

    Returns int64 (B, T): the tokens after the row's own, each row up to and with its ``eos_id`` if
    it came to one, then ``pad_id``, which is never chosen as a token. With ``n_best``: (B, n, T) and the scores (B, n)
    float32, -inf where a row has no further continuation.

    On the CPU rows that have ended leave the batch (`DecodeState.select`), which changes no result.

    Raises ValueError when the model is in training mode (dropout would be sampled), or for an option or length that
    makes no sense; TypeError for a model that is not `Decodable`; FloatingPointError where its logits are NaN.

        model = DecoderLM(DecoderLMConfig(vocab=100)).eval()
        generate(model, torch.tensor([[1, 7, 9], [1, 5, 0]]), 10, temperature=0.8, top_k=40)

    Example:
        >>> from tileformer.decoder import DecoderLM, DecoderLMConfig
        >>> model = DecoderLM(DecoderLMConfig(vocab=20, d_model=32, nhead=4)).eval()
        >>> generate(model, torch.tensor([[1, 3, 4]]), max_length=5, temperature=0.8, top_k=5).shape[0]
        1
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    given |= {"num_beams": num_beams, "length_penalty": length_penalty, "num_return_sequences": n_best}
    options = _options(options, given)
    batch = DecodeBatch(model, src, max_length, use_cache, options)
    n = options.num_return_sequences
    if options.searches:
        tokens, scores = beam_search(batch)
        tokens, scores = batch.complete(tokens[:, : n or 1]), scores[:, :n]
        return (tokens, scores) if n else tokens[:, 0]
    columns, logp = zip(*decode_loop(batch, n or 1, scored=n is not None), strict=True)
    tokens = torch.stack(columns, dim=1)
    if n is None:
        return batch.complete(tokens)
    lengths = (tokens != model.pad_id).sum(1).clamp(min=1)
    scores = torch.stack(logp).sum(0) / lengths**options.length_penalty
    return batch.complete(tokens.view(len(src), n, -1)), scores.view(len(src), n)


def stream(
    model: Decodable,
    src: Tensor,
    max_length: int | None = None,
    use_cache: bool = True,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    options: Options | None = None,
) -> Iterator[Tensor]:
    """The tokens of `generate`, one step (B,) at a time as they are chosen; ``pad_id`` for a row that has ended.

    Raises as `generate`, here and not at the first step.

        for tokens in stream(model, prompts): ...
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    options = _options(options, given)
    if options.searches or options.num_return_sequences is not None:
        raise ValueError("a stream gives one row for each, as it is chosen: no num_beams, no num_return_sequences")
    return _streamed(DecodeBatch(model, src, max_length, use_cache, options))


def _streamed(batch: DecodeBatch) -> Iterator[Tensor]:
    for token in batch.prefix:
        yield token.expand(len(batch.tokens))
    for tokens, _ in decode_loop(batch, every=1):
        yield tokens


def _options(options: Options | None, given: dict[str, Any]) -> Options:
    """``options``, or those that were given by their names. ValueError for both."""
    if options is None:
        return Options(**given)
    options = checked(options)
    defaults = {field.name: field.default for field in fields(Options)}
    if both := [name for name, value in given.items() if value != defaults[name]]:
        raise ValueError(f"options say how to decode: put {', '.join(both)} into them, not beside them")
    return options
