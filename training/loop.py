"""The one step loop: accumulation, clipping, mixed precision, validation that may steer, log, checkpoints, resume."""

import contextlib
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from tileformer.files import quote, shorten, to_json
from tileformer.training import checkpoint
from tileformer.training.log import open_log
from tileformer.training.losses import sequence_loss
from tileformer.training.optimizers import Groups, learning_rate_factor, make_optimizer, shrink
from tileformer.training.process import Stop, lock, stop_at_next_step
from tileformer.training.settings import Settings
from tileformer.training.state import TrainState


class AnyBatches(Protocol):
    """What `fit` asks of its data: a `for` loop is (what is left of) one epoch, the state is the exact position in it.

    A batch has `to(device)`, `tokens` in the unit of the budget, and `label_tokens`, what a mean loss is a mean of.
    """

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


LossFunction = Callable[[Any, Any], Tensor]  # of a model and a batch
Backward = Callable[[Any, Any, LossFunction, Tensor], Tensor]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What may change between a run and its continuation: these decide when something is written, never a weight.
CADENCE = ("log_every", "save_every", "keep")
# What a kill may cost: so many seconds of work, or so many times what a save takes, whichever is longer.
AT_RISK, AT_RISK_SAVES = 60.0, 20


@dataclass(frozen=True)
class Report:
    """What `fit` did, the part before a resume counted too. `core_seconds`: CPU time of all threads of the process.

    `loss` is the mean of the last interval, `valid_loss` that of the weights which the model has now, `skipped` the
    steps that fp16 overflowed, `checkpoint` the newest.
    """

    steps: int
    tokens: int
    loss: float
    core_seconds: float
    wall_seconds: float
    checkpoint: Path | None
    valid_loss: float | None = None
    skipped: int = 0


