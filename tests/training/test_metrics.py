"""Metrics against scikit-learn, SciPy, seqeval and sacrebleu, on random samples and on degenerate
ones.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
from scipy import stats
from seqeval.metrics import f1_score as span_f1

from peft_jax.objectives.reading import nll_and_hits
from peft_jax.training import metrics
from peft_jax.training.evaluate import bleu

SAMPLES = {
    "random": lambda rng, n: (rng.integers(0, n, 40), rng.integers(0, n, 40)),
    "all zeros": lambda rng, n: (np.zeros(9, int), np.zeros(9, int)),
    "nothing predicted": lambda rng, n: (np.zeros(9, int), rng.integers(0, n, 9)),
    "two labels of all": lambda rng, n: (rng.integers(0, 2, 30), rng.integers(0, 2, 30)),
    "one record": lambda rng, n: (np.asarray([n - 1]), np.asarray([0])),
}


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("sample", list(SAMPLES))
def test_labels_are_scored_as_scikit_learn_does(sample, classes):
    predicted, gold = SAMPLES[sample](np.random.default_rng(classes), classes)
    average = "binary" if classes == 2 else "macro"
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(gold, predicted),
        "f1": sklearn.metrics.f1_score(gold, predicted, average=average, zero_division=0.0),
        "matthews": sklearn.metrics.matthews_corrcoef(gold, predicted),
    }
    assert expected.keys() == metrics.OF_LABELS.keys()
    for name, of in metrics.OF_LABELS.items():
        assert of(predicted.tolist(), gold.tolist(), classes) == pytest.approx(expected[name]), name


def test_all_zeros_of_two_classes_have_no_f1():
    assert metrics.f1([0, 0, 0], [0, 0, 0], 2) == 0.0


def test_numbers_are_correlated_as_scipy_does():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(size=20).round(1)
    assert metrics.pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
    assert metrics.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])


@pytest.mark.parametrize("tags", [["O"], ["O", "B-A", "I-A", "B-B", "I-B"]])
def test_spans_are_scored_as_seqeval_does(tags):
    rng = np.random.default_rng(1)

    def rows():
        return [[tags[i] for i in rng.integers(0, len(tags), n)] for n in (3, 8, 1)]

    predicted, gold = rows(), rows()
    assert metrics.seqeval(predicted, gold) == pytest.approx(
        span_f1(gold, predicted, zero_division=0)
    )


def test_bleu_takes_missing_references_as_missing():
    """A reference that is not there is not an empty one: the same as the first one given twice."""
    predictions = ["the cat sat on a mat", "there is a dog in the old garden today"]
    references = [
        ["the cat sat on the mat", "a cat was sitting on the mat for a long while"],
        ["a dog runs in the garden"],
    ]
    twice = [
        ["the cat sat on the mat", "a dog runs in the garden"],
        ["a cat was sitting on the mat for a long while", "a dog runs in the garden"],
    ]
    assert bleu(predictions, references) == pytest.approx(
        sacrebleu.corpus_bleu(predictions, twice).score
    )
    assert bleu(predictions[1:], references[1:]) == pytest.approx(
        sacrebleu.corpus_bleu(predictions[1:], [references[1]]).score
    )


def test_a_tie_is_a_hit_of_the_first_alone():
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 3, (50, 6)).astype(np.float32))
    targets = jnp.asarray(np.random.default_rng(1).integers(0, 6, 50))
    _, hits = nll_and_hits(logits, targets)
    np.testing.assert_array_equal(hits, np.asarray(logits).argmax(-1) == np.asarray(targets))
