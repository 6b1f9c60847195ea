"""The TF-IDF baseline: it learns what n-grams can say, from the training texts alone."""

import numpy
import pytest

from tileformer.training import baseline

pytest.importorskip("sklearn")

TEXTS = ["很好用", "真好啊", "好极了", "很差劲", "太差了", "差评"] * 3
LABELS = [1, 1, 1, 0, 0, 0] * 3


def test_it_reads_the_characters_that_decide():
    probability, core_seconds = baseline.tfidf(TEXTS, LABELS, ["好", "差", "好好好书"], classes=3)
    assert probability.argmax(1).tolist() == [1, 0, 1]
    assert probability.shape == (3, 3) and not probability[:, 2].any()  # a class without examples
    numpy.testing.assert_allclose(probability.sum(1), 1)
    assert 0 < core_seconds < 60


def test_the_test_texts_teach_it_nothing():
    """What else stands in the test part changes no probability: idf and table are of the training texts."""
    alone, _ = baseline.tfidf(TEXTS, LABELS, ["好差书"], classes=2)
    among, _ = baseline.tfidf(TEXTS, LABELS, ["好差书", "书书", "差书"], classes=2)
    assert alone[0].tolist() == among[0].tolist()


@pytest.mark.parametrize(
    "texts, labels, message", [(TEXTS, [1], "got 1 for 18"), (TEXTS[:2], [1, 1], "at least 2 classes, got 1")]
)
def test_wrong_input_is_refused(texts, labels, message):
    with pytest.raises(ValueError, match=message):
        baseline.tfidf(texts, labels, ["好"], classes=2)
