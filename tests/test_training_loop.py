"""The step loop: schedule, groups, precision, learning, evaluation, what it writes down, and what it refuses."""

import json
import math
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors", reason="the train extra is not installed")

from tileformer.decoder import Seq2Seq, Seq2SeqConfig
from tileformer.training import (
    Batches,
    Settings,
    evaluate,
    fit,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
    resolve_precision,
    sequence_loss,
)

CPU = torch.device("cpu")
# Copy the source, reversed: needs cross-attention and causality, and is learned in seconds. Ids 3..7, lengths 2..5.
ROWS = [[3 + (i * k + j) % 5 for j in range(2 + k % 4)] for i in range(8) for k in range(25)]
PAIRS = [(row, row[::-1]) for row in ROWS]


def tiny(dropout=0.0):
    torch.manual_seed(0)
    return Seq2Seq(Seq2SeqConfig(8, 8, 32, 2, 1, 1, 64, dropout=dropout, max_length=8))


@pytest.mark.parametrize(
    "progress, cosine, wsd",
    [(0, 0, 0), (0.05, 0.5, 0.5), (0.1, 1, 1), (0.55, 0.55, 1), (0.7, 0.325, 1), (1, 0.1, 0.1), (1.2, 0.1, 0.1)],
)
def test_schedule_values(progress, cosine, wsd):
    """Linear warm-up over 10 %, floor 0.1; cosine: half way down at the middle; wsd: the last 30 % linear."""
    values = {name: learning_rate_factor(progress, Settings(1, schedule=name, floor=0.1)) for name in ("cosine", "wsd")}
    assert values == pytest.approx({"cosine": cosine, "wsd": wsd})


def test_only_matrices_decay():
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

    model = Model()
    decayed, plain = parameter_groups(model, 0.01)
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(model.embedding.weight)]
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for p in plain["params"]) == [
        "gain", "linear.bias", "norm.bias", "norm.weight", "position_bias",
    ]  # fmt: skip
    assert make_optimizer(model, Settings(1)).defaults["fused"]


@pytest.mark.parametrize("flags, expected", [("avx512f amx_bf16 amx_tile", "bf16"), ("avx512f avx512_bf16", "fp32")])
def test_cpu_precision_follows_the_processor(monkeypatch, flags, expected):
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_: f"flags : {flags}\n")
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls_on_a_task_that_needs_the_whole_model(precision):
    model, settings = tiny(), Settings(24_000, lr=5e-3, precision=precision)
    report = fit(model, Batches(PAIRS, 16, seed=0), settings)
    assert report.loss < 0.25 < math.log(5)
    assert 24_000 <= report.tokens < 24_000 + 16 * 12 and report.checkpoint is None
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_evaluate_is_the_mean_over_labels_and_changes_nothing():
    model, batches = tiny(dropout=0.5), Batches(PAIRS, 7, seed=1)
    model.transformer.encoder.eval()  # a part kept in eval mode, as frozen parts are
    next(iter(batches))
    flags = [module.training for module in model.modules()]
    random_state, place = torch.get_rng_state(), batches.state_dict()

    def noisy_loss(model, batch):
        torch.rand(3)
        return sequence_loss(model, batch)

    value = evaluate(model, batches, noisy_loss)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state) and batches.state_dict() == place
    model.eval()
    single = Batches(PAIRS, len(PAIRS))
    assert value == pytest.approx(sequence_loss(model, next(iter(single))).item(), rel=1e-5)


def test_the_log_has_a_line_an_interval_and_agrees_with_the_report(tmp_path, capsys):
    settings = Settings(3_000, log_every=10, save_every=25)
    report = fit(tiny(), Batches(PAIRS, 16, seed=0), settings, folder=tmp_path, valid=Batches(PAIRS[:20], 16))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted({*range(10, report.steps, 10), *range(25, report.steps, 25), report.steps})
    assert [line["step"] for line in lines if "valid_loss" in line] == [*range(25, report.steps, 25), report.steps]
    assert lines[-1]["loss"] == report.loss and lines[-1]["tokens"] == report.tokens
    assert len(capsys.readouterr().err.splitlines()) == len(lines)  # no terminal here: plain lines


def test_a_run_that_diverges_stops_and_saves_nothing(tmp_path):
    with pytest.raises(FloatingPointError, match="step 10: loss nan"):
        fit(
            tiny(),
            Batches(PAIRS, 16, seed=0),
            Settings(3_000, log_every=10, save_every=10),
            lambda model, batch: sequence_loss(model, batch) * math.nan,
            folder=tmp_path,
        )
    assert not list(tmp_path.glob("step-*"))


def test_label_smoothing_and_padding_reach_the_loss():
    model, (batch,) = tiny(), Batches(PAIRS[:5], 5)
    logits = model(batch.source, batch.target)
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=0, label_smoothing=0.1)
    torch.testing.assert_close(partial(sequence_loss, label_smoothing=0.1)(model, batch), expected)


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": "step"}, {"precision": "int8"}, {"lr": 0}, {"tokens": -1}, {"warmup": 1.0}, {"decay": 0.0}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**({"tokens": 1} | wrong))
