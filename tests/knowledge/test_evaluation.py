"""Scores of edits against their definitions, fluency, causal tracing."""

import functools
import math

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax.knowledge.evaluation import answer_log_probs, answers_said, edit_scores, fluency
from peft_jax.knowledge.requests import Edit
from peft_jax.knowledge.tracing import plot_trace, trace
from tests.reference import relative_error


@pytest.fixture(scope="module")
def setup(tiny_folder):
    model, params = peft_jax.load(tiny_folder)
    return model, params, peft_jax.load_tokenizer(tiny_folder)


@functools.cache
def _forward(model):
    return jax.jit(peft_jax.bind(model))


def log_prob(model, params, tokenizer, prompt, answer):
    """Mean log-probability of the answer's tokens, one text at a time."""
    n, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {answer}")["input_ids"]
    ends = ids[-1] == tokenizer.eos_token_id
    ids, n = (
        ids[: len(ids) - ends],
        n - (tokenizer(prompt)["input_ids"][-1] == tokenizer.eos_token_id),
    )
    padded = np.asarray(
        [ids + [0] * (24 - len(ids))]
    )  # a causal model does not see what comes after
    logits = np.asarray(_forward(model)(params, padded)[0], np.float64)[: len(ids)]
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.mean([log[t - 1, ids[t]] for t in range(n, len(ids))])


def test_scores_are_counterfacts(setup):
    model, params, tokenizer = setup
    edits = [
        Edit(
            "The capital of {} is",
            "France",
            "Rome",
            "Paris",
            ("France has its capital in",),
            ("Paris is in", "Lyon is in"),
        ),
        Edit("{} was born in", "Ada", "the morning", "London", (), ("Turing was born in",)),
    ]

    def of(*pair):
        return log_prob(model, params, tokenizer, *pair)

    pairs = [(e.question, e.target) for e in edits]
    found = answer_log_probs(peft_jax.bind(model), params, tokenizer, *zip(*pairs, strict=True))
    assert relative_error(found, [of(*p) for p in pairs]) < 1e-4

    def share(triples):
        return np.mean([of(p, a) > of(p, b) for p, a, b in triples])

    expected = {
        "efficacy": share([(e.question, e.target, e.true) for e in edits]),
        "paraphrase": share([(p, e.target, e.true) for e in edits for p in e.paraphrases]),
        "neighbourhood": share([(p, e.true, e.target) for e in edits for p in e.neighbours]),
    }
    scores = edit_scores(peft_jax.bind(model), params, tokenizer, edits, batch=2)
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value), name
    assert scores["score"] == pytest.approx(3 / sum(1 / max(v, 1e-9) for v in expected.values()))
    assert scores["target"] == pytest.approx(np.mean(np.exp(found)), rel=1e-5)
    with pytest.raises(ValueError, match="no edit says what was true"):
        edit_scores(peft_jax.bind(model), params, tokenizer, [Edit("{} is", "a", "b")])


def test_portability_is_the_share_of_answers_that_are_said(setup):
    model, params, tokenizer = setup
    words = [w for w in (tokenizer.decode([i]).strip() for i in range(300, 4000, 7)) if w.isalpha()]
    logits = jax.jit(peft_jax.bind(model))

    def greedy(text):
        return int(
            np.asarray(logits(params, np.asarray([tokenizer(text)["input_ids"]])))[0, -1].argmax()
        )

    def one(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [
        f"{w} is" for w in words[:200] if len(one(f"{w} is")) == 2
    ]  # of one length, for one program
    told = ((p, tokenizer.decode([greedy(p)])) for p in prompts)
    prompt, answer = next(
        (p, a.strip()) for p, a in told if a[:1] == " " and one(f"{p}{a}")[:-1] == one(p)
    )
    edit = Edit(
        "{} is",
        "Ada",
        "old",
        "new",
        portability=((prompt, answer), (prompt, answer + "s and so on")),
    )
    np.testing.assert_array_equal(
        answers_said(peft_jax.bind(model), params, tokenizer, *zip(*edit.portability, strict=True)),
        [True, False],
    )
    assert edit_scores(peft_jax.bind(model), params, tokenizer, [edit])["portability"] == 0.5


def test_fluency_is_the_entropy_of_pairs_and_triples():
    text = "a b a b a"  # ab ba ab ba; aba bab aba
    pairs, triples = 1.0, -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert fluency([text]) == pytest.approx((2 / 3 * pairs + 4 / 3 * triples) / 2)
    assert fluency(["x x x x x x"]) == 0.0
    assert fluency([text, "x x x x"]) == pytest.approx(fluency([text]) / 2)


def test_what_is_restored_comes_back(setup, tmp_path):
    """With the last token's state after the last layer restored, all is; with a state that blurring
    does not reach, nothing.
    """
    model, params, tokenizer = setup
    fact = Edit("The capital of {} is", "France", "Paris")
    found = trace(model, params, tokenizer, fact, samples=3)
    assert found.restored.shape == (len(found.tokens), 3)
    assert "".join(found.tokens[found.subject[0] : found.subject[1] + 1]).strip() == "France"
    assert abs(found.clean - found.corrupted) > 1e-9
    assert found.restored[-1, -1] == pytest.approx(found.clean, rel=1e-4)
    for early in range(found.subject[0]):  # these tokens have not seen the subject
        np.testing.assert_allclose(found.restored[early], found.corrupted, rtol=1e-4)
    again = trace(
        model, params, tokenizer, Edit("{} lives in Frances, near", "France", "Paris"), samples=3
    )
    assert again.subject[0] == 1  # behind <s>, not inside of Frances
    assert "".join(again.tokens[1 : again.subject[1] + 1]) == "France"
    whole = trace(model, params, tokenizer, fact, what="feed_forward", window=3, samples=3)
    single = trace(model, params, tokenizer, fact, what="feed_forward", samples=3)
    assert not np.allclose(whole.restored, single.restored, rtol=1e-5)
    assert plot_trace([found, whole], tmp_path / "trace.png").stat().st_size > 1000
