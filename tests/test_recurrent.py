"""Recurrent decoders: stepwise as at once, alone as in a batch, padding never read, engine, beams, folders."""

import itertools

import pytest
import torch
from torch import nn

from tileformer.decoder import (
    Engine,
    Options,
    RecurrentConfig,
    RecurrentLM,
    RecurrentSeq2Seq,
    generate,
    generate_speculatively,
)
from tileformer.decoder.generation import hidden_state
from tileformer.decoder.recurrent import CELLS, SSRU
from tileformer.kernels import use_backend
from tileformer.training.data.batches import Batches, PackedBatches
from tileformer.training.losses import language_loss, sequence_loss

FORMS = [*itertools.product(CELLS, (False, True))]
SRC = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 3, 0, 0], [4, 0, 0, 0, 0], [5, 5, 5, 5, 0]])


def seq2seq(cell, attends, **options):
    torch.manual_seed(2)
    options = dict(vocab=30, src_vocab=20, num_encoder_layers=2, d_model=16, nhead=2, max_length=20) | options
    model = RecurrentSeq2Seq(RecurrentConfig(cell=cell, attention=attends, **options)).double().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(4)  # some rows end
    return model


def language(cell):
    torch.manual_seed(2)
    return RecurrentLM(RecurrentConfig(30, cell=cell, d_model=16, max_length=20)).double().eval()


