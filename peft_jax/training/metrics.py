"""Metrics of predicted labels, from scikit-learn, SciPy and seqeval (`pip install
peft-jax[metrics]`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np


def accuracy(predicted: Sequence[int], gold: Sequence[int], classes: int) -> float:
    """The share of labels that are right."""
    return float(np.mean(np.asarray(predicted) == np.asarray(gold)))


def f1(predicted: Sequence[int], gold: Sequence[int], classes: int) -> float:
    """F1 of the second of two `classes` (as GLUE has it), or the mean over the labels that are
    predicted or right.

    scikit-learn's `f1_score`, binary or macro by how many classes there are, whichever of them a
    sample holds.
    """
    average = "binary" if classes == 2 else "macro"
    return float(_sklearn().f1_score(gold, predicted, average=average, zero_division=0.0))


def matthews(predicted: Sequence[int], gold: Sequence[int], classes: int) -> float:
    """Matthews' correlation coefficient."""
    return float(_sklearn().matthews_corrcoef(gold, predicted))


def pearson(predicted: Sequence[float], gold: Sequence[float]) -> float:
    """Pearson's correlation coefficient."""
    from scipy.stats import pearsonr

    return float(cast("float", pearsonr(predicted, gold)[0]))


def spearman(predicted: Sequence[float], gold: Sequence[float]) -> float:
    """Spearman's rank correlation coefficient."""
    from scipy.stats import spearmanr

    return float(cast("float", spearmanr(predicted, gold)[0]))


def seqeval(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> float:
    """F1 of the spans that tags in the IOB notation mark, as CoNLL counts them."""
    try:
        from seqeval.metrics import f1_score
    except ImportError as error:
        raise ValueError(
            "the metric seqeval needs seqeval: pip install peft-jax[metrics]"
        ) from error
    options: dict[str, Any] = {"zero_division": 0}  # annotated as text
    score = f1_score([list(x) for x in gold], [list(x) for x in predicted], **options)
    return float(cast("float", score))


def answer_exact_match(predicted: str, answers: Sequence[str]) -> float:
    """Whether an answer is one of these, but for case, articles and punctuation (SQuAD's)."""
    return float(any(_plain(predicted) == _plain(a) for a in answers))


def answer_f1(predicted: str, answers: Sequence[str]) -> float:
    """The best F1 of an answer's words against one of these (SQuAD's)."""

    def one(answer: str) -> float:
        mine, theirs = _plain(predicted).split(), _plain(answer).split()
        if not mine or not theirs:
            return float(mine == theirs)
        common = sum((Counter(mine) & Counter(theirs)).values())
        return 2 * common / (len(mine) + len(theirs))

    return max(map(one, answers))


def _plain(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ValueError(
            "F1 and Matthews' correlation need scikit-learn: pip install peft-jax[metrics]"
        ) from error
    return metrics


OF_LABELS: dict[str, Callable[..., float]] = {  # of predicted, gold and the number of classes
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
}
OF_NUMBERS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "pearson": pearson,
    "spearman": spearman,
}
OF_ANSWERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": answer_exact_match,
    "f1": answer_f1,
}
