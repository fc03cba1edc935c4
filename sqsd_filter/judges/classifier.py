"""Logistic regression on the TF-IDF of a text's words and characters, kept without pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from sqsd_filter.judges.phrases import normalized

# Terms are kept if at least `min_df` texts have them, and of these the `max_features` most frequent.
_COMMON: dict[str, Any] = {"lowercase": False, "sublinear_tf": True}
_KEPT = {"min_df": 2, "max_features": 30_000}
_ANALYZERS: dict[str, dict[str, Any]] = {
    "words": {"analyzer": "word", "ngram_range": (1, 3), "token_pattern": r"[\w']+"},
    "characters": {"analyzer": "char", "ngram_range": (2, 5)},
}
_C = 10.0  # the inverse strength of the L2 penalty
_ITERATIONS = 1000


@dataclass(frozen=True)
class TextClassifier:
    """Logistic regression on f terms, of 1 to 3 words and of 2 to 5 characters, in a text's first `head` characters.

    `coefficients` is (f,). A text is positive if its probability reaches `cut`.
    """

    head: int
    cut: float
    vectorizers: Mapping[str, TfidfVectorizer]
    coefficients: np.ndarray
    bias: float

    @classmethod
    def fit(cls, texts: Sequence[str], positive: Sequence[bool] | np.ndarray, *, head: int) -> TextClassifier:
        """Train with a cut of 0.5. Raises `ValueError` if the texts share no terms, or all have the same label."""
        heads = [normalized(text)[:head] for text in texts]
        vectorizers = {name: TfidfVectorizer(**how, **_COMMON, **_KEPT) for name, how in _ANALYZERS.items()}
        terms_nf = hstack([vectorizer.fit_transform(heads) for vectorizer in vectorizers.values()], format="csr")
        model = LogisticRegression(C=_C, max_iter=_ITERATIONS).fit(terms_nf, np.asarray(positive, dtype=bool))
        return cls(head, 0.5, vectorizers, model.coef_[0], float(model.intercept_[0]))

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """The probability that each text is positive (n,)."""
        if not texts:
            return np.zeros(0)
        heads = [normalized(text)[: self.head] for text in texts]
        terms_nf: csr_matrix = hstack([v.transform(heads) for v in self.vectorizers.values()], format="csr")
        probability_n: np.ndarray = expit(terms_nf @ self.coefficients + self.bias)
        return probability_n

    def positive(self, texts: Sequence[str]) -> np.ndarray:
        """Is each text positive (n,)?"""
        return self.probabilities(texts) >= self.cut

    def settings(self) -> dict[str, Any]:
        """Everything but the arrays, for JSON; the terms of each kind are in the order of their coefficients."""
        terms = {name: v.get_feature_names_out().tolist() for name, v in self.vectorizers.items()}
        return {"head": self.head, "cut": self.cut, **terms}

    def arrays(self) -> dict[str, np.ndarray]:
        """The inverse document frequencies (f,), the coefficients (f,) as "weights", and the bias (1,)."""
        idf_f = np.concatenate([vectorizer.idf_ for vectorizer in self.vectorizers.values()])
        return {"idf": idf_f, "weights": self.coefficients, "bias": np.array([self.bias])}

    @classmethod
    def restored(cls, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TextClassifier:
        """The inverse of `settings` and `arrays`. Raises `ValueError`, `KeyError`, `TypeError` if incomplete."""
        terms = {name: list(settings[name]) for name in _ANALYZERS}
        idf_f, coefficients_f, bias = arrays["idf"], arrays["weights"], arrays["bias"]
        count = sum(map(len, terms.values()))
        if idf_f.shape != (count,) or coefficients_f.shape != (count,) or bias.shape != (1,):
            raise ValueError(f"{count} terms have {idf_f.size} frequencies and {coefficients_f.size} coefficients")
        if not all(isinstance(term, str) for kind in terms.values() for term in kind):
            raise TypeError("a term is not text")
        if not all(np.isfinite(numbers).all() for numbers in (idf_f, coefficients_f, bias)):
            raise ValueError("a number is not finite")
        vectorizers, at = {}, 0
        for name, how in _ANALYZERS.items():
            vectorizers[name] = TfidfVectorizer(vocabulary=terms[name], **how, **_COMMON)
            vectorizers[name].idf_ = idf_f[at : at + len(terms[name])]
            at += len(terms[name])
        return cls(int(settings["head"]), float(settings["cut"]), vectorizers, coefficients_f, float(bias[0]))