@pytest.mark.parametrize(("cell", "attends"), FORMS)
def test_a_step_gives_what_the_whole_target_gives(cell, attends):
    model = seq2seq(cell, attends)
    tgt = torch.randint(3, 30, (4, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(SRC, tgt)
        logits, state = model.start(tgt[:, :1], capacity=7, source=SRC)
        steps = [logits, *(model.step(tgt[:, t], state) for t in range(1, 5)), *model.step(tgt[:, 5:], state).unbind(1)]
    assert torch.stack(steps, 1).allclose(whole, atol=1e-12)
    assert state.lengths.tolist() == [7] * 4 and state.lengths.dtype == torch.int32


@pytest.mark.parametrize(("cell", "attends"), FORMS)
def test_a_row_is_decoded_alone_as_in_any_batch(cell, attends):
    model = seq2seq(cell, attends)
    together = [[t for t in row if t] for row in generate(model, SRC, 9).tolist()]
    alone = [generate(model, row[row != 0][None], 9)[0].tolist() for row in SRC]
    assert together == alone and len({len(row) for row in alone} | {0}) > 1
    before = torch.stack([row.roll(int((row == 0).sum())) for row in SRC])
    assert generate(model, before, 9).tolist() == generate(model, SRC, 9).tolist()
    engine = Engine(model, slots=2)
    ids = [engine.add(row[row != 0], max_length=9) for row in SRC]
    said = {i: [] for i in ids}
    for event in engine.run():
        said[event.id] += [event.token] * (event.token is not None)
    assert [*said.values()] == alone
    beams, scores = generate(model, SRC, 9, num_beams=3, n_best=2)
    best = generate(model, SRC[1:2, :3], 9, num_beams=3)[0].tolist()
    assert [t for t in beams[1, 0].tolist() if t] == best
    greedy = generate(model, SRC, 9, n_best=1)[1][:, 0]
    assert (scores[:, 0] >= greedy - 1e-6).all()


@pytest.mark.parametrize("cell", CELLS)
def test_documents_and_prompts_of_any_lengths(cell):
    model = language(cell)
    rows = torch.tensor([[1, 4, 5, 6], [1, 7, 0, 0], [1, 3, 9, 0]])
    with torch.no_grad():
        padded = model(rows)
        packed = model(torch.tensor([[1, 4, 5, 6, 1, 7, 1, 3, 9]]), cu_seqlens=torch.tensor([0, 4, 6, 9]))[0]
    assert torch.cat([padded[0], padded[1, :2], padded[2, :3]]).equal(packed)
    together = generate(model, rows, 5).tolist()
    assert [[t for t in row if t] for row in together] == [
        generate(model, r[r != 0][None], 5)[0].tolist() for r in rows
    ]


@pytest.mark.parametrize(("cell", "attends"), FORMS)
def test_padding_is_never_read_and_an_empty_source_is_zeros(cell, attends):
    model = seq2seq(cell, attends)
    tgt = torch.tensor([[1, 4], [1, 5]])
    with torch.no_grad():
        model.src_embedding.weight[0] = torch.nan
        short = torch.tensor([[3, 4, 0, 0], [0, 0, 0, 0]])
        logits = model(short, tgt)
        assert logits[0].isfinite().all() and logits[0].allclose(model(short[:1, :2], tgt[:1])[0], atol=1e-12)
        memory, padding, end = model.encode(torch.tensor([[3, 0], [0, 0]]))
        assert end[1].eq(0).all() and padding.tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("training", [False, True])
def test_padding_of_a_source_is_left_out_wherever_it_stands(training):
    model, tgt = seq2seq("gru", True, dropout=0.0).train(training), torch.tensor([[1, 4]] * 3)
    with torch.no_grad():
        said = model(torch.tensor([[3, 4, 0, 0], [0, 0, 3, 4], [3, 0, 4, 0]]), tgt)
        assert said[0].equal(said[1]) and said[0].equal(said[2])


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_read_where_there_is_nothing(cell):
    model, none = seq2seq(cell, True), SRC[:, :0]
    with torch.no_grad():
        assert model(SRC, none).shape == (4, 0, 30) and model(SRC[:0], SRC[:0]).shape == (0, 5, 30)
        assert model(none, SRC).equal(model(torch.zeros_like(SRC), SRC))
    assert generate(model, SRC[:0]).shape == (0, 0)
    assert generate(model, none, 3).equal(generate(model, torch.zeros_like(SRC), 3))
    assert language(cell)(none).shape == (4, 0, 30)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_go_through_steps(cell):
    model, tgt = seq2seq(cell, True), torch.tensor([[1, 4, 6]] * 4)
    found = []
    for stepwise in (False, True):
        model.zero_grad()
        if stepwise:
            logits, state = model.start(tgt[:, :1], capacity=3, source=SRC)
            logits = torch.stack([logits, *(model.step(tgt[:, t], state) for t in (1, 2))], 1)
        else:
            logits = model(SRC, tgt)
        logits.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(a.allclose(b, atol=1e-9) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_a_released_row_reads_nothing():
    model = language("gru")
    _, state = model.start(torch.tensor([[1, 3], [1, 4]]), capacity=9)
    state.release(torch.tensor([1]))
    model.step(torch.tensor([5, 5]), state)
    assert state.lengths.tolist() == [3, 0]
    logits, other = model.start(torch.tensor([[1, 7, 8]]), capacity=9)
    state.insert(torch.tensor([1]), other)
    assert model.step(torch.tensor([6, 6]), state)[1:].allclose(model.step(torch.tensor([6]), other))
    assert state.lengths.tolist() == [4, 4]


@torch.no_grad()
def test_steps_stay_where_a_graph_was_captured(monkeypatch):
    """What a CUDA graph does, without one: it runs the step over the same tensors."""
    model, made = seq2seq("lstm", True), []

    class Replayed:
        def __init__(self, run, tokens, state, places):
            made.append(places)
            self.run, self.state, self.places = run, state, places

        def __call__(self, tokens):
            tensors = (self.state.hidden, self.state.lengths, self.state.live, *self.state.source)
            assert self.places == (len(tokens), *(x.data_ptr() for x in tensors))
            return self.run(tokens, self.state)

    options = [Options(num_beams=3, min_new_tokens=7), Options(min_new_tokens=7)]
    expected = [generate(model, SRC, 9, options=how) for how in options]
    monkeypatch.setattr(hidden_state, "CapturedStep", Replayed)
    start = model.start

    def capturing(*inputs, **options):
        logits, state = start(*inputs, **options)
        state.captures = True
        return logits, state

    monkeypatch.setattr(model, "start", capturing)
    found = [generate(model, SRC, 9, options=how) for how in options]
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    assert [places[0] for places in made] == [12, 4]  # beams stay where they are
    (_, state), (_, plain) = (
        begin(torch.ones_like(SRC[:, :1]), capacity=9, source=SRC) for begin in (capturing, start)
    )
    for step in range(6):
        if step == 3:
            state.select(rows := torch.tensor([3, 2, 1, 0]))
            plain.select(rows)
        assert model.step(tokens := torch.tensor([3, 4, 5, 6]), state).equal(model.step(tokens, plain))
    assert len(made) == 4  # and are captured anew where they have moved


def test_what_a_graph_would_not_repeat_is_not_captured():
    model = seq2seq("gru", True)
    assert not model._is_plain()  # gradients are recorded
    with torch.no_grad():
        assert model._is_plain() and not model.train()._is_plain()
        hook = model.eval().out.register_forward_hook(lambda *_: None)
        assert not model._is_plain()
        hook.remove()
        with torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else torch.autocast("cpu"):
            assert model._is_plain() is not torch.cuda.is_available()


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("cell", CELLS)
def test_captured_steps_say_what_plain_ones_do(cell):
    model = seq2seq(cell, True).float().cuda()
    captured = [generate(model, SRC.cuda(), 9, num_beams=k) for k in (1, 3)]
    model.step_captures = False
    assert all(a.equal(generate(model, SRC.cuda(), 9, num_beams=k)) for a, k in zip(captured, (1, 3), strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_every_weight_learns(cell):
    model = seq2seq(cell, True, dropout=0.5).train()
    batch = next(iter(Batches([([3, 4, 5], [6, 7]), ([8], [9])], 2)))
    torch.manual_seed(0)
    first = sequence_loss(model, batch)
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert sequence_loss(model, batch) != first  # dropout is drawn anew
    model = language(cell).train()
    language_loss(model, next(iter(PackedBatches([[3, 4, 5], [6]], 16)))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_of_attention_are_those_of_plain_operators():
    model, tgt = seq2seq("gru", True), torch.tensor([[1, 4, 6]] * 4)
    found = []
    for backend in ("torch", "reference"):
        model.zero_grad()
        with use_backend(backend):
            model(SRC, tgt).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(a.allclose(b, atol=1e-9) for a, b in zip(*found, strict=True))


def test_the_ssru_is_its_formula():
    torch.manual_seed(0)
    unit, x, c = SSRU(3, 4).double(), torch.randn(2, 5, 3).double(), torch.randn(2, 4).double()
    y, last = unit(x, c, torch.tensor([5, 2]))
    for t in range(5):
        f = torch.sigmoid(x[:, t] @ unit.forget.weight.T + unit.forget.bias)
        new = f * c + (1 - f) * (x[:, t] @ unit.write.weight.T)
        c = torch.where(torch.tensor([[True], [t < 2]]), new, c)
        assert y[:1, t].allclose(torch.relu(c[:1]))
    assert last.allclose(c)


def test_an_lstm_is_torchs():
    """Two layers in one call of torch.nn.LSTM, with our weights."""
    model = language("lstm")
    theirs = nn.LSTM(16, 16, 2, batch_first=True).double()
    for i, layer in enumerate(model.decoder.layers):
        for name, weight in layer.named_parameters():
            getattr(theirs, name.replace("_l0", f"_l{i}")).data.copy_(weight)
    x = torch.randn(2, 6, 16).double()
    y, state = model.decoder(x, model.decoder.begin(x))
    out, (h, c) = theirs(x)
    assert y.allclose(out) and state.allclose(torch.cat([h, c]).transpose(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cell="rnn"), "cell must be one of lstm, gru, ssru, got 'rnn'"),
        (
            dict(d_model=18, nhead=4, src_vocab=5),
            "d_model 18 is divided into two directions and 4 heads: take a multiple of 8",
        ),
        (dict(attention=True), "attention is over a source"),
        (dict(src_vocab=-1), "src_vocab and num_encoder_layers must be at least 0, got -1 and 0"),
        (dict(num_layers=0), "num_layers must be at least 1"),
        (dict(eos_id=1), "pad_id, bos_id and eos_id must be three ids"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\)"),
        (dict(src_vocab=5, num_encoder_layers=1), "a RecurrentLM is built without a source"),
    ],
)
def test_what_makes_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        RecurrentLM(RecurrentConfig(10, **{"d_model": 16, "src_vocab": 0} | options))


def test_what_it_refuses():
    model, lm = seq2seq("gru", True), language("gru")
    with pytest.raises(ValueError, match="a recurrent state cannot forget tokens"):
        generate_speculatively(lm, torch.tensor([[1, 3]]), 5)
    with pytest.raises(ValueError, match="is conditioned on a source"):
        model.start(torch.tensor([[1]]), capacity=3)
    with pytest.raises(ValueError, match="has no source"):
        lm.start(torch.tensor([[1]]), capacity=3, source=SRC)
    with pytest.raises(ValueError, match="token id 25 is outside the model's vocabulary of 20"):
        generate(model, torch.tensor([[25]]), 3)
    with pytest.raises(ValueError, match="tokens reaches 21 tokens, this model was built for 20"):
        lm(torch.ones(1, 21, dtype=torch.int64))
    with pytest.raises(TypeError, match="tokens must be token ids"):
        lm(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"packed tokens are \(1, total\) .* got \(2, 2\) and \(3,\)"):
        lm(torch.ones(2, 2, dtype=torch.int64), cu_seqlens=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="tgt has 1 rows, its source 4"):
        model(SRC, torch.tensor([[1]]))
    with pytest.raises(ValueError, match="capacity must be from the 1 tokens of a prompt to the model's 20, got 30"):
        lm.start(torch.tensor([[1]]), capacity=30)


def test_folders(tmp_path):
    pytest.importorskip("safetensors", reason="the train extra is not installed")
    for i, model in enumerate((seq2seq("ssru", True), language("lstm"))):
        model.save_pretrained(tmp_path / str(i))
        again = type(model).from_pretrained(tmp_path / str(i))
        assert generate(again, SRC, 6).equal(generate(model, SRC, 6)) and again.config == model.config
    with pytest.raises(TypeError, match="a RecurrentLM, expected a RecurrentSeq2Seq"):
        RecurrentSeq2Seq.from_pretrained(tmp_path / "1")
