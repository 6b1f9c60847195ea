"""The classical baseline every figure stands beside: character TF-IDF (1 to 3 characters) and logistic regression.

It reads no word order beyond three characters and knows nothing before its labels, trains in seconds, and is hard to
beat on short texts: a model that does not pass it has not earned its size.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy

from tileformer.extras import optional_import


def tfidf(
    texts: Sequence[str], labels: Sequence[int], test: Sequence[str], classes: int
) -> tuple[numpy.ndarray, float]:
    """Probabilities (N, K) of `test`, and the CPU seconds of the fit: on (texts, labels) alone, n-gram table included.

    An n-gram counts from its second text on (among fewer than 1,000 texts: from its first). Raises ValueError when the
    labels hold fewer than two classes, or when lengths differ.
    """
    if len(texts) != len(labels):
        raise ValueError(f"expected one label for each text, got {len(labels)} for {len(texts)}")
    if len(set(labels)) < 2:
        raise ValueError(f"a classifier needs examples of at least 2 classes, got {len(set(labels))}")
    linear, text = optional_import("sklearn.linear_model"), optional_import("sklearn.feature_extraction.text")
    start = time.process_time()
    options: dict[str, Any] = {"analyzer": "char", "ngram_range": (1, 3), "sublinear_tf": True}
    vectorizer = text.TfidfVectorizer(min_df=2 if len(texts) >= 1000 else 1, **options)
    model = linear.LogisticRegression(C=4.0, max_iter=1000).fit(vectorizer.fit_transform(texts), labels)
    spent = time.process_time() - start
    probability = numpy.zeros((len(test), classes))
    probability[:, model.classes_] = model.predict_proba(vectorizer.transform(test))
    return probability, spent