def resolve_precision(precision: str, device: torch.device) -> str:
    """`precision`, or for "auto" the faster one: "bf16" on CUDA that has it and on a CPU with AMX, else "fp32".

    AVX512-BF16 alone does not pay: measured on such a CPU at width 128, one thread, fp32 trains 1.4 times as fast.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        return "bf16" if "amx_bf16" in Path("/proc/cpuinfo").read_text("utf-8") else "fp32"
    except OSError:
        return "fp32"


def backward_once(model: nn.Module, batch: Any, loss_fn: LossFunction, scale: Tensor) -> Tensor:
    """Forward and backward of one batch, the gradients times `scale`. Returns the loss without it."""
    loss = loss_fn(model, batch)
    (loss * scale).backward()
    return loss


def evaluate(model: nn.Module, batches: AnyBatches, loss_fn: LossFunction, *, precision: str = "fp32") -> float:
    """Mean of `loss_fn` per label over one whole epoch of `batches`, in eval mode and without gradients.

    Leaves every module's training flag, torch's random states, and the position in `batches` as they were.
    """
    device = next(model.parameters()).device
    flags = [(module, module.training) for module in model.modules()]
    position = batches.state_dict()
    total, labels = torch.zeros((), device=device), 0
    model.eval()
    batches.load_state_dict(position | {"index": 0, "piece": 0})  # where an epoch starts; a stream has pieces
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), _cast(device, precision):
            for batch in batches:
                total += loss_fn(model, batch.to(device)).float() * batch.label_tokens
                labels += batch.label_tokens
    finally:
        batches.load_state_dict(position)
        for module, training in flags:
            module.training = training
    if not labels:
        raise ValueError("the validation batches hold nothing that could be predicted")
    return total.item() / labels


def fit(
    model: nn.Module,
    batches: AnyBatches,
    settings: Settings,
    loss_fn: LossFunction = sequence_loss,
    *,
    folder: str | os.PathLike[str] | None = None,
    valid: AnyBatches | None = None,
    resume: bool = False,
    overwrite: bool = False,
    meta: dict[str, Any] | None = None,
    groups: Groups | None = None,
    backward: Backward = backward_once,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Train `model` where it stands, until `settings.tokens` are spent or `settings.patience` is at an end.

    batches: endless by repetition; valid: evaluated as `settings.valid_every` says. folder: where `log.jsonl` and
    checkpoints go (None: nowhere). meta: JSON-able facts stored with each checkpoint (the model's configuration, the
    vocabulary). groups: learning rates by layer, see `make_optimizer`. backward: runs forward and backward of one batch
    as `backward_once` does, for methods that need more than one of each. on_record: called with each line of the log,
    such as a tracker's (`trackers`). With `resume` the newest checkpoint in
    `folder` is continued, and on a CPU with the same thread count the final weights are, bit for bit, those of a run
    that never stopped. With `overwrite` a run that is there goes, once everything else is known to fit.

    With a folder, Ctrl-C and SIGTERM (in the main thread) let the step end and save it; then KeyboardInterrupt is
    raised, or SystemExit of 143. A second Ctrl-C stops at once. A kill loses at most `AT_RISK` seconds, or as long as
    `AT_RISK_SAVES` saves take.

    Raises ValueError: the settings steer by a validation loss and there is no `valid`, nothing is trainable, a model
    that no checkpoint can hold, or a folder that another process has; CheckpointError: nothing to resume, no checkpoint
    that is whole, other settings, data or `meta` than the checkpoint's, or, without `resume`, a folder that already
    holds one; FloatingPointError when a loss, the gradient or a weight is not finite (nothing is saved then); OSError
    when a checkpoint cannot be written. The last good checkpoint stays in each case.

    Example:
        >>> from tileformer.decoder import Seq2Seq, Seq2SeqConfig
        >>> from tileformer.training import Batches
        >>> model = Seq2Seq(Seq2SeqConfig(10, 10, d_model=16, nhead=2, dim_feedforward=32))
        >>> fit(model, Batches([([3, 4, 5], [5, 4, 3])], batch_size=1), Settings(tokens=70)).steps
        10
    """
    if settings.steered and valid is None:
        raise ValueError(f"{settings.steered} needs a validation loss: pass valid=")
    if resume and folder is None:
        raise ValueError("resume needs the folder of the run")
    folder = None if folder is None else Path(folder)
    if folder is not None:
        checkpoint.check_storable(model)
        to_json(batches.state_dict())
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_exclusive(folder, resume, overwrite))
        device = next(model.parameters()).device
        precision = resolve_precision(settings.precision, device)
        optimizer = make_optimizer(model, settings, groups)
        scaler = GradScaler(device.type, enabled=precision == "fp16")
        # Through JSON, so that it compares equal to what a checkpoint says (JSON has no tuples).
        run = json.loads(to_json({"settings": asdict(settings) | {"precision": precision}, "meta": meta or {}}))
        state, saved, between = TrainState(), None, None
        if folder is not None and resume:
            saved = checkpoint.latest(folder)
            state = _restore(saved, model, optimizer, scaler, batches, run)
            between = saved if state.between else None
        elif folder is not None:
            for step in checkpoint.steps_in(folder):
                checkpoint.discard(step)

        def cast_loss(model: nn.Module, batch: Any) -> Tensor:
            with _cast(device, precision):
                return loss_fn(model, batch)

        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        best_weights: dict[str, Tensor] = {}
        loss_sum = torch.full((), state.pending_loss, device=device)
        skipped = torch.full((), state.pending_skipped, dtype=torch.int64, device=device)
        core_start, wall_start = time.process_time() - state.core_seconds, time.perf_counter() - state.wall_seconds
        window_start = time.process_time() - state.pending_core_seconds
        saved_at, save_seconds = time.monotonic(), 0.0
        steps, data = _steps(batches, settings.accumulate), batches.state_dict()
        model.train()
        record = stack.enter_context(open_log(folder, state.step, settings.tokens))
        while not state.ended(settings):
            step_start = time.monotonic()
            taken, data, epoch_ends = next(steps)
            tokens, labels = sum(batch.tokens for batch in taken), sum(batch.label_tokens for batch in taken)
            # A step's rate is that of its middle: neither the first nor the last one is wasted on a rate of 0.
            rate = settings.lr * learning_rate_factor((state.tokens + tokens / 2) / settings.tokens, settings)
            rate *= state.plateau_factor
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            for batch in taken:
                share = torch.full((), batch.label_tokens / labels, device=device)
                loss = backward(model, batch.to(device), cast_loss, scaler.scale(share))
                loss_sum += loss.detach() * share
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
            scaler.step(optimizer)
            scaler.update()
            if settings.l1:
                shrink(optimizer, settings.l1)
            if scaler.is_enabled():
                skipped += norm.isfinite().logical_not()
            optimizer.zero_grad(set_to_none=True)
            state.step, state.tokens = state.step + 1, state.tokens + tokens
            state.pending_steps, state.pending_tokens = state.pending_steps + 1, state.pending_tokens + tokens

            ended, every = state.ended(settings), settings.valid_every
            saving = ended or state.step % settings.save_every == 0
            due = state.step % every == 0 if isinstance(every, int) else epoch_ends if every == "epoch" else saving
            validating = valid is not None and (due or ended)
            now = time.monotonic()
            at_risk = now - saved_at + (now - step_start) + save_seconds  # by a kill before a save behind the next step
            late = folder is not None and (stop.signum > 0 or at_risk > max(AT_RISK, AT_RISK_SAVES * save_seconds))
            logging = saving or validating or state.step % settings.log_every == 0
            if not (logging or late):
                continue
            # All that is ever read from the device.
            mean, gradient = loss_sum.item() / state.pending_steps, norm.item()
            _check_finite(state.step, mean, gradient, scaler)
            if logging:
                state.last = {"step": state.step, "tokens": state.tokens, "loss": mean, "lr": rate}
                state.last["gradient_norm"] = gradient if math.isfinite(gradient) else None
                speed = state.pending_tokens / max(time.process_time() - window_start, 1e-9)
                state.last["tokens_per_core_second"] = round(speed)
                if scaler.is_enabled():
                    state.skipped += int(skipped.item())
                    state.last |= {"skipped": state.skipped, "loss_scale": scaler.get_scale()}
                if validating and valid is not None:
                    measured = evaluate(model, valid, loss_fn, precision=precision)
                    if not math.isfinite(measured):
                        raise FloatingPointError(f"step {state.step}: validation loss {measured}; try a lower lr")
                    state.last["valid_loss"], improved = measured, state.record_validation(measured, settings)
                    saving = saving or state.ended(settings) or improved and settings.keep_best
                    if improved and settings.keep_best and folder is None:
                        best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                entry = state.last | {"core_seconds": round(time.process_time() - core_start, 2)}
                record(entry)
                if on_record is not None:
                    on_record(entry)
                loss_sum.zero_()
                skipped.zero_()
                state.pending_steps, state.pending_tokens, window_start = 0, 0, time.process_time()
            stopping = stop.signum > 0  # also since `late` was decided: a validation may take minutes
            if folder is not None and (saving or late or stopping):
                if not checkpoint.is_finite(parameters):
                    raise FloatingPointError(f"step {state.step}: weights that are not finite; try a lower lr or clip")
                save_start = time.monotonic()
                state.core_seconds = time.process_time() - core_start
                state.wall_seconds = time.perf_counter() - wall_start
                state.pending_loss, state.pending_skipped = loss_sum.item(), int(skipped.item())
                state.pending_core_seconds = time.process_time() - window_start if state.pending_steps else 0.0
                state.between = not saving
                content = asdict(state) | {"scaler": scaler.state_dict(), "data": data} | run
                content |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
                best, keep = state.best_step if settings.keep_best else None, settings.keep + state.between
                saved = checkpoint.save(folder, model, optimizer, content, keep=keep, best=best, replaces=between)
                between, saved_at = saved if state.between else None, time.monotonic()
                save_seconds = saved_at - save_start
            if stopping:
                break
        batches.load_state_dict(data)  # `steps` looks one step ahead
        if stop.signum:
            raise stop.error(f"stopped at step {state.step}; fit(..., resume=True) goes on from {saved}")
        if settings.keep_best and folder is not None:
            checkpoint.load_weights(model, checkpoint.best(folder))
        elif best_weights:
            model.load_state_dict(best_weights)
        core, wall = time.process_time() - core_start, time.perf_counter() - wall_start
        valid_loss = state.best if settings.keep_best else state.last.get("valid_loss")
        return Report(state.step, state.tokens, state.last["loss"], core, wall, saved, valid_loss, state.skipped)


