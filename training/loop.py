"""The one step loop: AdamW, a schedule over the token budget, clipping, autocast, log lines, checkpoints, resume."""

import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tileformer.kernels import cross_entropy
from tileformer.training import checkpoint
from tileformer.training.data import Batch, Batches
from tileformer.training.log import open_log

LossFunction = Callable[[nn.Module, Batch], Tensor]
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# What may change between a run and its continuation: these decide when something is written, never a weight.
CADENCE = ("log_every", "save_every", "keep")


@dataclass(frozen=True)
class Settings:
    """How to learn. The budget is counted in tokens (`Batch.tokens`): it means the same at every batch size and speed.

    The learning rate rises linearly over the first `warmup` of the budget. Then "cosine" falls to `floor` x `lr` at its
    end; "wsd" (warm-up, stable, decay) stays flat and falls linearly over the last `decay` of it. Precision "auto" is
    `resolve_precision`. Raises ValueError for what makes no sense.
    """

    tokens: int
    lr: float = 1.5e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    decay: float = 0.3
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: str = "auto"
    log_every: int = 100
    save_every: int = 500
    keep: int = 1

    def __post_init__(self) -> None:
        for name, choices in (("schedule", ("cosine", "wsd")), ("precision", ("auto", "fp32", "bf16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("tokens", "lr", "clip", "log_every", "save_every", "keep"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not (0 <= self.warmup < 1 and 0 < self.decay <= 1):
            raise ValueError(f"warmup must be in [0, 1) and decay in (0, 1], got {self.warmup} and {self.decay}")


@dataclass(frozen=True)
class Report:
    """What `fit` did, the part before a resume counted too. `core_seconds`: CPU time of all threads of the process."""

    steps: int
    tokens: int
    loss: float
    core_seconds: float
    wall_seconds: float
    checkpoint: Path | None


def learning_rate_factor(progress: float, settings: Settings) -> float:
    """The learning rate as a share of `settings.lr`, at `progress` (0 to 1) of the budget."""
    if progress < settings.warmup:
        return progress / settings.warmup
    if settings.schedule == "wsd":
        share = max(0.0, progress - (1 - settings.decay)) / settings.decay
        fall = 1 - min(1.0, share)
    else:
        share = (min(1.0, progress) - settings.warmup) / (1 - settings.warmup)
        fall = 0.5 * (1 + math.cos(math.pi * share))
    return settings.floor + (1 - settings.floor) * fall


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed, and not: norms, biases, anything with fewer than two axes.

    Embeddings are decayed: an embedding tied to the output layer is a projection like any other, and decay pulls back
    the rows of symbols that are rarely seen.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                exempt = parameter.ndim < 2 or name.endswith("bias") or isinstance(module, NORMS)
                (plain if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; one fused update where torch has it (CPU and CUDA)."""
    groups = parameter_groups(model, settings.weight_decay)
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)


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


def sequence_loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the next symbol in nats, over labels that are not padding (id 0). Shape ()."""
    logits = model(batch.source, batch.target)  # (B, T_t, V)
    return cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=0, label_smoothing=label_smoothing)


def evaluate(model: nn.Module, batches: Batches, loss_fn: LossFunction, *, precision: str = "fp32") -> float:
    """Mean of `loss_fn` per label over one epoch of `batches`, in eval mode and without gradients.

    Leaves every module's training flag, torch's random states, and the place in `batches` as they were.
    """
    device = next(model.parameters()).device
    flags = [(module, module.training) for module in model.modules()]
    place = batches.state_dict()
    total, labels = torch.zeros((), device=device), 0
    model.eval()
    batches.index = 0
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), _cast(device, precision):
            for batch in batches:
                total += loss_fn(model, batch.to(device)).float() * batch.label_tokens
                labels += batch.label_tokens
    finally:
        batches.load_state_dict(place)
        for module, training in flags:
            module.training = training
    return total.item() / labels


def fit(
    model: nn.Module,
    batches: Batches,
    settings: Settings,
    loss_fn: LossFunction = sequence_loss,
    *,
    folder: str | os.PathLike[str] | None = None,
    valid: Batches | None = None,
    resume: bool = False,
    meta: dict[str, Any] | None = None,
) -> Report:
    """Train `model` where it stands, until `settings.tokens` are spent.

    batches: endless by repetition; valid: evaluated at every checkpoint. folder: where `log.jsonl` and checkpoints go
    (None: nowhere). meta: JSON-able facts stored with each checkpoint (the model's configuration, the vocabulary). With
    `resume` the newest checkpoint in `folder` is continued, and on a CPU with the same thread count the final weights
    are, bit for bit, those of a run that never stopped.

    Raises CheckpointError: nothing to resume, a damaged checkpoint, other settings, data or `meta` than the
    checkpoint's, or, without `resume`, a folder that already holds one; FloatingPointError when the loss or the
    gradient is not finite (nothing is saved then); OSError when a checkpoint cannot be written. The last good
    checkpoint stays in each case.
    """
    device = next(model.parameters()).device
    precision = resolve_precision(settings.precision, device)
    optimizer = make_optimizer(model, settings)
    # Through JSON, so that it compares equal to what a checkpoint says (JSON has no tuples).
    run = json.loads(json.dumps({"settings": asdict(settings) | {"precision": precision}, "meta": meta or {}}))
    step = tokens = 0
    core_before = wall_before = 0.0
    saved: Path | None = None
    last: dict[str, Any] = {"loss": math.nan}
    if resume:
        if folder is None:
            raise ValueError("resume needs the folder of the run")
        saved = checkpoint.latest(folder)
        state = _restore(saved, model, optimizer, batches, run)
        step, tokens, last = state["step"], state["tokens"], state["last"]
        core_before, wall_before = state["core_seconds"], state["wall_seconds"]
    elif folder is not None and (found := checkpoint.steps_in(folder)):
        raise checkpoint.CheckpointError(f"{found[-1]}: a run is already here; resume it or choose another folder")

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    loss_sum, window_steps, window_tokens = torch.zeros((), device=device), 0, 0
    core_start, wall_start = time.process_time(), time.perf_counter()
    window_start = core_start
    model.train()
    with open_log(folder, step, settings.tokens) as record:
        while tokens < settings.tokens:
            batch = next(stream).to(device)
            # A step's rate is that of its middle: neither the first nor the last one is wasted on a rate of 0.
            rate = settings.lr * learning_rate_factor((tokens + batch.tokens / 2) / settings.tokens, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with _cast(device, precision):
                loss = loss_fn(model, batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + batch.tokens
            loss_sum += loss.detach()
            window_steps, window_tokens = window_steps + 1, window_tokens + batch.tokens

            saving = step % settings.save_every == 0 or tokens >= settings.tokens
            if not saving and step % settings.log_every:
                continue
            mean, gradient = loss_sum.item() / window_steps, norm.item()  # all that is ever read from the device
            if not (math.isfinite(mean) and math.isfinite(gradient)):
                raise FloatingPointError(f"step {step}: loss {mean}, gradient norm {gradient}; try a lower lr or clip")
            now = time.process_time()
            last = {"step": step, "tokens": tokens, "loss": mean, "lr": rate, "gradient_norm": gradient}
            last["tokens_per_core_second"] = round(window_tokens / max(now - window_start, 1e-9))
            if saving and valid is not None:
                last["valid_loss"] = evaluate(model, valid, loss_fn, precision=precision)
            core, wall = core_before + time.process_time() - core_start, wall_before + time.perf_counter() - wall_start
            record(last | {"core_seconds": round(core, 2)})
            if saving and folder is not None:
                place = {"step": step, "tokens": tokens, "core_seconds": core, "wall_seconds": wall, "last": last}
                place |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "data": batches.state_dict()}
                saved = checkpoint.save(folder, model, optimizer, place | run, keep=settings.keep)
            loss_sum.zero_()
            window_steps, window_tokens, window_start = 0, 0, time.process_time()
    core, wall = core_before + time.process_time() - core_start, wall_before + time.perf_counter() - wall_start
    return Report(step, tokens, last["loss"], core, wall, saved)


def _cast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, run: dict[str, Any]
) -> dict[str, Any]:
    """Put a checkpoint back into every object that has state; returns its state.json."""
    state = checkpoint.read_state(path)
    for part, now in run.items():
        for name, value in now.items():
            before = state[part].get(name)
            if name not in CADENCE and before != value:
                found = f"a run with {part} {name}={before!r}; asked to resume with {value!r}"
                raise checkpoint.CheckpointError(f"{path}: {found}")
    try:
        batches.load_state_dict(state["data"])
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{path}: {error}") from None
    checkpoint.load_weights(path, model)
    checkpoint.load_training(path, model, optimizer)
    if state["threads"] != torch.get_num_threads():
        warnings.warn(
            f"{path} was trained with {state['threads']} threads, this process has {torch.get_num_threads()}: "
            "the last bits of the result may differ from the uninterrupted run's",
            stacklevel=3,
        )
    return state
