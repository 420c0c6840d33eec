"""Knowledge in the loss: what is allowed, or likely, at a place, as a soft penalty on the predicted
distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.files import numbered_lines
from peft_jax.objectives.reading import (
    Apply,
    Reading,
    cross_entropy,
    logits_width,
    mean_over,
    nll_and_hits,
    over_positions,
    with_head,
)


def semantic_loss(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """[...] -log of the probability that what is `allowed` (boolean [..., V]) comes, given logits
    [..., V].

    The semantic loss (Xu et al. 2018, arXiv:1711.11157, definition 1) of "one of these".
    """
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(
        jnp.where(allowed, logits, -jnp.inf), axis=-1
    )


def formula_loss(log_odds: jax.Array, assignments: jax.Array) -> jax.Array:
    """[...] the semantic loss of any propositional formula over n variables whose satisfying
    `assignments` (boolean [A, n]) are listed, given log-odds of each variable [..., n] (equation 1
    of Xu et al. 2018).
    """
    on, off = jax.nn.log_sigmoid(log_odds), jax.nn.log_sigmoid(-log_odds)
    each = jnp.where(assignments, on[..., None, :], off[..., None, :]).sum(-1)
    return -jax.nn.logsumexp(each, axis=-1)


def prior_loss(logits: jax.Array, prior: jax.Array) -> jax.Array:
    """[...] KL(prior || predicted) in nats for a `prior` [..., V] that a lexicon gives; zeros in it
    weigh nothing.
    """
    predicted = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return (prior * (jnp.log(jnp.maximum(prior, 1e-30)) - predicted)).sum(-1)


PENALTIES = {"allowed": semantic_loss, "prior": prior_loss}  # by the name of their tables


def expectation_loss(logits: jax.Array, features: jax.Array, least: jax.Array) -> jax.Array:
    """[F] posterior regularisation (Ganchev et al. 2010): how far the mean over all places of the
    expectation of each feature, features [V, F] under logits [..., V], stays below `least` [F],
    squared.
    """
    expected = (
        (jax.nn.softmax(logits.astype(jnp.float32), axis=-1) @ features)
        .reshape(-1, features.shape[-1])
        .mean(0)
    )
    return jnp.square(jnp.maximum(least - expected, 0.0))


def read_lexicon(path: Path, labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(words, priors float32 [W, C]) of a file with lines "word<TAB>label[<TAB>weight]"; a word's
    labels share its weight.

    Raises ValueError naming the line for one that is malformed or has an unknown label.
    """
    if not path.is_file():
        raise FileNotFoundError(f"lexicon {path} does not exist")
    counts: dict[str, np.ndarray] = {}
    for number, line in numbered_lines(path):
        word, *rest = line.split("\t")
        try:
            label, weight = rest[0], float(rest[1]) if len(rest) > 1 else 1.0
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{path}:{number}: expected word<TAB>label or word<TAB>label<TAB>weight"
            ) from error
        if label not in labels or weight <= 0:
            raise ValueError(
                f"{path}:{number}: the label {label!r} with weight {weight:g} is none of "
                f"{', '.join(labels)}"
            )
        counts.setdefault(word, np.zeros(len(labels), np.float32))[list(labels).index(label)] += (
            weight
        )
    if not counts:
        raise ValueError(f"lexicon {path} is empty")
    return list(counts), np.stack([c / c.sum() for c in counts.values()])


def objects_of(facts: Sequence[Any], tokenizer: Any, width: int) -> tuple[list[str], np.ndarray]:
    """(relations, boolean [R, width]): the first tokens of what each relation's objects begin with,
    after a blank.
    """
    found: dict[str, set[str]] = {}
    for fact in facts:
        found.setdefault(fact.value["relation"], set()).add(fact.value["object"])
    allowed = np.zeros((len(found), width), bool)
    for row, objects in zip(allowed, found.values(), strict=True):
        row[
            [
                tokenizer(f" {o}", add_special_tokens=False, verbose=False)["input_ids"][0]
                for o in objects
            ]
        ] = True
    return list(found), allowed


def _penalised(
    head: Any,
    tables: Mapping[str, jax.Array],
    states: jax.Array,
    targets: jax.Array,
    rules: jax.Array,
    rng: Any = None,
) -> dict[str, jax.Array]:
    """nll, hits and penalties [B, T] of states [B, T, D], by rows of the tables."""
    logits = head(states, rng=rng)
    nll, hits = nll_and_hits(logits, targets)
    found = {"nll": nll, "hits": hits}
    for name, table in tables.items():
        rows = jnp.take(table, jnp.maximum(rules - 1, 0), axis=0)
        found[name] = PENALTIES[name](logits, rows)
    return found


def constrained(
    reading: Reading,
    tables: Mapping[str, tuple[Any, float]],
    apply: Apply,
    params: Any,
    batch: dict[str, jax.Array],
    rng: Any,
    *,
    chunk: int | None = None,
) -> Any:
    """The cross-entropy of what `reading` makes of a batch, and the penalties of the rules that
    `batch["rules"]` [B, T] names: 0 for none, and n for row n - 1 of the tables.

    `tables` maps "allowed" (boolean [R, V], `semantic_loss`) and "prior" ([R, V], `prior_loss`) to
    (table, weight). A penalty is a mean over the places with a rule; metrics tell each. In
    evaluation (no `rng`) there are none.
    """
    if rng is None or "rules" not in batch:
        return cross_entropy(reading, apply, params, batch, rng, chunk=chunk)
    rules = batch["rules"]
    batch = reading.view(batch, rng)
    states, head = reading.states(apply, params, batch, rng), reading.head(apply, params, batch)

    arrays = {name: jnp.asarray(table) for name, (table, _) in tables.items()}
    of = with_head(_penalised, head, arrays)
    found = over_positions(
        of, (states, batch["targets"], rules), logits_width(head, states), chunk, rng
    )
    mean = mean_over(batch)
    weights, ruled = batch["weights"].astype(jnp.float32), (rules > 0).astype(jnp.float32)
    penalties = {
        name: mean(jnp.where(rules > 0, found[name], 0.0), ruled, "rules") for name in tables
    }
    loss = mean(found["nll"], weights) + sum(
        weight * penalties[n] for n, (_, weight) in tables.items()
    )
    shared = {"weight": weights.sum(), "rules": ruled.sum()}
    return loss, {
        "weight": weights.sum(),
        "accuracy": mean(found["hits"], weights),
        **penalties,
        "shared": shared,
    }
