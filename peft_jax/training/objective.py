"""Objectives: pure functions (apply, params, batch, rng) -> (loss, metrics).

`loss` is a mean over what counts in the batch and `metrics["weight"]` says how much that was, so that micro-batches and
evaluation batches can be averaged exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from peft_jax.models.blocks import mean_of
from peft_jax.models.moe import load_balancing_loss

Apply = Callable[..., Any]
Objective = Callable[[Apply, Any, dict[str, jax.Array], Any], tuple[jax.Array, dict[str, jax.Array]]]
_CHUNK_BYTES = 256 * 2**20  # logits larger than this are computed in chunks unless told otherwise


def next_token(
    apply: Apply,
    params: Any,
    batch: dict[str, jax.Array],
    rng: Any,
    *,
    chunk: int | None = None,
    router_loss: float | None = None,
) -> Any:
    """Mean cross-entropy of the next token, in nats, weighted by `batch["weights"]` [B, T].

    Where the model has `hidden` and `unembed`, logits are computed for `chunk` tokens at a time and never stored for the
    whole batch (0: all at once; None: chunks where they would exceed 256 MB in float32). In training (with an `rng`) a mixture
    of experts adds `router_loss` times its load-balancing loss, by default as its checkpoint says; the metric is `router`.
    """
    config = getattr(getattr(apply, "model", None), "config", None)
    own = getattr(config, "router_loss", 0.0)
    share = (own if router_loss is None else router_loss) if getattr(config, "num_experts", 0) else 0.0
    weights = batch["weights"].astype(jnp.float32)
    if share and rng is not None:
        hidden, state = apply(params, batch["tokens"], rng=rng, method="hidden", mutable=["router"], **_inputs(batch))
        loss, metrics = _tokens_loss(apply, params, batch, hidden, weights, chunk)
        router = load_balancing_loss(state["router"])
        return loss + share * router, {**metrics, "router": router}
    if hasattr(getattr(apply, "model", None), "unembed"):
        hidden = apply(params, batch["tokens"], rng=rng, method="hidden", **_inputs(batch))
        return _tokens_loss(apply, params, batch, hidden, weights, chunk)
    logits = apply(params, batch["tokens"], rng=rng, **_inputs(batch))
    total = jnp.maximum(weights.sum(), 1e-9)
    loss, hits = _cross_entropy(logits.astype(jnp.float32), batch["targets"], weights)
    return loss / total, {"weight": weights.sum(), "accuracy": hits / total}


def _inputs(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a model's call takes beside tokens."""
    return {name: batch[name] for name in ("positions", "segment_ids", "token_type_ids", "adapter_ids") if name in batch}


def _tokens_loss(apply: Apply, params: Any, batch: Any, hidden: jax.Array, weights: jax.Array, chunk: int | None) -> Any:
    """Mean cross-entropy of `batch["targets"]` given hidden states, logits in chunks."""
    total = jnp.maximum(weights.sum(), 1e-9)
    head = functools.partial(apply, params, rng=None, method="unembed", adapter_ids=batch.get("adapter_ids"))
    loss, hits = _chunked(head, hidden, batch["targets"], weights, chunk)
    return loss / total, {"weight": weights.sum(), "accuracy": hits / total}


def masked_token(
    apply: Apply,
    params: Any,
    batch: dict[str, jax.Array],
    rng: Any,
    *,
    mask_token: int,
    vocab_size: int,
    share: float = 0.15,
    chunk: int | None = None,
) -> Any:
    """Mean cross-entropy of masked tokens, in nats (Devlin et al. 2018, section 3.1): of a `share` of each row's tokens,
    four in five become the mask, one in ten another token, and one in ten stays. Logits are computed for these alone.

    Each call draws anew; without an `rng`, in evaluation, always the same.
    """
    key = jax.random.key(0) if rng is None else jax.random.fold_in(rng, 1)
    draws = jax.random.split(key, 3)
    tokens, maskable = batch["tokens"], batch["weights"] > 0
    count = max(1, round(share * tokens.shape[1]))
    drawn, at = jax.lax.top_k(jnp.where(maskable, jax.random.uniform(draws[0], tokens.shape), -1.0), count)  # [B, count]
    wanted = jnp.ceil(share * maskable.sum(-1, keepdims=True))
    weights = ((jnp.arange(count) < wanted) & (drawn >= 0)).astype(jnp.float32)
    targets = jnp.take_along_axis(tokens, at, axis=1)
    what = jax.random.uniform(draws[1], at.shape)
    other = jnp.where(what < 0.9, jax.random.randint(draws[2], at.shape, 0, vocab_size, tokens.dtype), targets)
    new = jnp.where(weights > 0, jnp.where(what < 0.8, mask_token, other), targets)
    seen = jax.vmap(lambda row, i, x: row.at[i].set(x))(tokens, at, new)
    hidden = apply(params, seen, rng=rng, method="hidden", **_inputs(batch))
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return _tokens_loss(apply, params, {**batch, "targets": targets}, hidden, weights, chunk)


