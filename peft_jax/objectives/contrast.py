"""Pairs of texts told from all others of the batch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.models.blocks import mean_of
from peft_jax.objectives.objective import NamedObjective
from peft_jax.objectives.reading import Apply, Objective, nll_and_hits


def contrast(
    apply: Apply,
    params: Any,
    batch: dict[str, jax.Array],
    rng: Any,
    *,
    temperature: float = 0.05,
    same: bool = False,
) -> Any:
    """Cross-entropy of each text's own pair among the batch's, both ways, by the cosine of mean
    hidden states over `temperature` (van den Oord et al. 2018, arXiv:1807.03748; Reimers and
    Gurevych 2019 for the pooling).

    The two texts of a pair have dropout masks of their own, so a text may be its own pair (SimCSE,
    Gao et al. 2021, arXiv:2104.08821). Texts equal to a row's own are no negatives of it, unless
    `same`. A batch in parts is contrasted as a whole, one part's embeddings with gradients at a
    time (GradCache, Gao et al. 2021, arXiv:2101.06983).
    """
    keys = (None, None) if rng is None else jax.random.split(rng)
    sides = [(batch[f"{side}tokens"], batch[f"{side}segment_ids"]) for side in ("", "other_")]
    vectors = [
        embed_texts(apply, params, *texts, key) for texts, key in zip(sides, keys, strict=True)
    ]
    mine = {
        "weights": batch["weights"].astype(jnp.float32),
        "vectors": jnp.stack(vectors, axis=1),
        "texts": jnp.stack([jnp.where(seen > 0, tokens, -1) for tokens, seen in sides], axis=1),
    }
    whole, own = mine, jnp.arange(len(mine["weights"]))
    if "part" in batch:  # the other parts' rows are constants

        def put(all, part):
            return all.at[batch["part"]].set(part).reshape(-1, *part.shape[1:])

        whole, own = jax.tree.map(put, batch["shared"], mine), own + batch["part"] * len(own)
    losses, hits = _contrasted(whole, temperature, same)
    weights = whole["weights"]
    total = jnp.maximum(weights.sum(), 1e-9)
    loss = (losses * weights).sum() / total
    here = (losses * weights)[own].sum() / total
    loss = loss + jax.lax.stop_gradient(
        here - loss
    )  # the gradient is the whole loss's, the value adds up over parts
    metrics = {"weight": mine["weights"].sum(), "accuracy": (hits * weights)[own].sum() / total}
    return loss, {**metrics, "shared": mine}


def _contrasted(
    rows: dict[str, jax.Array], temperature: float, same: bool
) -> tuple[jax.Array, jax.Array]:
    """(loss, whether the first text's pair is the likeliest) [B] of pairs: weights [B], vectors [B,
    2, D], texts [B, 2, T].
    """
    weights, vectors, texts = rows["weights"], rows["vectors"], rows["texts"]
    own = jnp.arange(len(weights))
    scores = (
        jnp.matmul(vectors[:, 0], vectors[:, 1].T, preferred_element_type=jnp.float32) / temperature
    )
    others = weights[:, None] * weights[None] > 0  # rows that pad a batch are no one's pair
    if not same:
        equal = (texts[:, None] == texts[None]).all(-1).any(-1) & ~jnp.eye(len(own), dtype=bool)
        others = others & ~equal
    scores = jnp.where(others, scores, -1e9)
    (loss, hits), (back, _) = (nll_and_hits(s, own) for s in (scores, scores.T))
    return (loss + back) / 2, hits


def embed_texts(
    apply: Apply, params: Any, tokens: jax.Array, segment_ids: jax.Array, rng: Any = None
) -> jax.Array:
    """A vector of length 1 for each text, float32 [B, D]: the mean of its hidden states; zeros
    where it has no token.
    """
    hidden = apply(params, tokens, segment_ids=segment_ids, rng=rng, method="hidden").astype(
        jnp.float32
    )
    mean = mean_of(hidden, segment_ids)
    square = jnp.square(mean).sum(-1, keepdims=True)
    return mean * jax.lax.rsqrt(jnp.maximum(square, 1e-18))  # a norm has no gradient at zero


def _contrast(reading: None, temperature: float = 0.05, same: bool = False) -> Objective:
    return functools.partial(contrast, temperature=temperature, same=same)


OBJECTIVE = NamedObjective(
    name="contrast",
    tasks=("feature_extraction",),
    make=_contrast,
    follows="van den Oord et al. 2018, arXiv:1807.03748; SimCSE, arXiv:2104.08821",
    reads=False,
    example={"temperature": 0.5},
)
