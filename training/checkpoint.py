"""Checkpoints: one complete folder a step, that appears whole or not at all.

    runs/g2p/step-00004000/model.safetensors      weights; tied ones once
                           training.safetensors   optimiser state by parameter name, random states of torch's generators
                           state.json             step, settings, data position, threads, and the recipe's own `meta`

A folder is written under a hidden name, flushed to the disk, and renamed: a crash, a kill or a full disk leaves the
last one intact. No pickle is read or written: a checkpoint from a stranger can hold wrong numbers but no code.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tileformer.files import PathLike, quote, read_json, shorten, to_json
from tileformer.training.state import OLD_NAMES, CheckpointError, Saved, parse

FORMAT = "tileformer checkpoint 1"
WEIGHTS, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"
MOST_LAYERS = 1000  # of a configuration whose weights are still to be compared; beyond, building alone takes minutes

M = TypeVar("M", bound=nn.Module)
Tensors = dict[str, Tensor]


def candidates(path: PathLike) -> list[Path]:
    """The checkpoints that `path` can mean: itself, or every `step-*` below it, oldest first. CheckpointError: none."""
    path = Path(path)
    if (path / STATE).is_file():
        return [path]
    if not (steps := steps_in(path)):
        found = "it is a file" if path.is_file() else "it holds none" if path.is_dir() else "it does not exist"
        raise CheckpointError(f"{path}: expected a checkpoint with {STATE}, or a run folder with step-*; {found}")
    return steps


def latest(path: PathLike) -> Path:
    """The checkpoint that `path` means: itself, or the newest `step-*` below it. CheckpointError when there is none.

    In a run, one that is damaged is passed over for the one before it, with a warning that says what is wrong.
    """
    result = candidates(path)
    if result == [Path(path)]:
        return result[0]
    try:
        return _first_whole(result[::-1])
    except CheckpointError:
        if candidates(path) == result:
            raise
        return latest(path)  # a run has saved, and dropped what was listed


def best(path: PathLike) -> Path:
    """The checkpoint of a run with the lowest validation loss, where its settings kept it; else what `latest` says."""
    newest = latest(path)
    step = read_state(newest).get("best_step")
    kept = newest.with_name(_name(step)) if isinstance(step, int) else newest
    return newest if kept == newest or not kept.exists() else _first_whole([kept, newest])


def _first_whole(steps: list[Path]) -> Path:
    """The first of some checkpoints that is not damaged; a warning says what is wrong with the one before it."""
    first: CheckpointError | None = None
    for step in steps:
        try:
            check(step)
        except CheckpointError as error:
            first = first or error
            continue
        if first is not None:
            warnings.warn(f"{first}; {step.name}, the last good checkpoint, is used instead", stacklevel=3)
        return step
    raise first or CheckpointError("no checkpoint")


def steps_in(folder: PathLike) -> list[Path]:
    """Every checkpoint of a run folder, oldest first."""
    result = [path for path in Path(folder).glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(result, key=lambda path: int(path.name[5:]))


def check(path: Path) -> None:
    """Read all of one checkpoint of a run. CheckpointError for the first thing in it that is missing or damaged."""
    if "settings" in read_state(path):
        read_training_state(path)
    tensors, _ = read_tensors(path / WEIGHTS, "weights")
    moments = _moments(path / TRAINING, read_tensors(path / TRAINING, "optimiser and random states")[0])
    _check_finite(path / WEIGHTS, tensors, moments)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of one checkpoint. CheckpointError when it is missing, damaged, or another program's."""
    file = path / STATE
    try:
        state = read_json(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CheckpointError(f"{file}: missing; expected the description of a tileformer checkpoint") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{file}: expected format {FORMAT!r}, found {quote(found)}")
    if not isinstance(state.get("meta", {}), dict):
        raise CheckpointError(f"{file}: expected meta as an object, found {quote(state['meta'])}")
    return state


def read_training_state(path: Path) -> Saved:
    """state.json of a run in training, every field checked. CheckpointError as `read_state`, and for a finished one."""
    state = read_state(path)
    if "settings" not in state:
        raise CheckpointError(f"{path}: a model that is ready for use; expected one in training, to resume")
    saved = parse(Saved, {OLD_NAMES.get(name, name): value for name, value in state.items()}, str(path / STATE))
    if path.name.startswith("step-") and path.name != _name(saved.step):
        raise CheckpointError(f"{path / STATE}: expected the step of {path.name}, found step {saved.step:,}")
    return saved


def build(path: Path, kind: type[Any], make: Callable[[Any], M]) -> M:
    """`make(config)` with the weights of a checkpoint, where `config` is the dataclass `kind` of its meta["model"].

    CheckpointError, before anything is built, for a configuration that is damaged or is not that of the weight file.
    """
    where = f"{path / STATE}: meta model"
    config = parse(kind, read_state(path).get("meta", {}).get("model"), where)
    tensors, ties = read_tensors(path / WEIGHTS, "weights")
    longest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    for name, value in vars(config).items():
        most = max(len(tensors), MOST_LAYERS) if "layers" in name else longest
        if isinstance(value, int) and value > most:
            raise CheckpointError(f"{where}: {name} {value:,} is more than the {most:,} that {WEIGHTS} has room for")
    with torch.device("meta"):
        _matched(path / WEIGHTS, make(config), tensors, ties)
    model = make(config)
    load_weights(model, path)
    return model


def check_vocabulary(path: Path, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """CheckpointError when a model reads or writes another number of symbols than its recipe's vocabularies have."""
    if found != wanted:
        raise CheckpointError(f"{path}: damaged; expected a model of {wanted} symbols, found {found}")


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint's weights into `model`. CheckpointError when the file is damaged, holds a number that is not
    finite, or a name, a shape or a kind of number differs; nothing is copied then."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_weights takes the model first and then the path, got a {type(model).__name__} first")
    file = Path(path) / WEIGHTS
    result = _matched(file, model, *read_tensors(file, f"the weights of {type(model).__name__}"))
    _check_finite(file, result, (name for name, parameter in model.named_parameters() if parameter.requires_grad))
    model.load_state_dict(result)


def load_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimiser's state and torch's random states. CheckpointError: a damaged file, or another model's."""
    file = path / TRAINING
    tensors, _ = read_tensors(file, "optimiser and random states")
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments, wanted = _moments(file, tensors), _state_keys(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := moments.keys() - {names[parameter] for parameter in parameters}:
        raise CheckpointError(f"{file}: expected states of this model's parameters; it has none named {min(unknown)!r}")
    state = {}
    for index, parameter in enumerate(parameters):
        name = names[parameter]
        if name not in moments:  # a parameter that never had a gradient has no state yet, neither here nor there
            continue
        if moments[name].keys() != wanted:
            raise CheckpointError(f"{file}: expected {sorted(wanted)} of {name}, found {sorted(moments[name])}")
        for key, tensor in moments[name].items():
            if tensor.shape not in (parameter.shape, ()) or not tensor.is_floating_point():
                found = f"{tuple(parameter.shape)}, found {tensor.dtype} of shape {tuple(tensor.shape)}"
                raise CheckpointError(f"{file}: expected {key} of {name} as its {found}")
            # Laid out in memory as the parameter is: fused optimisers walk through both alike.
            like = torch.empty_like(parameter if tensor.ndim else tensor, dtype=tensor.dtype)
            moments[name][key] = like.copy_(tensor)
        state[index] = moments[name]
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    device = next(model.parameters()).device
    try:
        torch.set_rng_state(tensors["random/torch/cpu"])
        if device.type == "cuda" and "random/torch/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/torch/cuda"], device)
    except (RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: expected the states of torch's generators; {shorten(error)}") from None


def check_storable(model: nn.Module) -> None:
    """ValueError for a model that no checkpoint can hold, which must not come out at the end of the first hour."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{name} is a {kind}: a checkpoint holds tensors only; train without folder=")
        try:
            if value.is_meta or value.layout != torch.strided:
                raise ValueError("it has no values" if value.is_meta else f"its layout is {value.layout}")
            safetensors.torch.load(safetensors.torch.save({name: torch.empty(0, dtype=value.dtype)}))
        except (ValueError, KeyError, SafetensorError, RuntimeError) as error:
            why = f"cannot be held by a checkpoint: {shorten(error)}; train without folder="
            raise ValueError(f"{name!r} ({value.dtype}) {why}") from None


def save(
    folder: PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int = 1,
    best: int | None = None,
    replaces: Path | None = None,
) -> Path:
    """Write `folder/step-<state["step"]>`, then drop all but the newest `keep` and that of step `best`. Gives its path.

    replaces: one that goes first, and does not count. What is newer than this step goes too: it was passed over as
    damaged by the run that writes now. Raises OSError when the disk refuses; what was in `folder` is then still whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*-step-*"):  # of a run that was killed while writing or removing
        shutil.rmtree(leftover)
    final = folder / _name(state["step"])
    partial = folder / f".partial-{final.name}"
    partial.mkdir()
    try:
        save_weights(model, partial / WEIGHTS)
        _save(_training_tensors(model, optimizer), {}, partial / TRAINING)
        (partial / STATE).write_text(to_json({"format": FORMAT, **state}, indent=1) + "\n", "utf-8")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        if final.exists():
            discard(final)
        os.replace(partial, final)
        _flush(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # what safetensors raises for a full disk
            raise OSError(f"{partial}: {shorten(error)}") from None
        raise
    newer = [path for path in steps_in(folder) if int(path.name[5:]) > state["step"]]
    for old in (*newer, *([replaces] if replaces not in (None, final) and replaces.exists() else ())):
        discard(old)
    for old in steps_in(folder)[:-keep]:
        if best is None or old.name != _name(best):
            discard(old)
    return final


def save_weights(model: nn.Module, file: Path) -> None:
    """Write the tensors of `model`, those that have several names once."""
    tensors: Tensors = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if (kept := first.setdefault(id(tensor), name)) == name:
            tensors[name] = tensor
        else:
            ties[name] = kept
    _save(tensors, ties, file)


def discard(path: Path) -> None:
    """Remove one checkpoint. A kill half way leaves a hidden folder for the next save to sweep, never half of one."""
    hidden = path.with_name(f".discarded-{path.name}")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _save(tensors: Tensors, metadata: dict[str, str], file: Path) -> None:
    """Each tensor for itself, whatever memory it shares with others, in a file of the mode that the umask gives."""
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        plain[name] = tensor if whole else tensor.clone()
    shared: dict[int, str] = {}
    for name, tensor in plain.items():
        if tensor.numel() and shared.setdefault(tensor.data_ptr(), name) != name:
            plain[name] = tensor.clone()
    file.touch()
    mode = file.stat().st_mode & 0o777
    save_file(plain, str(file), metadata)
    os.chmod(file, mode)  # that of the umask: safetensors makes it the owner's alone


def read_tensors(file: Path, what: str) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(str(file), framework="pt") as content:
            names = list(content.keys())
            return {name: content.get_tensor(name) for name in names}, content.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: expected {what}; {shorten(error)}") from None


def _matched(file: Path, model: nn.Module, tensors: Tensors, ties: Mapping[str, str]) -> Tensors:
    """A tensor for every name of `model`. CheckpointError for a name, a shape or a kind of number that differs."""
    own = model.state_dict(keep_vars=True)
    wrong = f"{file}: expected the weights of {type(model).__name__};"
    present = {id(own[name]): name for name in own if name in tensors}
    result = {}
    for name, mine in own.items():
        source = name if name in tensors else ties.get(name, present.get(id(mine), ""))
        if source not in tensors:
            raise CheckpointError(f"{wrong} it has no {name}")
        result[name] = theirs = tensors[source]
        if name.endswith("_extra_state"):  # the module knows what it takes
            continue
        like = torch.can_cast(mine.dtype, theirs.dtype) and torch.can_cast(theirs.dtype, mine.dtype)
        if theirs.shape != mine.shape or not like:  # a copy between kinds of numbers is no copy
            here, there = (f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in (mine, theirs))
            raise CheckpointError(f"{wrong} {name} is {there} in the file and {here} in the model")
    if unknown := tensors.keys() - own.keys() - set(ties.values()):
        raise CheckpointError(f"{wrong} the model has no {quote(min(unknown), 100)}")
    return result


def _check_finite(file: Path, tensors: Tensors, names: Iterable[str]) -> None:
    """CheckpointError where a weight that learns is NaN or infinite. What does not learn may be: a mask is."""
    for name in names:
        tensor = tensors.get(name, torch.zeros(()))
        if (tensor.is_floating_point() or tensor.is_complex()) and not is_finite([tensor]):
            raise CheckpointError(f"{file}: damaged: {name} holds numbers that are not finite")


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite, with one wait for the device. float8, which torch cannot ask, by float32."""
    result = [(x if x.element_size() > 1 else x.float()).isfinite().all() for x in tensors]
    return bool(torch.stack([each.to(result[0].device) for each in result]).all()) if result else True


def _moments(file: Path, tensors: Tensors) -> dict[str, Tensors]:
    """The optimiser's states by parameter name. CheckpointError: one is NaN, or the random state has a wrong form."""
    moments: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        owner, _, key = rest.rpartition("/")  # a parameter's name may have slashes, a key has none
        if kind == "optimizer":
            if tensor.is_floating_point() and tensor.float().isnan().any():
                raise CheckpointError(f"{file}: damaged: {key} of {owner} holds NaN")
            moments.setdefault(owner, {})[key] = tensor
    wanted, found = torch.get_rng_state(), tensors.get("random/torch/cpu")
    if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
        kind = "none" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise CheckpointError(f"{file}: expected torch's random state, uint8 {tuple(wanted.shape)}, found {kind}")
    return moments


def _state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    """What `optimizer` keeps of a parameter, seen on one of its kind that has taken a step."""
    probe = torch.zeros(1, requires_grad=True)
    probe.grad = torch.zeros(1)
    kind: Any = type(optimizer)
    other = kind([{**optimizer.param_groups[0], "params": [probe]}])
    other.step()
    return {key for key, value in other.state[probe].items() if value is not None}


def _training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    tensors = {"random/torch/cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["random/torch/cuda"] = torch.cuda.get_rng_state(device)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            elif value is not None:
                raise TypeError(f"{key} of {name} is a {type(value).__name__}: a checkpoint holds tensors only")
    return tensors


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
