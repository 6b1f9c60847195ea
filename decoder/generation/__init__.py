"""generate and stream: the next tokens of a batch, by any model that is `Decodable`, ours or yours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import torch
from torch import Tensor

from tileformer.decoder.generation.sampling import Sampler
from tileformer.decoder.generation.search import DecodeBatch, beam_search, decode_loop
from tileformer.decoder.generation.state import Decodable, DecodeState, JoinedState

__all__ = ["Decodable", "DecodeState", "JoinedState", "generate", "stream"]


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
        n_best: return the best n of the beams, with their scores.

    Returns int64 (B, T): the tokens after the row's own, each row up to and with its ``eos_id`` if
    it came to one, then ``pad_id``, which is never chosen as a token. With ``n_best``: (B, n, T) and the scores (B, n)
    float32, -inf where a row has no further continuation.

    Raises ValueError when the model is in training mode (dropout would be sampled), or for an option or length that
    makes no sense; TypeError for a model that is not `Decodable`.

        model = DecoderLM(DecoderLMConfig(vocab=100)).eval()
        generate(model, torch.tensor([[1, 7, 9], [1, 5, 0]]), 10, temperature=0.8, top_k=40)

    Example:
        >>> from tileformer.decoder import DecoderLM, DecoderLMConfig
        >>> model = DecoderLM(DecoderLMConfig(vocab=20, d_model=32, nhead=4)).eval()
        >>> generate(model, torch.tensor([[1, 3, 4]]), max_length=5, temperature=0.8, top_k=5).shape[0]
        1
    """
    sampler = Sampler(temperature, top_k, top_p, generator)
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    beams = num_beams > 1 or n_best is not None
    if beams and sampler.samples:
        raise ValueError(f"beams are searched, not sampled: pass temperature={temperature} or num_beams, not both")
    if n_best is not None and not 1 <= n_best <= num_beams:
        raise ValueError(f"n_best must be between 1 and num_beams {num_beams}, got {n_best}")
    if length_penalty < 0:
        raise ValueError(f"length_penalty must be at least 0, got {length_penalty}")
    batch = DecodeBatch(model, src, max_length, use_cache)
    if not beams:
        return batch.trimmed(torch.stack(list(decode_loop(batch, sampler)), dim=1))
    tokens, scores = beam_search(batch, num_beams, length_penalty)
    tokens = batch.trimmed(tokens[:, : n_best or 1])
    return (tokens, scores[:, :n_best]) if n_best else tokens[:, 0]


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
) -> Iterator[Tensor]:
    """The tokens of `generate`, one step (B,) at a time as they are chosen; ``pad_id`` for a row that has ended.

    Raises as `generate`, here and not at the first step.

        for tokens in stream(model, prompts): ...
    """
    sampler = Sampler(temperature, top_k, top_p, generator)
    return decode_loop(DecodeBatch(model, src, max_length, use_cache), sampler, every=1)
