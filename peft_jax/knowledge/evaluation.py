"""What an edited model says: CounterFact's scores, and how fluent it is."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.core.bind import bound_of
from peft_jax.core.sharding import fetch
from peft_jax.data import evaluation_batches, unpadded
from peft_jax.knowledge.requests import Edit, EditRows, edit_rows


def answer_log_probs(
    apply: Callable[..., Any],
    params: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    batch: int = 64,
) -> np.ndarray:
    """[N] mean log-probability of each answer's tokens after its prompt, in nats."""
    return -_by_rows(answer_nll, apply, params, edit_rows(tokenizer, prompts, answers), batch)


def answers_said(
    apply: Callable[..., Any],
    params: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    batch: int = 64,
) -> np.ndarray:
    """[N] whether the model goes on with each answer: each of its tokens is the likeliest."""
    return _by_rows(_said, apply, params, edit_rows(tokenizer, prompts, answers), batch)


def _by_rows(of: Any, apply: Any, params: Any, rows: EditRows, batch: int) -> np.ndarray:
    """[N] what `of` says of each row, `batch` at a time, those of like length together."""
    apply = bound_of(apply)
    run = apply.program(of)
    order = np.argsort((rows.segment_ids > 0).sum(1), kind="stable")
    sorted_rows, count = EditRows(*(x[order] for x in rows)), len(order)
    parts = (
        unpadded(EditRows(**part)) for part in evaluation_batches(sorted_rows, min(batch, count))
    )
    return np.concatenate([fetch(run(apply, params, part)) for part in parts])[:count][
        np.argsort(order)
    ]


def _said(apply: Any, params: Any, rows: EditRows) -> jax.Array:
    return all_likeliest(
        apply(params, rows.tokens, segment_ids=rows.segment_ids), rows.targets, rows.weights
    )


def all_likeliest(
    logits: jax.Array, targets: jax.Array | np.ndarray, weights: jax.Array | np.ndarray
) -> jax.Array:
    """[B] whether each of a row's targets [B, T] that weighs anything is the likeliest token, given
    logits [B, T, V].
    """
    return ((logits.argmax(-1) == targets) | (weights == 0)).all(-1)


def answer_nll(apply: Callable[..., Any], params: Any, rows: EditRows) -> jax.Array:
    """[N] mean negative log-likelihood of each row's answer, in nats."""
    logits = apply(params, rows.tokens, segment_ids=rows.segment_ids).astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets) * rows.weights
    return nll.sum(-1) / jnp.maximum(jnp.asarray(rows.weights).sum(-1), 1.0)


def edit_scores(
    apply: Callable[..., Any],
    params: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    batch: int = 64,
) -> dict[str, float]:
    """CounterFact's scores (Meng et al. 2022, section 3.4), shares in [0, 1].

    `efficacy` and `paraphrase`: how often the target is likelier than what was true, after the
    edited prompt and after others that ask the same; `neighbourhood`: how often what is true stays
    likelier than the target after prompts about others; `score`: their harmonic mean, of those that
    the edits have prompts for. `target` is the mean probability of the target's tokens;
    `portability` the share of questions one step further that are answered (Yao et al. 2023,
    arXiv:2305.13172). Edits without `true` count for the last two alone; raises ValueError where no
    edit has one.
    """
    known = [e for e in edits if e.true]
    if not known:
        raise ValueError("no edit says what was true before, which the scores compare with")
    apply = bound_of(apply)
    compare = functools.partial(_likelier, apply, params, tokenizer, batch)
    asked = {
        "efficacy": [(e.question, e.target, e.true) for e in known],
        "paraphrase": [(p, e.target, e.true) for e in known for p in e.paraphrases],
        "neighbourhood": [(p, e.true, e.target) for e in known for p in e.neighbours],
    }
    scores = {name: compare(triples) for name, triples in asked.items() if triples}
    scores["score"] = len(scores) / sum(1.0 / max(s, 1e-9) for s in scores.values())
    log_probs = answer_log_probs(
        apply,
        params,
        tokenizer,
        [e.question for e in edits],
        [e.target for e in edits],
        batch=batch,
    )
    scores["target"] = float(np.exp(log_probs).mean())
    if hops := [hop for e in edits for hop in e.portability]:
        questions, answers = zip(*hops, strict=True)
        scores["portability"] = float(
            answers_said(apply, params, tokenizer, questions, answers, batch).mean()
        )
    return scores


def _likelier(
    apply: Any, params: Any, tokenizer: Any, batch: int, triples: Sequence[tuple[str, str, str]]
) -> float:
    """The share of (prompt, wanted, other) in which the wanted answer is the likelier one."""
    prompts, wanted, other = zip(*triples, strict=True)
    of = functools.partial(answer_log_probs, apply, params, tokenizer, prompts, batch=batch)
    return float(np.mean(of(wanted) > of(other)))


def fluency(texts: Sequence[str]) -> float:
    """Mean entropy in bits of the texts' pairs and triples of words, weighted 2/3 and 4/3 as ROME's
    evaluation does; texts that repeat themselves have little.
    """

    def grams(words, n):
        return Counter(zip(*(words[i:] for i in range(n)), strict=False))

    def of(words):
        return (2 / 3 * _entropy(grams(words, 2)) + 4 / 3 * _entropy(grams(words, 3))) / 2

    return float(np.mean([of(text.split()) for text in texts]))


def _entropy(counts: Counter[Any]) -> float:
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0
