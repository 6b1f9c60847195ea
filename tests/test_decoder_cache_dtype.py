"""Keys and values in 8 bits: what is decoded from them, how much they hold, and who has none."""

from typing import Any

import pytest
import torch

from tileformer.decoder import DecoderLM, DecoderLMConfig, Engine, Seq2Seq, Seq2SeqConfig, generate
from tileformer.decoder.generation import device
from tileformer.decoder.generation.options import Options
from tileformer.kernels import append_kv_cache, decode_attention
from tileformer.kernels.backend import use_backend


def lm() -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(DecoderLMConfig(vocab=40, d_model=40, nhead=2, max_length=80)).eval()


def prompts() -> torch.Tensor:
    tokens = torch.randint(3, 40, (3, 20), generator=torch.Generator().manual_seed(1))
    tokens[1, 7:] = 0
    return tokens


def test_a_step_reads_what_was_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits as from keys and values in float32 that were rounded in the same way."""
    model, tokens = lm(), prompts()

    def rounded(k: Any, v: Any, keys: Any, values: Any, lengths: Any, **options: Any) -> None:
        stored = []
        for x in (k, v):
            unit = x.abs().amax(-1, keepdim=True) / 127
            stored.append(torch.round(x / unit) * unit)
        append_kv_cache(stored[0], stored[1], keys, values, lengths, **options)

    def logits(dtype: torch.dtype | None) -> torch.Tensor:
        model.cache_dtype = dtype
        first, state = model.start(tokens, capacity=40)
        assert isinstance(state, device.DeviceCache)
        return torch.stack([first, *(model.step(next_, state) for next_ in tokens[:, :6].t().clamp(min=3))])

    with torch.no_grad():
        eight = logits(torch.int8)
        monkeypatch.setattr(device, "append_kv_cache", rounded)
        monkeypatch.setattr("tileformer.decoder.generation.step.choose", lambda *_: "interpret")  # a DeviceCache
        exact = logits(None)
    torch.testing.assert_close(eight, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(temperature=1.0, seed=7)])
def test_rows_decode_alike_alone_in_a_batch_and_in_pages(options: dict[str, Any]) -> None:
    model, tokens = lm(), prompts()
    model.cache_dtype = torch.int8
    seeds = (7, 8, 9) if "seed" in options else None
    together = generate(model, tokens, 8, options=Options(**options | (dict(seed=seeds) if seeds else {})))
    engine = Engine(model, slots=2, pages=12) if "num_beams" not in options else None
    for i, row in enumerate(tokens):
        own = Options(**options | (dict(seed=7 + i) if seeds else {}))
        alone = generate(model, row[None, row != 0], 8, options=own)[0].tolist()
        assert alone == together[i].tolist()[: len(alone)]
        if engine is not None:
            engine.add(row[row != 0], own, max_length=8)
    if engine is not None:
        said: dict[int, list[int]] = {}
        for event in engine.run():
            if event.token is not None:
                said.setdefault(event.id, []).append(event.token)
        assert engine.pool is not None and engine.pool.kv.dtype == torch.int8
        for i, row in enumerate(together.tolist()):
            assert said[i + 1] == row[: len(said[i + 1])]


def test_a_known_beginning_is_read_in_eight_bits() -> None:
    """A long prompt whose first pages another one has filled: gathered, and scaled."""
    model = lm()
    model.cache_dtype = torch.int8
    prompt = torch.randint(3, 40, (50,), generator=torch.Generator().manual_seed(2)).tolist()
    engine, texts = Engine(model, slots=1, pages=12), []
    for text in (prompt, prompt[:32] + prompt[:17]):
        number = engine.add(text, max_length=4)
        texts.append([event.token for event in engine.run() if event.id == number and event.token is not None])
    other = Engine(model, slots=1, pages=12)
    other.add(prompt[:32] + prompt[:17], max_length=4)
    assert texts[1] == [event.token for event in other.run() if event.token is not None]


def test_what_a_cache_in_eight_bits_holds() -> None:
    model = Seq2Seq(Seq2SeqConfig(src_vocab=20, tgt_vocab=20, d_model=128, nhead=2)).eval()
    model.cache_dtype = torch.int8
    with torch.no_grad():
        _, state = model.start(torch.ones(2, 1, dtype=torch.int64), source=torch.full((2, 5), 4), capacity=30)
    assert state.kv.dtype == torch.int8 and state.kv.shape[-1] == 64 + 16  # beside 256 bytes in float32
    assert state.source.dtype == torch.float32


def test_what_has_no_cache_in_eight_bits_says_so() -> None:
    model, tokens = lm(), prompts()
    model.cache_dtype = torch.float16
    with pytest.raises(ValueError, match=r"cache_dtype is torch\.float16: set torch\.int8"):
        generate(model, tokens, 4)
    model.cache_dtype = torch.int8
    hook = model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="the model has a hook"):
        generate(model, tokens, 4)
    with pytest.raises(ValueError, match="the model has a hook: change that, or set cache_dtype = None"):
        Engine(model, slots=1)
    hook.remove()
    assert generate(model, tokens, 4).shape[0] == 3


@pytest.mark.interprets
def test_what_is_read_is_within_the_stated_error() -> None:
    """Half of a step, |x|'s largest / 254, for each number; for an output no more than that of the values, where all
    keys are alike."""
    k, v = torch.randn(1, 2, 20, 24), torch.randn(1, 2, 20, 24)
    k[:] = k[:, :, :1]
    lengths = torch.tensor([20], dtype=torch.int32)
    caches = [torch.zeros(1, 2, 20, 24, dtype=torch.int8) for _ in "kv"]
    scales = dict(k_scale=torch.zeros(1, 2, 20), v_scale=torch.zeros(1, 2, 20))
    with use_backend("interpret"):
        append_kv_cache(k, v, caches[0], caches[1], lengths, **scales)
        out = decode_attention(k[:, :, :1], caches[0], caches[1], lengths, causal=False, **scales)
    error = (caches[1] * scales["v_scale"][..., None] - v).abs().amax(-1)
    most = v.abs().amax(-1) / 254
    assert (error <= most * 1.0001).all()
    assert ((out[:, :, 0] - v.mean(2)).abs() <= most.amax(2)[..., None]).all()
