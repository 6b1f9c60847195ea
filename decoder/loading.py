"""load_matching: start a model from the weights of another one, and say what came of every tensor."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoadReport:
    """What `load_matching` did, by name: ``skipped`` are the file's names, the others the model's.

    ``loaded`` came whole, ``resized`` by the rows that both have, ``initialised`` kept what the model had; ``why`` says
    it for each skipped one.
    """

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    resized: tuple[str, ...]
    initialised: tuple[str, ...]
    why: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        named = {kind: getattr(self, kind) for kind in ("loaded", "resized", "skipped", "initialised")}
        lines = [", ".join(f"{len(names)} {kind}" for kind, names in named.items())]
        for kind in ("resized", "skipped", "initialised"):
            lines += [f"  {kind} {name}{': ' * (name in self.why)}{self.why.get(name, '')}" for name in named[kind]]
        return "\n".join(lines)


def load_matching(
    model: nn.Module,
    state: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    rename: Mapping[str, str] | None = None,
    rows: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Copy into ``model`` every tensor of ``state`` whose name and shape fit, in the model's dtype.

    state: tensors by name, a safetensors file, or the folder of one checkpoint (its ``model.safetensors``).
    rename: beginnings of the state's names and what takes their place; of two that fit, the longer.
        ``{"": "backbone."}`` puts a language model into a classifier.
    rows: for a tensor of the model whose first axis is a vocabulary, int64 (rows of the model,): the row of the state's
    tensor for each, or -1 for one that stays as it is; `common_rows` makes it.

    Raises ValueError, before anything is copied, when nothing fits, when ``rows`` names no tensor of the two or does
    not fit them, for a model on the meta device, or without the safetensors package where a file is read;
    FileNotFoundError without the file."""
    if not isinstance(state, Mapping):
        state = _read(Path(state))
    own = {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    rows = dict(rows or {})
    if any(x.is_meta for x in own.values()):
        raise ValueError("the model lies on the meta device, which holds no values: model.to_empty(device=...) first")
    renamed: dict[str, str] = {}
    for name in state:
        target = _renamed(name, rename or {})
        if target in renamed:
            raise ValueError(f"rename= gives {renamed[target]!r} and {name!r} the same name, {target!r}")
        renamed[target] = name
    if absent := [name for name in rows if name not in own or name not in renamed]:
        raise ValueError(f"rows={absent[0]!r}: the model and the state must both have a tensor of that name")
    loaded, resized, skipped, why = [], [], [], {}
    for target, name in renamed.items():
        theirs = state[name]
        if target not in own:
            why[name] = f"the model has no {target}"
        elif not isinstance(theirs, Tensor):
            why[name] = f"it is a {type(theirs).__name__}, not a tensor"
        elif theirs.is_complex() and not own[target].is_complex():
            why[name] = f"it is {theirs.dtype}, the model's {own[target].dtype}"
        elif target in rows:
            _check_rows(target, own[target], theirs, rows[target])
            why[target] = f"{int((rows[target] >= 0).sum())} of {len(own[target])} rows"
            resized.append(target)
            continue
        elif own[target].shape != theirs.shape:
            why[name] = f"it is {tuple(theirs.shape)}, the model's {tuple(own[target].shape)}"
        else:
            loaded.append(target)
            continue
        skipped.append(name)
    if not loaded and not resized:
        content = f"{len(state)} tensors, such as {next(iter(state))!r}" if state else "no tensors"
        raise ValueError(
            f"nothing fits {type(model).__name__}, which has {next(iter(own), None)!r}: found {content}; see rename="
        )
    with torch.no_grad():
        for target in loaded:
            own[target].copy_(state[renamed[target]])
        for target in resized:
            kept = rows[target] >= 0
            theirs = state[renamed[target]]
            own[target][kept.to(own[target].device)] = theirs[rows[target][kept].to(theirs.device)].to(own[target])
    # A tied tensor has two names in the model and may have one in a file: it is loaded if either is.
    filled = {id(own[name]) for name in (*loaded, *resized)}
    left = tuple(name for name, tensor in own.items() if id(tensor) not in filled)
    return LoadReport(tuple(loaded), tuple(skipped), tuple(resized), left, why)


def common_rows(old: Sequence[str], new: Sequence[str]) -> Tensor:
    """For each token of the vocabulary ``new``, its row in the vocabulary ``old``, or -1: int64 (len(new),)."""
    positions = {token: row for row, token in enumerate(old)}
    return torch.tensor([positions.get(token, -1) for token in new])


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    fits = [start for start in rename if name.startswith(start)]
    if not fits:
        return name
    start = max(fits, key=len)
    return rename[start] + name[len(start) :]


def _check_rows(name: str, own: Tensor, theirs: Tensor, rows: Tensor) -> None:
    if rows.shape != own.shape[:1] or own.shape[1:] != theirs.shape[1:] or not (rows < len(theirs)).all():
        raise ValueError(
            f"rows={name!r}: {tuple(rows.shape)} rows up to {int(rows.max())} of {tuple(theirs.shape)} do not fill "
            f"{tuple(own.shape)}: one row of the state, or -1, for each of the model's"
        )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError('reading weights needs safetensors: pip install "tileformer[train]"') from None
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected weights in the safetensors format")
    try:
        return load_file(str(file))
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{file}: damaged, or not in the safetensors format ({str(error)[:200]})") from None