def target_token(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any, *, chunk: int | None = None) -> Any:
    """Mean cross-entropy of an encoder-decoder's next target token, in nats."""
    weights = batch["weights"].astype(jnp.float32)
    hidden = apply(params, batch["tokens"], batch["decoder_tokens"], rng=rng, method="hidden", **_inputs(batch))
    return _tokens_loss(apply, params, batch, hidden, weights, chunk)


def labels_of(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> Any:
    """Mean cross-entropy of labels [B] or [B, T], in nats, given logits of a head with as many axes and one of classes more."""
    logits = apply(params, batch["tokens"], rng=rng, **_inputs(batch))
    return _labels_loss(logits, batch["labels"], batch["weights"])


def _labels_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> Any:
    weights = weights.astype(jnp.float32)
    total = jnp.maximum(weights.sum(), 1e-9)
    loss, hits = _cross_entropy(logits.astype(jnp.float32), labels, weights)
    return loss / total, {"weight": weights.sum(), "accuracy": hits / total}


def squared_error(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> Any:
    """Mean squared error of numbers [B], given logits [B, 1]."""
    weights = batch["weights"].astype(jnp.float32)
    values = apply(params, batch["tokens"], rng=rng, **_inputs(batch))[:, 0]
    error = jnp.square(values - batch["labels"]) * weights
    return error.sum() / jnp.maximum(weights.sum(), 1e-9), {"weight": weights.sum()}


def answer_span(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> Any:
    """Mean cross-entropy of an answer's first and last token, labels [B, 2], given logits [B, T, 2]; padding has no part."""
    logits = apply(params, batch["tokens"], rng=rng, **_inputs(batch)).astype(jnp.float32)
    logits = jnp.where(batch["segment_ids"][..., None] > 0, logits, -1e9)
    weights = jnp.broadcast_to(batch["weights"][:, None], batch["labels"].shape)
    loss, metrics = _labels_loss(logits.swapaxes(1, 2), batch["labels"], weights)
    return loss, {**metrics, "weight": batch["weights"].sum()}


def contrast(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any, *, temperature: float = 0.05) -> Any:
    """Cross-entropy of each text's own pair among the batch's, both ways, by the cosine of mean hidden states over
    `temperature` (van den Oord et al. 2018, arXiv:1807.03748; Reimers and Gurevych 2019 for the pooling).
    """
    weights = batch["weights"].astype(jnp.float32)
    first, second = (
        embed_texts(apply, params, batch[f"{side}tokens"], batch[f"{side}segment_ids"], rng) for side in ("", "other_")
    )
    scores = jnp.matmul(first, second.T, preferred_element_type=jnp.float32) / temperature
    scores = jnp.where(weights[:, None] * weights[None] > 0, scores, -1e9)  # rows that pad a batch are no one's pair
    own = jnp.arange(len(weights))
    (loss, metrics), (other, _) = (_labels_loss(s, own, weights) for s in (scores, scores.T))
    return (loss + other) / 2, metrics


def embed_texts(apply: Apply, params: Any, tokens: jax.Array, segment_ids: jax.Array, rng: Any = None) -> jax.Array:
    """A vector of length 1 for each text, float32 [B, D]: the mean of its hidden states."""
    hidden = apply(params, tokens, segment_ids=segment_ids, rng=rng, method="hidden").astype(jnp.float32)
    mean = mean_of(hidden, segment_ids)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-9)


def _cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(summed loss, summed hits)."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    likely = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] >= logits.max(-1)  # cheaper than argmax
    return (loss * weights).sum(), (likely * weights).sum()


def _chunked(head: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int | None) -> Any:
    B, T = targets.shape
    vocabulary = jax.eval_shape(head, hidden[:, :1]).shape[-1]
    if chunk is None:
        chunk = 0 if B * T * vocabulary * 4 <= _CHUNK_BYTES else max(1, _CHUNK_BYTES // (4 * vocabulary * B)) * B
    steps = 1 if chunk <= 0 else -(-T // max(1, chunk // B))
    if steps <= 1:
        return _cross_entropy(head(hidden), targets, weights)
    # Chunks are runs of positions over all rows, so that rows stay sharded as they are.
    width = -(-T // steps)
    pad = steps * width - T

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, steps, width, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(carry: Any, part: Any) -> Any:
        h, t, w = part
        loss, hits = _cross_entropy(head(h), t, w)
        return (carry[0] + loss, carry[1] + hits), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero), (split(hidden), split(targets), split(weights)))[0]
