"""Metrics against scikit-learn, hand counts, and what an interval promises."""

import csv
import math

import pytest

from tileformer import extras
from tileformer.training.finetune import metrics

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

TRUE = [0, 0, 0, 0, 1, 1, 1, 2]
PREDICTED = [0, 0, 0, 1, 1, 1, 2, 0]
NAMES = ("bad", "good", "mixed", "silent")  # the last class has no example and is never predicted


def test_classification_by_hand():
    found = metrics.classification(TRUE, PREDICTED, NAMES)
    assert found["accuracy"] == pytest.approx(5 / 8) and found["examples"] == 8
    assert found["classes"]["bad"] == pytest.approx({"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4, "support": 4})
    assert found["classes"]["good"]["f1"] == pytest.approx(2 / 3)
    assert found["classes"]["mixed"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert found["macro"]["f1"] == pytest.approx((3 / 4 + 2 / 3) / 3)  # the silent class is no mistake
    assert found["classes"]["silent"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert found["micro"] == pytest.approx({"precision": 5 / 8, "recall": 5 / 8, "f1": 5 / 8})


def test_precision_is_of_what_was_predicted_and_recall_of_what_is_true():
    found = metrics.classification([0, 0, 0, 1, 2], [0, 1, 1, 1, 1], NAMES)
    assert found["macro"]["precision"] == pytest.approx((1 + 1 / 4) / 3)
    assert found["macro"]["recall"] == pytest.approx((1 / 3 + 1) / 3)
    good = {"precision": 1 / 4, "recall": 1.0, "f1": 2 / 5, "support": 1}
    assert found["classes"]["good"] == pytest.approx(good)


def test_confusion_has_true_classes_as_rows():
    rows = [[3, 1, 0, 0], [0, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]  # the silent class too
    assert metrics.confusion(TRUE, PREDICTED, 4).tolist() == rows


def test_perplexity():
    assert metrics.perplexity(0.0) == 1.0
    assert metrics.perplexity(math.log(72)) == pytest.approx(72)
    assert metrics.perplexity(700.0) == math.exp(700)
    assert metrics.perplexity(710.0) == metrics.perplexity(1e4) == math.inf


def test_bootstrap_interval_is_the_binomial_one_and_repeats():
    true = [0] * 400
    predicted = [0] * 320 + [1] * 80
    low, high = metrics.bootstrap(true, predicted, seed=1)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.006)
    assert metrics.bootstrap(true, predicted, seed=1) == (low, high)
    assert metrics.bootstrap(true, predicted, seed=2) != (low, high)


def test_an_interval_of_no_error_at_all_is_wilsons():
    """z^2 / (n + z^2) below 1: so many right answers are no proof that there is no wrong one."""
    low, high = metrics.bootstrap([1] * 14, [1] * 14)
    assert (low, high) == pytest.approx((1 - 1.959964**2 / (14 + 1.959964**2), 1.0))


def test_the_mean_over_seeds_has_students_interval():
    mean, half = metrics.over_seeds([0.80, 0.82, 0.84])
    assert mean == pytest.approx(0.82)
    assert half == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-5)
    mean, half = metrics.over_seeds([0.8])
    assert mean == 0.8 and math.isnan(half)


def test_errors_are_written_most_confident_first(tmp_path):
    path = tmp_path / "errors.csv"
    texts = ["a", "很好,但是", "c", "d"]
    assert metrics.errors_csv(path, texts, [0, 1, 0, 1], [0, 0, 1, 1], [0.9, 0.6, 0.8, 0.7], NAMES) == 2
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")  # by which a spreadsheet knows the encoding
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [["bad", "good", "0.8000", "c"], ["good", "bad", "0.6000", "很好,但是"]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: metrics.classification([0, 1], [0], NAMES), "got 1 for 2"),
        (lambda: metrics.classification([], [], NAMES), "got 0 for 0"),
        (lambda: metrics.confusion([0, 3], [0, 1], 3), "in 0..2, found 0 to 3"),
        (lambda: metrics.confusion([0, 2], [-1, 1], 3), "in 0..2, found -1 to 2"),
        (lambda: metrics.bootstrap([0], [0]), "at least 2 examples, got 1"),
        (
            lambda: extras.optional_import("no_such_library"),
            "no_such_library is not installed: pip install no_such_library",
        ),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
