"""generate: greedy decoding of a batch, with or without a cache."""

import torch
from torch import Tensor

from tileformer.decoder.cache import KVCache
from tileformer.decoder.seq2seq import Seq2Seq

# On an accelerator, asking whether all rows have ended waits for it; a few steps too many cost less.
_STEPS_BETWEEN_CHECKS = 8


@torch.no_grad()
def generate(model: Seq2Seq, src: Tensor, max_length: int | None = None, use_cache: bool = True) -> Tensor:
    """The most probable next token, step by step, for each row of ``src`` (B, T_s) int64.

    Returns int64 (B, T), T <= ``max_length`` (default: the model's): the tokens after ``bos_id``, each row up to and
    with its ``eos_id`` if it came to one, then ``pad_id``, which is never chosen as a token. ``use_cache=False``
    computes everything again at each step: the same tokens, for comparison.

    Raises ValueError when the model is in training mode (dropout would be sampled) or ``max_length`` is beyond it.
    """
    config = model.config
    steps = config.max_length if max_length is None else max_length
    if model.training:
        raise ValueError("the model is in training mode, where dropout is random: call model.eval() first")
    if not 1 <= steps <= config.max_length:
        raise ValueError(f"max_length must be between 1 and the model's {config.max_length}, got {max_length}")
    memory, src_padding = model.encode(src)
    tokens = src.new_full((src.shape[0], steps + 1), config.pad_id)
    tokens[:, 0] = config.bos_id
    ended = torch.zeros(src.shape[0], dtype=torch.bool, device=src.device)
    cache = KVCache(config.num_decoder_layers, steps) if use_cache else None
    for step in range(steps):
        seen = tokens[:, step : step + 1] if use_cache else tokens[:, : step + 1]
        logits = model.decode(seen, memory, src_padding, cache)[:, -1]
        logits[:, config.pad_id] = float("-inf")
        chosen = logits.argmax(dim=-1).masked_fill(ended, config.pad_id)
        tokens[:, step + 1] = chosen
        ended = ended | (chosen == config.eos_id)
        check = src.device.type == "cpu" or step % _STEPS_BETWEEN_CHECKS == _STEPS_BETWEEN_CHECKS - 1
        if check and bool(ended.all()):
            break
    # One last look: the steps that ran after the last row had ended left only padding.
    longest = int((tokens[:, 1:] != config.pad_id).sum(dim=1).max()) if src.shape[0] else 0
    return tokens[:, 1 : longest + 1]
