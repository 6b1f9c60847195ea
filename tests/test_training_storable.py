"""What a checkpoint can hold: odd names, kinds and layouts come back as they were, and what it cannot hold is refused
before any work."""

import itertools
import math

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors", reason="the train extra is not installed")

import safetensors.torch

from tileformer.training import LabelledBatches, Settings, classification_loss, fit, latest, load_weights


class Odd(nn.Module):
    """Names and tensors of every kind that a module may have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        names = ("en/us", "a//b", "optimizer/x", "é 名\n", "random")
        self.heads = nn.ModuleDict({name: nn.Linear(4, 2, bias=False) for name in names})
        self.tied = self.heads["random"]
        self.embedding = nn.Embedding(10, 4)
        self.scale, self.nothing = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(0, 3))
        self.turned = nn.Parameter(torch.randn(4, 3).t())  # 3 x 4 in memory of 4 x 3
        memory = torch.randn(2, 4)
        self.upper, self.lower = nn.Parameter(memory[:1]), nn.Parameter(memory[1:])
        self.unused = nn.Parameter(torch.ones(2))
        self.mask = nn.Parameter(torch.full((3,), -math.inf), requires_grad=False)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("phase", torch.tensor([1 + 2j]).conj())
        self.register_buffer("small", torch.ones(3).to(torch.float8_e4m3fn))
        self.register_buffer("counts", torch.tensor(0))
        self.register_buffer("forgotten", torch.randn(3), persistent=False)

    def get_extra_state(self):
        return self.counts + 1

    def set_extra_state(self, state):
        self.seen = state

    def forward(self, tokens):
        self.counts += self.training
        x = self.embedding(tokens).mean(1) + self.turned.sum(0) + self.upper + self.lower
        return sum(head(x) for head in self.heads.values()) * self.scale


def fit_odd(folder, model, loss_fn=classification_loss, **options):
    data = LabelledBatches([[4, 5, 6 + i % 3] for i in range(24)], [0, 1] * 12, 4, seed=0)
    fit(model, data, Settings(600, lr=0.1, save_every=3, precision="fp32"), loss_fn, folder=folder, **options)
    return model.state_dict()


def test_what_a_save_takes_a_load_takes(tmp_path):
    """The moments of a transposed weight go back in its own layout: a fused optimiser walks through memory."""
    whole = fit_odd(tmp_path / "whole", Odd())
    calls = itertools.count(1)
    with pytest.raises(ZeroDivisionError):
        fit_odd(tmp_path / "run", Odd(), lambda m, b: classification_loss(m, b) if next(calls) < 20 else 1 / 0)
    again = fit_odd(tmp_path / "run", Odd(), resume=True)
    assert whole.keys() == again.keys() and whole["counts"] == 50
    plain = {torch.float8_e4m3fn: torch.float32}  # torch cannot compare these
    for name, tensor in whole.items():
        wanted = plain.get(tensor.dtype, tensor.dtype)
        assert torch.equal(again[name].to(wanted), tensor.to(wanted)), name
    other = Odd()
    load_weights(other, latest(tmp_path / "run"))
    assert other.tied.weight is other.heads["random"].weight and other.seen == 51
    assert other.phase.item() == 1 - 2j and other.turned.stride() == (1, 3)


def with_buffer(value, name="odd"):
    model = nn.Linear(2, 2)
    model._buffers[name] = value
    return model


class Noted(nn.Linear):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    "model, named",
    [
        (lambda: Noted(2, 2), "_extra_state is a dict"),
        (lambda: with_buffer(torch.ones(2).to_sparse()), "'odd' .* its layout is torch.sparse_coo"),
        (lambda: with_buffer(torch.ones(1, dtype=torch.complex128)), r"'odd' \(torch.complex128\) cannot be held"),
        (lambda: with_buffer(torch.ones(1), "__metadata__"), "'__metadata__' .* cannot be held"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight' .* it has no values"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused_before_any_work(model, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        fit_odd(tmp_path / "run", model())
    assert not (tmp_path / "run").exists()


def test_weights_of_the_first_format_load(tmp_path):
    """As safetensors' own save_model wrote them, ties in the metadata."""
    model = Odd()
    model.get_extra_state = lambda: torch.tensor(7)
    model.upper, model.lower = nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(1, 4))
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    other = Odd()
    load_weights(other, tmp_path)
    assert torch.equal(other.turned, model.turned) and torch.equal(other.tied.weight, model.tied.weight)
