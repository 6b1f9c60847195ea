"""incremental: stacks of torch.nn's layers decode by a cache as they do without one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tileformer.decoder import Engine, convert, generate
from tileformer.decoder.generation.incremental import incremental

pytestmark = [  # of torch's own encoder
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
C, V, T = 16, 13, 24
SOURCES = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
PROMPTS = torch.tensor([[1, 3, 4, 5], [1, 6, 0, 0], [0, 0, 1, 4]])


class Model(nn.Module):
    """A user's: sinusoidal positions, weights of its own for the output, layers of torch.nn."""

    def __init__(self, attends, **options):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out, self.attends = nn.Embedding(V, C), nn.Linear(C, V), attends
        self.first = options.get("batch_first", False)
        if attends:
            self.stack = nn.Transformer(C, 2, 1, 2, 32, **options)
        else:
            self.stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 2, 32, **options), 2, nn.LayerNorm(C))
        self.double().eval().requires_grad_(False)

    def embed(self, tokens, positions):
        waves = positions[..., None] * torch.logspace(0, -2, C, dtype=torch.float64)
        return self.words(tokens) + waves.sin()

    def lay_out(self, x):
        return x if self.first else x.transpose(0, 1)

    def encode(self, source):
        x = self.lay_out(self.embed(source, torch.arange(source.shape[1])))
        return self.lay_out(self.stack.encoder(x, src_key_padding_mask=source == 0)), source == 0

    def forward(self, tokens, source=None):
        n = tokens.shape[1]
        x = self.lay_out(self.embed(tokens, torch.arange(n)))
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        if self.attends:
            memory, padding = self.encode(source)
            x = self.stack.decoder(x, self.lay_out(memory), tgt_mask=mask, memory_key_padding_mask=padding)
        else:
            x = self.stack(x, mask)
        return self.out(self.lay_out(x))

    def incremental(self, **options):
        decoder = self.stack.decoder if self.attends else self.stack
        encode = self.encode if self.attends else None
        options = dict(eos_id=2, pad_id=0, max_length=T, encode=encode) | options
        return incremental(decoder, self.embed, self.out, **options)


OPTIONS = [{"batch_first": True}, {"norm_first": True, "activation": F.silu}, {"bias": False, "batch_first": True}]


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: " ".join(x))
def test_it_decodes_as_the_whole_model(options, attends, converted):
    m = Model(attends, **options)
    if converted:
        convert(m)
    tokens = generate(m.incremental(), SOURCES if attends else PROMPTS, 12)
    for i, row in enumerate(tokens):
        real = PROMPTS[i][PROMPTS[i] != 0]
        read = torch.cat([torch.tensor([1]) if attends else real, row])[None]
        logits = m(read, SOURCES[i : i + 1] if attends else None)[0, -len(row) - 1 : -1]
        logits[:, 0] = -torch.inf
        best = logits.argmax(-1)
        ended = int((row == 2).int().argmax()) + 1 if 2 in row else len(row)
        assert torch.equal(row[:ended], best[:ended])
    assert generate(m.incremental(), SOURCES if attends else PROMPTS, 12, num_beams=3).shape[0] == len(tokens)


@pytest.mark.parametrize("attends", [True, False])
def test_the_engine_keeps_its_rows_in_pages(attends):
    m = Model(attends, batch_first=True)
    rows = [row[row != 0] for row in (SOURCES if attends else PROMPTS)]
    engine, found = Engine(m.incremental(), slots=2, pages=4), {}
    for row in rows:
        engine.add(row, max_length=12)
    for event in engine.run():
        found.setdefault(event.id, []).append(event.token)
    for number, row in enumerate(rows, 1):
        assert found[number] == generate(m.incremental(), row[None], 12)[0].tolist()


def test_weights_that_change_are_seen_and_hooks_refused():
    m = Model(False, batch_first=True, norm_first=True)
    decodable = m.incremental()
    before = generate(decodable, PROMPTS, 9)
    m.stack.layers[0].linear2.weight.data.mul_(-20.0)
    after = generate(decodable, PROMPTS, 9)
    assert before.shape != after.shape or not torch.equal(before, after)
    assert torch.equal(after, generate(m.incremental(), PROMPTS, 9))
    m.stack.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="TransformerEncoderLayer has a hook"):
        generate(decodable, PROMPTS, 9)


def test_what_it_cannot_serve_is_refused_in_one_line():
    m = Model(True, batch_first=True)
    with pytest.raises(TypeError, match=r"takes an nn.TransformerDecoder .* got torch.nn.modules.linear.Linear"):
        incremental(m.out, m.embed, m.out, eos_id=2, pad_id=0, max_length=T)
    with pytest.raises(ValueError, match="TransformerDecoder attends to a memory: pass encode"):
        m.incremental(encode=None)
    with pytest.raises(ValueError, match=r"encode must give a memory \(2, T, 16\), the batch first, got \(4, 2, 16\)"):
        generate(m.incremental(encode=lambda s: (m.encode(s)[0].transpose(0, 1), None)), SOURCES, 5)
    with pytest.raises(ValueError, match="the model's 24, got 30"):
        m.incremental().start(torch.ones(2, 1, dtype=torch.int64), capacity=30, source=SOURCES)
    with pytest.raises(TypeError, match="this decoder takes no cache: use_cache=False"):
        generate(m.incremental(), SOURCES, 5, use_cache=False)
    m.stack.decoder.layers[0].multihead_attn.add_zero_attn = True
    with pytest.raises(TypeError, match="adds keys of its own"):
        generate(m.incremental(), SOURCES, 5)
