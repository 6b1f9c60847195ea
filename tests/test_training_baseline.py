"""The TF-IDF baseline: it learns what n-grams can say, from the training texts alone."""

import numpy
import pytest

from tileformer.training.finetune import baseline

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


def test_two_characters_have_an_order_and_a_class_keeps_its_number():
    probability, _ = baseline.tfidf(["大小", "小大"] * 3, [0, 2] * 3, ["大小", "小大"], classes=3)
    assert probability.argmax(1).tolist() == [0, 2] and not probability[:, 1].any()


@pytest.mark.parametrize("repeats, known", [(1, True), (249, True), (250, False)])
def test_what_one_text_alone_says_counts_among_few(repeats, known):
    texts = ["好", "棒", "差", "糟"] * (repeats - 1) + ["好", "棒", "差", "坏"]
    probability, _ = baseline.tfidf(texts, [1, 1, 0, 0] * repeats, ["坏", ""], classes=2)
    assert bool(probability[0, 0] > probability[1, 0] + 0.01) is known


@pytest.mark.parametrize(
    "texts, labels, message", [(TEXTS, [1], "got 1 for 18"), (TEXTS[:2], [1, 1], "at least 2 classes, got 1")]
)
def test_wrong_input_is_refused(texts, labels, message):
    with pytest.raises(ValueError, match=message):
        baseline.tfidf(texts, labels, ["好"], classes=2)
