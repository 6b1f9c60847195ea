"""The step loop: precision, accumulation, learning, validation that steers, what it writes down, and what it
refuses."""

import itertools
import json
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors", reason="the train extra is not installed")

from tileformer.decoder import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig
from tileformer.training import (
    Batches,
    CheckpointError,
    Settings,
    checkpoint,
    classification_loss,
    evaluate,
    fit,
    language_loss,
    losses,
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


def test_lines_of_a_log_that_are_no_records_are_left_out(tmp_path):
    fit(linear(), RowBatches(2), Settings(20, log_every=1), classification_loss, folder=tmp_path)
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    junk = b'[1]\nnull\n{"step": null}\n\xff\xfe\n' + b"[" * 100_000 + b"\n"
    log.write_bytes(junk + whole + b'{"step": 3, "half')
    with pytest.warns(UserWarning, match="log.jsonl: damaged; 5 lines"):
        fit(linear(), RowBatches(2), Settings(20, log_every=1), classification_loss, folder=tmp_path, resume=True)
    assert log.read_bytes() == whole and whole.count(b"\n") == 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_a_divergence(value, tmp_path):
    with pytest.raises(FloatingPointError, match=f"step 5: validation loss {value}; try a lower lr"):
        fit(
            linear(), RowBatches(2), Settings(20, save_every=5), scripted([value]), folder=tmp_path, valid=RowBatches(2)
        )
    assert not list(tmp_path.glob("step-*")) and "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def broken(model, batch):
        with torch.no_grad():
            model.bias[0] = math.nan
        return model.weight.sum() * 0

    with pytest.raises(FloatingPointError, match="weights that are not finite"):
        fit(linear(), RowBatches(2), Settings(20, save_every=5), broken, folder=tmp_path)
    assert not list(tmp_path.glob("step-*"))


def test_label_smoothing_and_padding_reach_the_loss():
    model, (batch,) = tiny(), Batches(PAIRS[:5], 5)
    logits = model(batch.source, batch.target)
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=0, label_smoothing=0.1)
    torch.testing.assert_close(partial(sequence_loss, label_smoothing=0.1)(model, batch), expected)


@dataclass(frozen=True)
class Rows:
    """A batch of another kind than `Batch`: (B, 3) numbers and what to say of each."""

    source: Tensor
    labels: Tensor
    weights: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def label_tokens(self) -> int:
        return len(self.labels)

    tokens = label_tokens

    def to(self, device):
        return self


class RowBatches:
    """The least that `fit` asks for: batches of these sizes, in order, again and again."""

    def __init__(self, *sizes):
        torch.manual_seed(1)
        rows = torch.randn(sum(sizes), 3)
        labels = (rows.sum(1) > 0).long()
        self.items = [Rows(*pair) for pair in zip(rows.split(sizes), labels.split(sizes), strict=True)]
        self.next = 0

    def __iter__(self):
        while self.next < len(self.items):
            self.next += 1
            yield self.items[self.next - 1]
        self.next = 0

    def state_dict(self):
        return {"index": self.next}

    def load_state_dict(self, state):
        self.next = state["index"]


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def scripted(values):
    """A loss that trains as `classification_loss`, and whose validations come out as `values`, one after the other."""
    rest = iter(values)
    return lambda model, batch: classification_loss(model, batch) if model.training else torch.tensor(next(rest))


