"""Schedules, parameter groups, optimisers and initialisations by name."""

import math

import pytest
import torch
from torch import nn

from tileformer.training.optimizers import (
    INITIALISATIONS,
    initialise,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
    shrink,
)
from tileformer.training.settings import CHOICES, Settings


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm((2, 4))  # two axes, and still a norm
        self.linear = nn.Linear(4, 5)
        self.linear.weight = self.embedding.weight  # tied: once in a group
        self.position_bias = nn.Parameter(torch.zeros(3, 4))
        self.gain = nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


@pytest.mark.parametrize(
    "progress, expected",
    [
        (0.00, dict.fromkeys(CHOICES["schedule"], 0.0)),
        (0.05, dict.fromkeys(CHOICES["schedule"], 0.5)),
        (0.10, dict.fromkeys(CHOICES["schedule"], 1.0)),
        (0.55, dict(cosine=0.55, wsd=1, linear=0.55, inverse_sqrt=0.1 + 0.9 * (0.1 / 0.55) ** 0.5, constant=1, plateau=1)),
        (0.70, dict(cosine=0.325, wsd=1, linear=0.4, inverse_sqrt=0.1 + 0.9 / 7**0.5, constant=1, plateau=1)),
        (1.00, dict(cosine=0.1, wsd=0.1, linear=0.1, inverse_sqrt=0.1 + 0.9 / 10**0.5, constant=1, plateau=1)),
        (1.20, dict(cosine=0.1, wsd=0.1, linear=0.1, inverse_sqrt=0.1 + 0.9 / 12**0.5, constant=1, plateau=1)),
    ],
)  # fmt: skip
def test_schedule_values(progress, expected):
    """Linear warm-up over 10 %, floor 0.1; cosine: half way down at the middle; wsd: the last 30 % linear."""
    assert set(expected) == set(CHOICES["schedule"])
    values = {name: learning_rate_factor(progress, Settings(1, **steered(name), floor=0.1)) for name in expected}
    assert values == pytest.approx(expected)


def steered(schedule):
    return {"schedule": schedule, "valid_every": "epoch"}


def test_without_warm_up_a_run_starts_at_the_full_rate():
    names = [name for name in CHOICES["schedule"] if name != "inverse_sqrt"]
    assert [learning_rate_factor(0.0, Settings(1, warmup=0.0, **steered(name))) for name in names] == [1.0] * 5


def test_warm_up_and_decay_share_a_run():
    assert Settings(1, schedule="wsd", warmup=0.5, decay=0.5).decay == 0.5  # all of it
    with pytest.raises(ValueError, match="warmup and decay of wsd share the run, got 0.5 and 0.9"):
        Settings(1, schedule="wsd", warmup=0.5, decay=0.9)


def test_only_matrices_decay():
    model = Model()
    decayed, plain = parameter_groups(model, 0.01)
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(model.embedding.weight)]
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for p in plain["params"]) == [
        "gain", "linear.bias", "norm.bias", "norm.weight", "position_bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, kind, options",
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.98), "fused": True}),
        ("sgd", torch.optim.SGD, {"momentum": 0.7}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.7, "alpha": 0.98}),
    ],
)
def test_an_optimizer_by_name_has_the_settings_values(name, kind, options):
    optimizer = make_optimizer(Model(), Settings(1, optimizer=name, momentum=0.7, weight_decay=0.3))
    assert type(optimizer) is kind and options.items() <= optimizer.defaults.items()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_groups_scale_the_rate_and_leave_out_what_is_frozen():
    model = Model()
    groups = [
        {"params": [model.embedding.weight, model.linear.bias], "lr_scale": 0.5},
        {"params": [model.frozen], "lr_scale": 0.25},
        {"params": [model.gain]},
    ]
    optimizer = make_optimizer(model, Settings(1), groups)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        (names[id(p)], group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found == {
        ("embedding.weight", 0.5, 0.01), ("linear.bias", 0.5, 0.0), ("gain", 1.0, 0.0), ("norm.weight", 1.0, 0.0),
        ("norm.bias", 1.0, 0.0), ("position_bias", 1.0, 0.0),
    }  # fmt: skip


def test_groups_that_make_no_sense_are_refused():
    model = Model()
    for groups, message in [
        ([{"params": [model.gain]}, {"params": [model.gain]}], r"shape \(4,\) is in two groups"),
        ([{"params": [nn.Parameter(torch.zeros(2))]}], r"shape \(2,\) is in a group, but not in the model"),
        ([{"params": [model.gain], "lr": 0.1}], "params and lr_scale, got 'lr'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_optimizer(model, Settings(1), groups)
    with pytest.raises(ValueError, match="Model has no trainable parameter"):
        make_optimizer(model.requires_grad_(False), Settings(1))


def test_l1_shrinks_weights_to_exactly_zero_and_no_further():
    model = nn.Linear(3, 1)
    model.weight.data = torch.tensor([[0.5, -0.015, -2.0]])
    model.bias.data.fill_(0.5)
    optimizer = make_optimizer(model, Settings(1, lr=0.1))
    shrink(optimizer, 0.2)
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.48, 0.0, -1.98]]))
    assert model.weight[0, 1] == 0 and model.bias == 0.5  # a bias is no weight


DEVIATIONS = {  # of a (200, 100) weight: fan-in 100, fan-out 200
    "xavier_uniform": math.sqrt(2 / 300), "xavier_normal": math.sqrt(2 / 300), "kaiming_uniform": math.sqrt(2 / 100),
    "kaiming_normal": math.sqrt(2 / 100), "normal": 0.02, "trunc_normal": 0.0176, "orthogonal": math.sqrt(1 / 200),
}  # fmt: skip
LARGEST = {"xavier_uniform": math.sqrt(6 / 300), "kaiming_uniform": math.sqrt(6 / 100), "trunc_normal": 0.04}


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_an_initialisation_by_name_has_its_deviation(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.LayerNorm((20, 10)), nn.Embedding(10, 200), nn.Linear(100, 200))
    model[3].requires_grad_(False)
    before = [p.clone() for layer in model[1:] for p in layer.parameters()]
    initialise(model, name)
    assert model[0].weight.std().item() == pytest.approx(DEVIATIONS[name], rel=0.03)
    assert model[0].weight.mean().abs() < 0.003 and not model[0].bias.any()
    kept = [p for layer in model[1:] for p in layer.parameters()]  # a norm, an embedding, what is frozen
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    assert model[0].weight.abs().max() <= LARGEST.get(name, 1.0) + 1e-6


def test_an_output_tied_to_an_embedding_is_left_as_it_is():
    model = Model()
    before = model.embedding.weight.clone()
    initialise(model, "orthogonal")
    assert torch.equal(model.linear.weight, before)


def test_an_unknown_initialisation_names_the_known_ones():
    with pytest.raises(ValueError, match="one of xavier_uniform, .*orthogonal, got 'he'"):
        initialise(Model(), "he")