@contextlib.contextmanager
def _exclusive(folder: Path | None, resume: bool, overwrite: bool) -> Iterator[Stop]:
    """A folder with its run, if there is one, for this thread alone; and whether the process was asked to stop."""
    if folder is None:
        yield Stop()
        return
    if resume:
        checkpoint.candidates(folder)  # nothing to resume: no folder is made
    with lock(folder), stop_at_next_step() as stop:
        if (steps := checkpoint.steps_in(folder)) and not (resume or overwrite):
            raise checkpoint.CheckpointError(f"{steps[0]}: a run is already here; resume it or choose another folder")
        yield stop


def _cast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=HALVES.get(precision), enabled=precision in HALVES)


def _steps(batches: AnyBatches, accumulate: int) -> Iterator[tuple[list[Any], dict[str, Any], bool]]:
    """For ever: the batches of one step, the position in the data behind them, and whether an epoch ends with them.

    Looks one step ahead, because only an iterator that stops says that an epoch is over.
    """
    for empty in itertools.count():  # a run that stopped at the very end of an epoch resumes with an empty one
        iterator = iter(batches)
        taken = list(itertools.islice(iterator, accumulate))
        if not taken and empty:
            raise ValueError("there are no batches to train on")
        while taken:
            position = batches.state_dict()
            ahead = list(itertools.islice(iterator, accumulate))
            yield taken, position, not ahead
            taken = ahead