def rates(folder):
    return [json.loads(line)["lr"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer, lr", [("adamw", 0.05), ("sgd", 0.05), ("rmsprop", 0.01)])
def test_every_optimizer_learns(optimizer, lr):
    settings = Settings(6_000, lr=lr, optimizer=optimizer, weight_decay=0.0, precision="fp32")
    assert fit(linear(), RowBatches(30, 30), settings, classification_loss).loss < 0.3 < math.log(2)


def test_accumulated_batches_make_the_step_of_one_batch():
    """Batches of 6 and 2 count by their labels, not each the same."""
    settings = Settings(64, lr=0.1, optimizer="sgd", precision="fp32")
    whole, parts = linear(), linear()
    one = fit(whole, RowBatches(8), settings, classification_loss)
    two = fit(parts, RowBatches(6, 2), replace(settings, accumulate=2), classification_loss)
    torch.testing.assert_close(parts.weight, whole.weight)
    assert (one.steps, one.tokens) == (two.steps, two.tokens) == (8, 64) and one.loss == pytest.approx(two.loss)


def test_a_step_ends_with_its_epoch():
    batches = RowBatches(2, 2, 2, 2, 2)
    assert (
        fit(linear(), batches, Settings(22, accumulate=2), classification_loss).steps == 7
    )  # 4 + 4 + 2, and again, + 2
    assert batches.next == 2  # the look ahead is given back


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="there are no batches to train on"):
        fit(linear(), RowBatches(), Settings(8), classification_loss)


@pytest.mark.parametrize("every, at", [("epoch", [3, 6, 9, 10]), (4, [4, 8, 10]), ("save", [5, 10])], ids=str)
def test_validation_comes_when_it_was_asked_for(every, at, tmp_path):
    settings = Settings(20, valid_every=every, save_every=5)
    fit(linear(), RowBatches(2, 2, 2), settings, classification_loss, folder=tmp_path, valid=RowBatches(4))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid_loss" in line] == at


STEERED = Settings(200, precision="fp32", log_every=1, valid_every=2)


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    loss = scripted([0.9, 0.7, 0.8, 0.7, 0.75, 0.1])
    report = fit(
        linear(), RowBatches(2), replace(STEERED, patience=3), loss, folder=tmp_path, valid=RowBatches(2)
    )  # an equal loss is no improvement
    assert (report.steps, report.valid_loss) == (10, pytest.approx(0.75))  # of the weights that it ends with
    assert report.checkpoint is not None and checkpoint.read_state(report.checkpoint)["step"] == 10


def test_a_plateau_lowers_the_rate_down_to_the_floor(tmp_path):
    settings = replace(STEERED, schedule="plateau", warmup=0.0, lr=1.0, plateau_wait=2, plateau_factor=0.5, floor=0.3)
    losses = [0.5, 0.6, 0.6, 0.4, 0.5, 0.5, 0.5, 0.5] + [1.0] * 99  # cut behind the third and the sixth: steps 6, 12
    fit(linear(), RowBatches(2), replace(settings, tokens=36), scripted(losses), folder=tmp_path, valid=RowBatches(2))
    assert rates(tmp_path) == [1.0] * 6 + [0.5] * 6 + [0.3] * 6


def test_a_plateau_cuts_again_while_it_lasts(tmp_path):
    settings = replace(STEERED, schedule="plateau", warmup=0.0, lr=1.0, tokens=28)
    fit(linear(), RowBatches(2), settings, scripted([0.5] + [1.0] * 9), folder=tmp_path, valid=RowBatches(2))
    assert rates(tmp_path) == [1.0] * 6 + [0.5] * 4 + [0.25] * 4


def test_patience_starts_again_with_a_lower_loss():
    losses = scripted([0.9, 1.0, 0.5, 1.0, 1.0, 1.0])
    assert fit(linear(), RowBatches(2), replace(STEERED, patience=2), losses, valid=RowBatches(2)).steps == 10


def test_a_step_is_as_long_as_its_clipped_gradient_and_trains():
    model, start, flags = linear().eval(), linear(), []

    def loss(model, batch):
        flags.append(model.training)
        return classification_loss(model, batch) * 1e3

    settings = dict(lr=0.5, schedule="constant", warmup=0.0, optimizer="sgd", momentum=0.0, weight_decay=0.0)
    fit(model, RowBatches(8), Settings(8, clip=0.2, precision="fp32", **settings), loss)
    moved = [a - b for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert nn.utils.get_total_norm(moved).item() == pytest.approx(0.1, rel=1e-4) and flags == [True]


def test_the_loss_is_the_mean_of_its_interval(tmp_path):
    model, batches = linear(), RowBatches(2, 2, 2, 2)
    expected = [classification_loss(model, batch).item() for batch in batches.items]
    report = fit(
        model, batches, Settings(8, lr=1e-9, log_every=2, precision="fp32"), classification_loss, folder=tmp_path
    )
    logged = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == pytest.approx([sum(expected[:2]) / 2, sum(expected[2:]) / 2], rel=1e-5)
    assert report.loss == logged[-1]


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_best_weights_are_kept_and_given_back(on_disk, tmp_path):
    settings = replace(STEERED, tokens=24, keep_best=True, save_every=100)
    seen = []

    def loss(model, batch):
        if not model.training:
            seen.append(model.weight.detach().clone())
        return script(model, batch)

    script, model = scripted([0.9, 0.5, 0.7, 1.0, 0.8, 0.6]), linear()
    report = fit(model, RowBatches(2), settings, loss, folder=tmp_path if on_disk else None, valid=RowBatches(2))
    assert (report.steps, report.valid_loss) == (12, 0.5)
    assert torch.equal(model.weight, seen[1]) and not torch.equal(model.weight, seen[-1])
    if on_disk:
        assert [path.name for path in checkpoint.steps_in(tmp_path)] == ["step-00000004", "step-00000012"]
        assert checkpoint.best(tmp_path).name == "step-00000004" and checkpoint.latest(tmp_path) == report.checkpoint
    else:
        assert report.checkpoint is None


def test_the_best_of_a_run_that_keeps_none_is_its_newest(tmp_path):
    report = fit(linear(), RowBatches(2), Settings(20, save_every=3), classification_loss, folder=tmp_path)
    assert checkpoint.best(tmp_path) == report.checkpoint
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.best(tmp_path / "elsewhere")


def test_a_method_may_run_forward_and_backward_its_own_way():
    """Twice half of each gradient is the gradient; under fp16 both halves carry the loss scale."""

    def halves(model, batch, loss_fn, scale):
        for _ in range(2):
            loss = loss_fn(model, batch)
            (loss * scale * 0.5).backward()
        return loss

    for precision in ("fp32", "fp16"):
        settings = Settings(64, lr=0.1, optimizer="sgd", precision=precision)
        plain, other = linear(), linear()
        first = fit(plain, RowBatches(8), settings, classification_loss)
        second = fit(other, RowBatches(8), settings, classification_loss, backward=halves)
        torch.testing.assert_close(plain.weight, other.weight)
        assert first.loss == pytest.approx(second.loss)


def test_groups_reach_the_optimizer():
    model, start = linear(), linear()
    groups = [{"params": [model.weight], "lr_scale": 0.0}]
    fit(model, RowBatches(8), Settings(64), classification_loss, groups=groups)
    assert torch.equal(model.weight, start.weight) and not torch.equal(model.bias, start.bias)


def test_l1_leaves_only_the_weights_that_matter():
    model, batches = linear(), RowBatches(300)
    for batch in batches.items:
        batch.labels.copy_((batch.source[:, 0] > 0).long())
    settings = Settings(60_000, lr=0.5, l1=0.05, optimizer="sgd", momentum=0.0, weight_decay=0.0)
    fit(model, batches, settings, classification_loss)
    assert (model.weight[:, 1:] == 0).all() and model.weight[:, 0].abs().min() > 0.1


def overflow(at):
    """A backward whose gradients leave the range of fp16 in the steps `at`."""
    calls = itertools.count(1)

    def backward(model, batch, loss_fn, scale):
        loss = loss_fn(model, batch)
        (loss * scale * (math.inf if next(calls) in at else 1)).backward()
        return loss

    return backward


def test_a_whole_model_learns_in_fp16():
    model = tiny()
    report = fit(model, Batches(PAIRS, 16, seed=0), Settings(5_000, lr=5e-3, precision="fp16"))
    assert report.loss < 1.4 < math.log(5) and all(p.isfinite().all() for p in model.parameters())


def test_fp16_skips_a_step_that_overflows_and_says_so(tmp_path):
    settings = Settings(40, precision="fp16", log_every=1)
    model = linear()
    report = fit(model, RowBatches(4), settings, classification_loss, folder=tmp_path, backward=overflow({1, 4}))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    norms = [line["gradient_norm"] for line in lines]  # without the loss scale, as they are clipped
    assert [norm is None or norm < 2 for norm in norms] == [True] * 10 and norms.index(None) == 0 and norms[3] is None
    assert (report.steps, report.skipped, lines[-1]["loss_scale"]) == (10, 2, 2.0**14) and model.weight.isfinite().all()


def test_a_resumed_run_keeps_its_loss_scale(tmp_path):
    settings, calls = Settings(24, precision="fp16", log_every=1, save_every=2), itertools.count(1)

    def loss(model, batch):
        if next(calls) == 6:
            raise RuntimeError("stopped")
        return classification_loss(model, batch)

    with pytest.raises(RuntimeError, match="stopped"):
        fit(linear(), RowBatches(2), settings, loss, folder=tmp_path, backward=overflow({2}))
    fit(linear(), RowBatches(2), settings, classification_loss, folder=tmp_path, resume=True)
    scales = [json.loads(line)["loss_scale"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert scales == [2.0**16] + [2.0**15] * 11  # halved by the overflow


def test_an_infinite_loss_with_a_finite_gradient_has_diverged():
    with pytest.raises(FloatingPointError, match="step 1: loss inf"):
        fit(linear(), RowBatches(2), Settings(8, log_every=1), lambda *given: classification_loss(*given) + math.inf)


def test_fp16_that_always_overflows_has_diverged(tmp_path):
    settings = Settings(400, precision="fp16", log_every=1)
    with pytest.raises(FloatingPointError, match=r"step 17: loss 0\.\d+, gradient norm (inf|nan)"):
        fit(linear(), RowBatches(4), settings, classification_loss, backward=overflow(range(999)))


def test_classification_loss_is_torchs_and_counts_rows_by_their_weight():
    torch.manual_seed(0)
    model, source, labels = linear(), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    class_weights, weights = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.0, 0.3, 1.0, 1.0])
    logits = model(source)
    expected = nn.functional.cross_entropy(logits, labels, class_weights, label_smoothing=0.1)
    torch.testing.assert_close(classification_loss(model, Rows(source, labels), 0.1, class_weights), expected)
    each = nn.functional.cross_entropy(logits, labels, class_weights, label_smoothing=0.1, reduction="none")
    found = classification_loss(model, Rows(source, labels, weights), 0.1, class_weights)
    torch.testing.assert_close(found, (each * weights).sum() / 5)


def test_language_loss_counts_places_that_have_a_next_token():
    logits = torch.randn(1, 6, 7, requires_grad=True)
    batch = Rows(torch.randint(7, (1, 6)), torch.tensor([[3, 4, 2, 0, 6, 2]]), cu_seqlens=torch.tensor([0, 4, 6]))
    seen = {}

    def model(source, *, cu_seqlens):
        seen.update(source=source, cu_seqlens=cu_seqlens)
        return logits

    kept = batch.labels[0] != 0
    for smoothing in (0.0, 0.1):
        expected = nn.functional.cross_entropy(logits[0, kept], batch.labels[0, kept], label_smoothing=smoothing)
        torch.testing.assert_close(language_loss(model, batch, smoothing), expected)
    assert seen["source"] is batch.source and seen["cu_seqlens"] is batch.cu_seqlens


def test_the_losses_of_our_models_need_no_logits_where_that_is_faster(monkeypatch):
    """On a GPU, here on the CPU; what wraps a model is called for logits."""
    packed = Rows(torch.randint(7, (1, 6)), torch.tensor([[3, 4, 2, 0, 6, 2]]), cu_seqlens=torch.tensor([0, 4, 6]))
    language_model = DecoderLM(DecoderLMConfig(vocab=9, d_model=16, nhead=2, num_layers=1, dropout=0.0))
    (batch,), fused = Batches(PAIRS[:5], 5), losses.linear_cross_entropy
    for loss_fn, model, given in ((sequence_loss, tiny(), batch), (language_loss, language_model, packed)):
        expected = loss_fn(model, given, 0.1)
        gradients = torch.autograd.grad(expected, list(model.parameters()))
        with monkeypatch.context() as patch:
            calls = []
            patch.setattr(losses, "FUSED_ON", ("cpu",))
            patch.setattr(losses, "linear_cross_entropy", lambda *x, **y: calls.append(x) or fused(*x, **y))  # noqa: B023
            loss = loss_fn(model, given, 0.1)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), gradients)
            assert len(calls) == 1 and torch.equal(loss_fn(nn.DataParallel(model), given, 0.1), expected)
        assert len(calls) == 1


@pytest.mark.parametrize("steer", [{"patience": 1}, {"keep_best": True}, {"schedule": "plateau"}], ids=str)
def test_a_steered_run_needs_a_validation_loss_of_its_own_rhythm(steer):
    with pytest.raises(
        ValueError, match="valid_every must be 'epoch' or a number of steps with .*" + next(iter(steer))
    ):
        Settings(1, **steer)
    with pytest.raises(ValueError, match=f"{next(iter(steer))}.* needs a validation loss: pass valid="):
        fit(linear(), RowBatches(2), Settings(1, valid_every=1, **steer), classification_loss)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"schedule": "step"}, {"precision": "int8"}, {"optimizer": "adam"}, {"lr": 0}, {"tokens": -1}),
        *({"warmup": 1.0}, {"warmup": 0.0, "schedule": "inverse_sqrt"}, {"decay": 0.0}, {"accumulate": 0}, {"l1": -1}),
        *({"momentum": -0.1}, {"patience": -1}, {"plateau_wait": 0}, {"plateau_factor": 1.0}),
        *({"valid_every": 0}, {"valid_every": "step"}, {"clip": math.inf}, {"betas": (0.9, math.nan)}),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**({"tokens": 1} | wrong))
