"""Knowledge in the loss: penalties against NumPy, tables from facts and lexicons, and their effect
in a step.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.data import Record, encode, fit, pack
from peft_jax.knowledge.constraints import (
    constrained,
    expectation_loss,
    formula_loss,
    objects_of,
    prior_loss,
    read_lexicon,
    semantic_loss,
)
from peft_jax.objectives.reading import cross_entropy
from peft_jax.objectives.tokens import TOKENS

rng = np.random.default_rng(0)


def test_semantic_loss_is_the_logarithm_of_the_allowed_probability():
    logits, allowed = rng.normal(size=(3, 4, 9)) * 5, rng.random((3, 4, 9)) < 0.5
    allowed[..., 0] = True
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = semantic_loss(jnp.asarray(logits), jnp.asarray(allowed))
    np.testing.assert_allclose(found, -np.log((p * allowed).sum(-1)), rtol=1e-5, atol=1e-6)
    assert np.isfinite(
        np.asarray(
            jax.grad(lambda x: semantic_loss(x, jnp.asarray(allowed)).sum())(jnp.asarray(logits))
        )
    ).all()


def test_any_formula_is_a_weighted_model_count():
    """Exactly one of three, by enumeration (Xu et al. 2018, equation 1)."""
    odds = rng.normal(size=(5, 3))
    worlds = np.asarray([w for w in itertools.product([False, True], repeat=3) if sum(w) == 1])
    p = 1 / (1 + np.exp(-odds))
    count = sum(np.where(w, p, 1 - p).prod(-1) for w in worlds)
    np.testing.assert_allclose(
        formula_loss(jnp.asarray(odds), jnp.asarray(worlds)), -np.log(count), rtol=1e-5
    )


def test_priors_and_expectations():
    logits, prior = rng.normal(size=(4, 6)), np.asarray([0.5, 0.5, 0, 0, 0, 0])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = (prior[:2] * np.log(prior[:2] / p[:, :2])).sum(-1)
    np.testing.assert_allclose(
        prior_loss(jnp.asarray(logits), jnp.asarray(prior)), wanted, rtol=1e-5
    )
    features, least = np.eye(6)[:, :2], np.asarray([0.9, 0.0])
    short = np.maximum(least - p.mean(0)[:2], 0) ** 2
    np.testing.assert_allclose(
        expectation_loss(jnp.asarray(logits), features, least), short, rtol=1e-5, atol=1e-7
    )


class Words:
    """A tokenizer of words."""

    eos_token_id = None

    def __init__(self):
        self.ids = {}

    def __call__(self, text, **_):
        return {"input_ids": [self.ids.setdefault(w, len(self.ids)) for w in text.split()]}


def test_rules_are_about_the_first_token_of_the_object():
    tokenizer = Words()
    facts = [
        Record({"subject": s, "relation": r, "object": o}, s)
        for s, r, o in (("a", "x", "p q"), ("b", "y", "s"), ("c", "x", "t"))
    ]
    relations, allowed = objects_of(facts, tokenizer, 8)
    assert relations == ["x", "y"]

    def of(words):
        return {tokenizer.ids[w] for w in words}

    assert [set(np.flatnonzero(row)) for row in allowed] == [of("pt"), of("s")]
    records = [
        Record({"prompt": "a is", "completion": "p q", "rule": 1}, ""),
        Record({"prompt": "b", "completion": "s", "rule": 2}, ""),
    ]
    rows = pack(fit(encode(records, tokenizer, "facts"), 8, "facts", "stop"), 8)
    assert [int(t) for t in rows.targets[rows.rules == 1]] == [tokenizer.ids["p"]]
    assert [int(t) for t in rows.targets[rows.rules == 2]] == [tokenizer.ids["s"]]
    batch = {n: jnp.asarray(x) for n, x in rows._asdict().items()}
    table = jax.random.normal(jax.random.key(0), (16, 16))

    def apply(params, tokens, **_):
        return params[tokens]

    def run(key, **tables):
        return constrained(TOKENS, tables, apply, table, batch, key)

    plain, _ = cross_entropy(TOKENS, apply, table, batch, None)
    allowed = np.pad(allowed, [(0, 0), (0, 8)])
    loss, metrics = run(jax.random.key(0), allowed=(allowed, 0.5))
    p = np.asarray(jax.nn.softmax(table, -1))
    wanted = np.mean(
        [
            -np.log(p[tokenizer.ids[w]][row].sum())
            for w, row in (("is", allowed[0]), ("b", allowed[1]))
        ]
    )
    np.testing.assert_allclose(metrics["allowed"], wanted, rtol=1e-5)
    np.testing.assert_allclose(loss, plain + 0.5 * wanted, rtol=1e-5)
    np.testing.assert_allclose(
        run(None, allowed=(allowed, 0.5))[0], plain
    )  # evaluation measures the data alone


def test_a_lexicon_is_read_by_line(tmp_path):
    file = tmp_path / "l.tsv"
    file.write_text("run\tVERB\t3\nrun\tNOUN\ncat\tNOUN\n")
    words, priors = read_lexicon(file, ["NOUN", "VERB"])
    assert words == ["run", "cat"]
    np.testing.assert_allclose(priors, [[0.25, 0.75], [1, 0]])
    for text, message in (
        ("run\n", "l.tsv:1: expected word<TAB>label"),
        ("\ncat\tVERV\n", "l.tsv:2: the label 'VERV'"),
        ("", "empty"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_lexicon(file, ["NOUN", "VERB"])
