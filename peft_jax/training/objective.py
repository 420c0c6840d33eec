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

Apply = Callable[..., Any]
Objective = Callable[[Apply, Any, dict[str, jax.Array], Any], tuple[jax.Array, dict[str, jax.Array]]]
_CHUNK_BYTES = 256 * 2**20  # logits larger than this are computed in chunks unless told otherwise


def next_token(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any, *, chunk: int | None = None) -> Any:
    """Mean cross-entropy of the next token, in nats, weighted by `batch["weights"]` [B, T].

    Where the model has `hidden` and `unembed`, logits are computed for `chunk` tokens at a time and never stored for the
    whole batch (0: all at once; None: chunks where they would exceed 256 MB in float32).
    """
    inputs = {name: batch[name] for name in ("positions", "segment_ids", "adapter_ids") if name in batch}
    weights = batch["weights"].astype(jnp.float32)
    total = jnp.maximum(weights.sum(), 1e-9)
    if hasattr(getattr(apply, "model", None), "unembed"):
        hidden = apply(params, batch["tokens"], rng=rng, method="hidden", **inputs)
        head = functools.partial(apply, params, rng=None, method="unembed", adapter_ids=batch.get("adapter_ids"))
        loss, hits = _chunked(head, hidden, batch["targets"], weights, chunk)
    else:
        logits = apply(params, batch["tokens"], rng=rng, **inputs)
        loss, hits = _cross_entropy(logits.astype(jnp.float32), batch["targets"], weights)
    return loss / total, {"weight": weights.sum(), "accuracy": hits / total}


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
