"""Metrics of predicted labels, from scikit-learn, SciPy and seqeval (`pip install peft-jax[metrics]`)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def accuracy(predicted: Sequence[Any], gold: Sequence[Any]) -> float:
    """The share of labels that are right."""
    return float(np.mean(np.asarray(predicted) == np.asarray(gold)))


def f1(predicted: Sequence[Any], gold: Sequence[Any]) -> float:
    """F1: of the second label where there are two (as GLUE has it), else the mean over the labels that occur."""
    metrics = _sklearn()
    names = sorted({*predicted, *gold})
    if len(names) <= 2:
        return float(metrics.f1_score(gold, predicted, pos_label=names[-1], average="binary", zero_division=0.0))
    return float(metrics.f1_score(gold, predicted, average="macro", zero_division=0.0))


def matthews(predicted: Sequence[Any], gold: Sequence[Any]) -> float:
    """Matthews' correlation coefficient."""
    return float(_sklearn().matthews_corrcoef(gold, predicted))


def pearson(predicted: Sequence[float], gold: Sequence[float]) -> float:
    """Pearson's correlation coefficient."""
    from scipy.stats import pearsonr

    return float(pearsonr(predicted, gold)[0])


def spearman(predicted: Sequence[float], gold: Sequence[float]) -> float:
    """Spearman's rank correlation coefficient."""
    from scipy.stats import spearmanr

    return float(spearmanr(predicted, gold)[0])


def seqeval(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> float:
    """F1 of the spans that tags in the IOB notation mark, as CoNLL counts them."""
    try:
        from seqeval.metrics import f1_score
    except ImportError as error:
        raise ValueError("the metric seqeval needs seqeval: pip install peft-jax[metrics]") from error
    return float(f1_score([list(x) for x in gold], [list(x) for x in predicted], zero_division=0))


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
        raise ValueError("F1 and Matthews' correlation need scikit-learn: pip install peft-jax[metrics]") from error
    return metrics


OF_LABELS: dict[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
}
OF_NUMBERS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {"pearson": pearson, "spearman": spearman}
OF_ANSWERS: dict[str, Callable[[str, Sequence[str]], float]] = {"exact_match": answer_exact_match, "f1": answer_f1}
