"""Hyper-parameters by grid or random search (optuna), and scores on few data by k-fold validation (scikit-learn).

Examples:
    tileformer search pairs --data FILE.tsv --config FILE.toml --trials 20

The file's table [search] says what to try: `"settings.lr" = { low = 1e-4, high = 1e-2, log = true }` is a range,
`"model.d_model" = [64, 128, 256]` a list; where all are lists and no --trials is given, each combination is tried.
Finished trials are kept in the output folder: a search that was stopped goes on.
"""

import argparse
import hashlib
import itertools
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tileformer import arguments
from tileformer.extras import optional_import
from tileformer.files import PathLike, quote
from tileformer.training import overrides, process
from tileformer.training.recipes import RECIPES, recipe

Objective = Callable[[dict[str, Any]], float]
Score = Callable[[Sequence[int], Sequence[int]], float]
Space = Mapping[str, Sequence[Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tileformer search`: those of `tileformer train RECIPE`, and how many choices to try."""
    recipes = parser.add_subparsers(dest="recipe", metavar="RECIPE", help="what to train")
    for value in RECIPES.values():
        one = recipes.add_parser(value.name, help=value.about.splitlines()[0].partition(": ")[2])
        recipe.add_arguments(one, value)
        one.add_argument("--trials", type=arguments.COUNT, metavar="N", help="random choices (default: all of lists)")


def main(args: argparse.Namespace) -> int:
    """Print the trials, best first, and the words that train the best. ValueError: nothing to search, or wrong data."""
    if args.recipe is None:
        raise ValueError(f"no recipe given; there is: {', '.join(RECIPES)}")
    process.require_single()
    _, table = overrides.read(args.config, args.set)
    space = {name: _range(name, given) for name, given in table.items()}
    if not space:
        raise ValueError("nothing to search: give --config FILE with a table [search]")
    args.output = args.output / "search" if args.output.name != "search" else args.output
    with process.lock(args.output):
        kept = args.output / "trials.sqlite"
        torch.set_num_threads(args.threads)

        def objective(parameters: dict[str, Any]) -> float:
            loss = recipe.trial(RECIPES[args.recipe], args, parameters)
            print(f"{loss:.4f}  {_words(parameters)}", flush=True)
            return loss

        if args.trials is None and all(isinstance(values, list) for values in space.values()):
            trials = grid_search(objective, space, storage=kept)
        else:
            trials = random_search(objective, space, args.trials or 20, seed=args.seed, storage=kept)
    print("best first:")
    for trial in trials[:10]:
        print(f"  {trial.value:.4f}  {_words(trial.parameters)}")
    return 0


def _words(parameters: Mapping[str, Any]) -> str:
    return " ".join(f"--set {name}={value}" for name, value in parameters.items())


def _range(name: str, given: Any) -> Any:
    """A list, or a range as `random_search` takes it."""
    if isinstance(given, list) and given:
        return given
    if isinstance(given, dict) and given.keys() <= {"low", "high", "log"} and {"low", "high"} <= given.keys():
        low, high = given["low"], given["high"]
        if all(isinstance(x, int | float) for x in (low, high)) and low < high and (low > 0 or not given.get("log")):
            return (low, high, "log") if given.get("log") else (low, high)
    raise ValueError(f"search {name}: expected a list, or {{ low = 1, high = 2, log = true }}, got {quote(given)}")


@dataclass(frozen=True)
class Trial:
    """One choice of parameters and what the objective made of it: lower is better, infinite when training diverged."""

    parameters: dict[str, Any]
    value: float


def grid_search(objective: Objective, space: Space, *, storage: PathLike | None = None) -> list[Trial]:
    """Try every combination of the values that `space` lists for each name; returns the trials, best first.

    objective: parameters to a loss (train, then return the valid loss); one that diverges counts as infinite. storage:
    an SQLite file that keeps every trial; a search that was stopped goes on from it, and finished trials do not run
    again. Raises ValueError when optuna is missing or a name has no values.
    """
    lists = {name: list(values) for name, values in space.items()}
    points = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    if not space or not points:
        raise ValueError(f"expected names with at least one value each to try, got {space}")
    for name, values in lists.items():
        if storage is not None and (odd := [x for x in values if not isinstance(x, str | int | float | None)]):
            raise ValueError(f"{name}: a file keeps numbers and strings, not {odd[0]!r}: search without storage")
    study = _study(f"grid {lists}", storage)
    while left := [point for point in points if point not in [trial.params for trial in _finished(study)]]:
        study.enqueue_trial(left[0])
        _try(study, 0, objective, lists)
    return _ranked(study)


def random_search(
    objective: Objective, space: Space, trials: int, *, seed: int = 0, storage: PathLike | None = None
) -> list[Trial]:
    """Try `trials` random choices (Bergstra and Bengio 2012); the rest as `grid_search`.

    space: by name a list of values, or a range as a tuple: (low, high) of two ints or floats, both included, or
    (low, high, "log") to draw evenly in the logarithm. The n-th choice follows from `seed` and n alone.
    """
    study = _study(f"random {space} {seed}", storage)
    while (number := len(_finished(study))) < trials:
        _try(study, random.Random(f"{seed}/{number}").getrandbits(32), objective, space)
    return _ranked(study)


def cross_validate(score: Score, labels: Sequence[Any], k: int = 5, *, seed: int = 0) -> tuple[float, ...]:
    """The scores of k folds: train on all rows but a fold, test on that; every class is spread evenly over the folds.

    score: (row numbers to train on, row numbers to test on) to a figure. labels: the class of each row.
    Raises ValueError when scikit-learn is missing, k < 2, there is one class only, or one has fewer than k rows.
    """
    folds = optional_import("sklearn.model_selection").StratifiedKFold
    counts = Counter(labels)
    if k < 2 or len(counts) < 2:
        raise ValueError(f"expected at least 2 folds and 2 classes, got k={k} and classes {sorted(counts)}")
    rarest, rows = counts.most_common()[-1]
    if rows < k:
        raise ValueError(f"class {rarest!r} has {rows} rows, fewer than the {k} folds: lower k")
    splits = folds(k, shuffle=True, random_state=seed).split(labels, labels)
    return tuple(score(train.tolist(), test.tolist()) for train, test in splits)


def _study(what: str, storage: PathLike | None) -> Any:
    """The study of exactly this search, new or continued: one file can hold several."""
    optuna = optional_import("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = None if storage is None else f"sqlite:///{os.fspath(storage)}"
    name = hashlib.sha256(what.encode()).hexdigest()[:16]
    return optuna.create_study(storage=url, study_name=name, load_if_exists=True, direction="minimize")


def _finished(study: Any) -> list[Any]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def _try(study: Any, seed: int, objective: Objective, space: Space) -> None:
    """One trial. An error or a kill leaves it unfinished, and the next search takes its place.

    optuna's GridSampler is of no use here: it wants to stop a loop of optuna's own, where an error finishes a trial.
    """
    optuna = optional_import("optuna")
    study.sampler = optuna.samplers.RandomSampler(seed)
    trial = study.ask()
    parameters: dict[str, Any] = {}
    for name, values in space.items():
        if isinstance(values, list):
            parameters[name] = trial.suggest_categorical(name, values)
        else:
            low, high, *log = values
            suggest = trial.suggest_int if isinstance(low, int) and isinstance(high, int) else trial.suggest_float
            parameters[name] = suggest(name, low, high, log=log == ["log"])
    try:
        value = objective(parameters)
    except FloatingPointError:
        value = math.nan
    if math.isfinite(value):
        study.tell(trial, value)
    else:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _ranked(study: Any) -> list[Trial]:
    result = [Trial(trial.params, math.inf if trial.value is None else trial.value) for trial in _finished(study)]
    return sorted(result, key=lambda trial: trial.value)
