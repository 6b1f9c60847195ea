"""Averages and ensembles of checkpoints: the exact mean, ties, what is refused, and decoding by several models."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors", reason="the train extra is not installed")

from tileformer.decoder import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, generate
from tileformer.decoder.generation import Decodable, DecodeState
from tileformer.training import CheckpointError, Settings, checkpoint, make_optimizer
from tileformer.training.average import Ensemble, average_checkpoints


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embedding = nn.Embedding(6, width)
        self.output = nn.Linear(width, 6, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("steps", torch.tensor(0))


def save(folder, model, step=1, **dtype):
    model = model.to(**dtype)
    return checkpoint.save(folder, model, make_optimizer(model, Settings(1)), {"step": step}, keep=9)


def seq2seq(seed, layers=1, **changes):
    torch.manual_seed(seed)
    config = dict(d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=layers, dim_feedforward=32)
    return Seq2Seq(Seq2SeqConfig(9, 8, **(config | {"max_length": 12} | changes))).eval()


def test_the_mean_of_three_and_tied_weights_stay_tied(tmp_path):
    models = [Tied() for _ in range(3)]
    for step, model in enumerate(models, 1):
        model.steps.fill_(step)
        save(tmp_path, model, step)
    state = average_checkpoints(checkpoint.steps_in(tmp_path))
    mean = torch.stack([model.embedding.weight.detach() for model in models]).double().mean(0)
    torch.testing.assert_close(state["embedding.weight"].double(), mean, rtol=0, atol=2e-7)
    assert state["output.weight"] is state["embedding.weight"] and state["steps"] == 3
    model = Tied()
    model.load_state_dict(state)  # every name is there
    assert model.output.weight is model.embedding.weight


def test_half_precision_is_averaged_in_float32(tmp_path):
    # 1 + 2**-7 is the bfloat16 behind 1. The mean of one 1 and three of it lies nearer to it; in bfloat16 the mean of
    # the first two would round to 1, and no later one would move it.
    for step in range(1, 5):
        model = Tied()
        nn.init.constant_(model.embedding.weight, 1 if step == 1 else 1 + 2**-7)
        save(tmp_path, model, step, dtype=torch.bfloat16)
    state = average_checkpoints(checkpoint.steps_in(tmp_path))
    assert state["embedding.weight"].dtype == torch.bfloat16
    assert (state["embedding.weight"] == 1 + 2**-7).all()


def test_one_checkpoint_is_its_own_mean_and_a_run_folder_means_its_newest(tmp_path):
    first, second = Tied(), Tied()
    save(tmp_path, first, 1)
    save(tmp_path, second, 2)
    assert torch.equal(average_checkpoints([tmp_path])["embedding.weight"], second.embedding.weight)


def test_other_models_damage_and_nothing_are_refused(tmp_path):
    paths = [save(tmp_path / "a", Tied()), save(tmp_path / "b", Tied(5))]
    with pytest.raises(CheckpointError, match=r"b/.*embedding.weight of shape .*6, 5.*first one's has .*6, 4"):
        average_checkpoints(paths)
    (paths[1] / checkpoint.WEIGHTS).write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"b/.*model.safetensors: expected weights"):
        average_checkpoints(paths)
    with pytest.raises(ValueError, match="no checkpoints"):
        average_checkpoints([])


def test_an_ensemble_gives_the_log_of_the_mean_probability():
    models = [nn.Linear(3, 5) for _ in range(3)]
    x = torch.randn(7, 3)
    expected = torch.stack([model(x).softmax(-1) for model in models]).mean(0).log()
    torch.testing.assert_close(Ensemble(models)(x), expected)
    confident = [nn.Linear(1, 2) for _ in range(2)]
    for model, sign in zip(confident, (1, -1), strict=True):
        nn.init.zeros_(model.weight)
        model.bias.data = torch.tensor([200.0, -200.0]) * sign
    out = Ensemble(confident)(torch.zeros(1, 1))  # a probability of 0 in one model is no -inf in the mean
    torch.testing.assert_close(out, torch.full((1, 2), math.log(0.5)))


def test_equal_models_decode_as_one_of_them():
    model = seq2seq(0, layers=2)
    src = torch.tensor([[3, 4, 5, 0], [5, 6, 7, 8]])
    expected = generate(model, src)
    assert torch.equal(generate(Ensemble([model] * 3), src), expected)


def test_different_models_decode_each_step_by_their_mean_with_and_without_a_cache():
    models = [seq2seq(0, layers=1), seq2seq(1, layers=2, d_model=8), seq2seq(2, layers=1, max_length=9)]
    ensemble = Ensemble(models)
    assert ensemble.max_length == 9
    src = torch.tensor([[3, 4, 5, 0], [5, 6, 7, 8]])
    tokens = generate(ensemble, src)
    assert torch.equal(tokens, generate(ensemble, src, use_cache=False))
    target = torch.cat([torch.full((2, 1), 1), tokens[:, :-1]], 1)
    mean = torch.stack([model(src, target).softmax(-1) for model in models]).mean(0)
    mean[..., 0] = 0  # padding is never chosen
    live = tokens != 0
    assert torch.equal(mean.argmax(-1)[live], tokens[live])
    torch.testing.assert_close(ensemble(src, target)[..., 1:], mean.log()[..., 1:])
    assert any(not torch.equal(generate(model, src), tokens) for model in models)


def test_language_models_decode_by_their_mean_from_prompts_of_any_length():
    models = []
    for seed, width in ((0, 16), (1, 8)):
        torch.manual_seed(seed)
        models.append(DecoderLM(DecoderLMConfig(9, width, 2, 2, 32, max_length=12)).eval())
    ensemble, prompts = Ensemble(models), torch.tensor([[1, 3, 4, 5], [0, 0, 1, 7]])
    assert isinstance(ensemble, Decodable) and (ensemble.eos_id, ensemble.pad_id, ensemble.max_length) == (2, 0, 12)
    for options in ({}, {"num_beams": 3}):
        tokens = generate(ensemble, prompts, 6, **options)
        assert torch.equal(tokens, generate(ensemble, prompts, 6, use_cache=False, **options))
        alone = [generate(ensemble, row[None, row != 0], 6, **options)[0] for row in prompts]
        assert [row[row != 0].tolist() for row in tokens] == [row[row != 0].tolist() for row in alone]
    with torch.no_grad():
        assert isinstance(ensemble.start(prompts, capacity=9)[1], DecodeState)
        mean = torch.stack([model(prompts[:1])[0, -1].softmax(-1) for model in models]).mean(0)
    assert generate(ensemble, prompts[:1], 1).item() == int(mean[1:].argmax()) + 1


def test_halves_are_averaged_in_float32_and_options_reach_the_models():
    models = [nn.Linear(3, 5).bfloat16() for _ in range(2)]
    x = torch.randn(7, 3).bfloat16()
    expected = torch.stack([model(x).float().softmax(-1) for model in models]).mean(0).log()
    torch.testing.assert_close(Ensemble(models)(x), expected)
    torch.manual_seed(0)
    readers = [DecoderLM(DecoderLMConfig(9, 16, 2, 1, 32)).eval() for _ in range(2)]
    tokens, starts = torch.randint(3, 9, (1, 6)), torch.tensor([0, 2, 6])
    packed, alone = Ensemble(readers)(tokens, cu_seqlens=starts), Ensemble(readers)(tokens[:, 2:])
    torch.testing.assert_close(packed[:, 2:], alone)


@pytest.mark.parametrize("name, value", [("tgt_vocab", 9), ("pad_id", 3), ("bos_id", 3), ("eos_id", 3)])
def test_models_that_do_not_mean_the_same_ids_are_no_ensemble(name, value):
    with pytest.raises(ValueError, match=f"one {name}, the models have"):
        Ensemble([seq2seq(0), Seq2Seq(Seq2SeqConfig(**{"src_vocab": 9, "tgt_vocab": 8, "d_model": 16, name: value}))])


def test_what_makes_no_ensemble_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"one src_vocab, the models have \[9, 10\]"):
        Ensemble([seq2seq(0), Seq2Seq(Seq2SeqConfig(10, 8, 16, 2, 1, 1, 32))])