def _check_finite(step: int, loss: float, gradient: float, scaler: GradScaler) -> None:
    """FloatingPointError for a run that has diverged. An overflow that fp16 skipped is none while a scale avoids it."""
    overflow = scaler.is_enabled() and scaler.get_scale() >= 1
    if not (math.isfinite(loss) and (math.isfinite(gradient) or overflow)):
        raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {gradient}; try a lower lr or clip")


def _restore(
    path: Path, model: nn.Module, optimizer: Optimizer, scaler: GradScaler, batches: AnyBatches, run: dict[str, Any]
) -> TrainState:
    """Put a checkpoint back into every object that has state; returns where it stands."""
    state = checkpoint.read_training_state(path)
    # A checkpoint older than a setting was written with what is now the default.
    defaults: dict[str, dict[str, Any]] = {
        "settings": {setting.name: setting.default for setting in fields(Settings)},
        "meta": {"asked": {}},
    }
    for part in ("meta", "settings"):
        for name, value in run[part].items():
            before = getattr(state, part).get(name, defaults[part].get(name))
            if name not in CADENCE and before != value:
                found = f"a run with {part} {name}={quote(before, 200)}; asked to resume with {quote(value, 200)}"
                raise checkpoint.CheckpointError(f"{path}: {found}")
    try:
        batches.load_state_dict(state.data)
        if scaler.is_enabled():
            scaler.load_state_dict(state.scaler)
            if not (scaler.get_scale() > 0 and all(0 <= value < math.inf for value in state.scaler.values())):
                raise ValueError(f"expected a loss scale above 0, found {shorten(state.scaler)}")
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__} " if isinstance(error, LookupError) else ""
        raise checkpoint.CheckpointError(f"{path}: {what}{shorten(error)}") from None
    checkpoint.load_weights(model, path)
    checkpoint.load_training(path, model, optimizer)
    if state.threads != torch.get_num_threads():
        threads = f"{path} was trained with {state.threads} threads, this process has {torch.get_num_threads()}"
        warnings.warn(f"{threads}: the last bits of the result may differ from the uninterrupted run's", stacklevel=4)
    return TrainState(**{part.name: getattr(state, part.name) for part in fields(TrainState)})
