"""Scores of a classifier and of a language model, with intervals: scikit-learn and scipy compute, this file names.

Needs the `finetune` extra (`pip install "tileformer[finetune]"`). Classes are numbers 0 to K - 1; `names` says what
they are called, in that order.
"""

import csv
import math
from collections.abc import Sequence
from typing import Any

import numpy

from tileformer.extras import optional_import
from tileformer.files import PathLike

Interval = tuple[float, float]
Classes = Sequence[int]
Names = Sequence[str]


def classification(true: Classes, predicted: Classes, names: Names) -> dict[str, Any]:
    """Accuracy; precision, recall and F1 as `macro` (mean of classes), `micro` (all decisions) and by class name.

    A class that is never predicted has precision 0, one without examples recall 0; one that has neither is left out of
    `macro`, as scikit-learn does. `support`: examples of the class.
    Raises ValueError when the two lengths differ, nothing is given, or a number has no name.
    """
    _check(true, predicted, len(names))
    score = optional_import("sklearn.metrics").precision_recall_fscore_support
    options: dict[str, Any] = {"zero_division": 0}
    result: dict[str, Any] = {"accuracy": float(numpy.equal(true, predicted).mean()), "examples": len(true)}
    for average in ("macro", "micro"):
        values = score(true, predicted, average=average, **options)[:3]
        result[average] = dict(zip(("precision", "recall", "f1"), map(float, values), strict=True))
    every = score(true, predicted, average=None, labels=range(len(names)), **options)
    rows = zip(*(column.tolist() for column in every), strict=True)
    keys = ("precision", "recall", "f1", "support")
    result["classes"] = {name: dict(zip(keys, row, strict=True)) for name, row in zip(names, rows, strict=True)}
    return result


def confusion(true: Classes, predicted: Classes, classes: int) -> numpy.ndarray:
    """Counts (K, K) int64: row = true class, column = predicted class."""
    _check(true, predicted, classes)
    return optional_import("sklearn.metrics").confusion_matrix(true, predicted, labels=range(classes))


def perplexity(nats: float) -> float:
    """exp of a mean cross-entropy in nats a token; inf where that overflows."""
    return math.exp(nats) if nats < 709 else math.inf


def bootstrap(true: Classes, predicted: Classes, resamples: int = 2000, seed: int = 0) -> Interval:
    """95 % percentile interval of the accuracy, over resamples of the examples.

    It says how far the figure would move with other test texts, not with another training seed (`over_seeds`).
    Raises ValueError for fewer than two examples, or lengths that differ.
    """
    _check(true, predicted, 1 + max(*true, *predicted) if len(true) else 1)
    if len(true) < 2:
        raise ValueError(f"an interval needs at least 2 examples, got {len(true)}")
    right = (numpy.equal(true, predicted),)
    options: dict[str, Any] = {"vectorized": True, "method": "percentile", "batch": 100}
    stats = optional_import("scipy.stats")
    interval = stats.bootstrap(right, numpy.mean, n_resamples=resamples, rng=seed, **options).confidence_interval
    if interval.low == interval.high:  # all right or all wrong: resamples know nothing else, Wilson's does
        interval = stats.binomtest(int(right[0].sum()), len(true)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean of runs that differ in their seed, and the half width of its 95 % Student interval (nan for one run)."""
    mean = float(numpy.mean(values))
    if len(values) < 2:
        return mean, math.nan
    error = float(numpy.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(optional_import("scipy.stats").t.ppf(0.975, len(values) - 1)) * error


def errors_csv(
    path: PathLike, texts: Names, true: Classes, predicted: Classes, probability: Sequence[float], names: Names
) -> int:
    """Write every wrong prediction as `true,predicted,probability,text`, the most confident first; returns how many.

    UTF-8 with a byte order mark, by which spreadsheets know it.
    """
    _check(true, predicted, len(names))
    rows = [row for row in zip(true, predicted, probability, texts, strict=True) if row[0] != row[1]]
    rows.sort(key=lambda row: -row[2])
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("true", "predicted", "probability", "text"))
        writer.writerows((names[a], names[b], f"{share:.4f}", text) for a, b, share, text in rows)
    return len(rows)


def _check(true: Classes, predicted: Classes, classes: int) -> None:
    if len(true) != len(predicted) or not len(true):
        raise ValueError(f"expected one prediction for each example, got {len(predicted)} for {len(true)}")
    low, high = min(*true, *predicted), max(*true, *predicted)
    if low < 0 or high >= classes:
        raise ValueError(f"class numbers must be in 0..{classes - 1}, found {low} to {high}")
