"""Readings and objectives of heads: classes of rows and of tokens, answers' ends, numbers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.objectives.objective import NamedObjective
from peft_jax.objectives.reading import (
    Apply,
    Objective,
    Reading,
    as_they_are,
    cross_entropy,
    inputs_of,
)


def _logits(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> jax.Array:
    """A head's logits as states [B, T, C], of one position where there is one label a row."""
    logits = apply(params, batch["tokens"], rng=rng, **inputs_of(batch))
    return logits[:, None] if logits.ndim == 2 else logits


def _labelled(batch: dict[str, jax.Array], rng: Any) -> dict[str, jax.Array]:
    def column(x):
        return x[:, None] if x.ndim == 1 else x

    return {**batch, "targets": column(batch["labels"]), "weights": column(batch["weights"])}


def _ends(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> jax.Array:
    """Scores of each token as an answer's first and as its last, [B, 2, T]; padding has no part."""
    logits = apply(params, batch["tokens"], rng=rng, **inputs_of(batch)).astype(jnp.float32)
    return jnp.where(batch["segment_ids"][..., None] > 0, logits, -1e9).swapaxes(1, 2)


def _answered(batch: dict[str, jax.Array], rng: Any) -> dict[str, jax.Array]:
    weights = jnp.broadcast_to(
        0.5 * batch["weights"][:, None], batch["labels"].shape
    )  # its two ends weigh as one
    return {**batch, "targets": batch["labels"], "weights": weights}


LABELS = Reading(_labelled, _logits, lambda apply, params, batch: as_they_are)
ANSWERS = Reading(_answered, _ends, LABELS.head)


def squared_error(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> Any:
    """Mean squared error of numbers [B], given logits [B, 1]."""
    weights = batch["weights"].astype(jnp.float32)
    values = apply(params, batch["tokens"], rng=rng, **inputs_of(batch))[:, 0]
    error = jnp.square(values - batch["labels"]) * weights
    return error.sum() / jnp.maximum(weights.sum(), 1e-9), {"weight": weights.sum()}


def _label_cross_entropy(reading: Reading, chunk: int | None = None) -> Objective:
    return functools.partial(cross_entropy, reading, chunk=chunk)


def _squared_error(reading: None) -> Objective:
    return squared_error


OBJECTIVE = (
    NamedObjective(
        name="label_cross_entropy",
        tasks=("sequence_classification", "token_classification", "question_answering"),
        make=_label_cross_entropy,
        follows="the mean negative log-likelihood of the labels that count",
    ),
    NamedObjective(
        name="squared_error",
        tasks=("sequence_classification",),
        make=_squared_error,
        follows="the mean squared error of the rows that count",
        reads=False,
    ),
)
