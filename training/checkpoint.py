"""Checkpoints: one complete folder a step, that appears whole or not at all.

    runs/g2p/step-00004000/model.safetensors      weights; tied ones once
                           training.safetensors   optimiser state by parameter name, random states of torch's generators
                           state.json             step, settings, data position, threads, and the recipe's own `meta`

A folder is written under a hidden name, flushed to the disk, and renamed: a crash, a kill or a full disk leaves the
last one intact. No pickle is read or written: a checkpoint from a stranger can hold wrong numbers but no code.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

FORMAT = "tileformer checkpoint 1"
WEIGHTS, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not what was asked for. The message is one line and names the path."""


def latest(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: itself, or the newest `step-*` below it. CheckpointError when there is none."""
    path = Path(path)
    if (path / STATE).is_file():
        return path
    steps = steps_in(path)
    if not steps:
        found = "it is a file" if path.is_file() else "it holds none" if path.is_dir() else "it does not exist"
        raise CheckpointError(f"{path}: expected a checkpoint with {STATE}, or a run folder with step-*; {found}")
    return steps[-1]


def best(path: str | os.PathLike[str]) -> Path:
    """The checkpoint of a run with the lowest validation loss, where its settings kept it; else what `latest` says."""
    newest = latest(path)
    step = read_state(newest).get("best_step")
    kept = newest.with_name(_name(step)) if step is not None else newest
    return kept if (kept / STATE).is_file() else newest


def steps_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Every checkpoint of a run folder, oldest first."""
    return sorted(path for path in Path(folder).glob("step-*") if path.is_dir())


def read_state(path: Path) -> dict[str, Any]:
    """state.json of one checkpoint. CheckpointError when it is missing, damaged, or another program's."""
    file = path / STATE
    try:
        state = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; expected the description of a tileformer checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged or truncated; expected JSON ({error})") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{file}: expected format {FORMAT!r}, found {found!r}")
    return state


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint's weights into `model`. CheckpointError when the file is damaged or a name or shape differs."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_weights takes the model first and then the path, got a {type(model).__name__} first")
    file = Path(path) / WEIGHTS
    try:
        load_model(model, str(file))
    except (SafetensorError, FileNotFoundError, RuntimeError) as error:
        raise CheckpointError(f"{file}: expected the weights of {type(model).__name__}; {_one_line(error)}") from None


def load_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimiser's state and torch's random states. CheckpointError: a damaged file, or another model's."""
    file = path / TRAINING
    try:
        tensors = load_file(str(file))
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{file}: expected optimiser and random states; {_one_line(error)}") from None
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind, owner, key = name.split("/")
        if kind == "optimizer":
            moments.setdefault(owner, {})[key] = tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := moments.keys() - {names[parameter] for parameter in parameters}:
        raise CheckpointError(f"{file}: expected states of this model's parameters; it has none named {min(unknown)!r}")
    # A parameter that never had a gradient has no state yet, neither here nor there.
    state = {index: moments[names[p]] for index, p in enumerate(parameters) if names[p] in moments}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random/torch/cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "random/torch/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/torch/cuda"], device)


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int = 1,
    best: int | None = None,
) -> Path:
    """Write `folder/step-<state["step"]>`, then drop all but the newest `keep` and that of step `best`. Returns its path.

    Raises OSError when the disk refuses; whatever was in `folder` is then still there, whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*-step-*"):  # of a run that was killed while writing or removing
        shutil.rmtree(leftover)
    final = folder / _name(state["step"])
    partial = folder / f".partial-{final.name}"
    partial.mkdir()
    try:
        save_model(model, str(partial / WEIGHTS))
        save_file(_training_tensors(model, optimizer), str(partial / TRAINING))
        (partial / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=1) + "\n", "utf-8")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        os.replace(partial, final)
        _flush(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # what safetensors raises for a full disk
            raise OSError(f"{partial}: {_one_line(error)}") from None
        raise
    for old in steps_in(folder)[:-keep]:
        if best is None or old.name != _name(best):
            discard(old)
    return final


def discard(path: Path) -> None:
    """Remove one checkpoint. A kill half way leaves a hidden folder for the next save to sweep, never half of one."""
    hidden = path.with_name(f".discarded-{path.name}")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {"random/torch/cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["random/torch/cuda"] = torch.cuda.get_rng_state(device)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value.contiguous()
    return tensors


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
