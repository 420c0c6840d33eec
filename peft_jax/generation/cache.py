"""The key/value cache of a model that is generating: a fresh one, and one made anew."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.bind import Bound
from peft_jax.core.prepare import cache_slots

Rows = dict[str, Any]  # the fields of the prompts' rows [B, T], "tokens" among them


def new_cache(apply: Bound, params: Any, batch: int, tokens: int, cache_dtype: Any) -> Any:
    """A fresh cache for `batch` rows of at most so many tokens, and for what stands before them."""
    slots = cache_slots(params) + tokens
    return apply(params, batch, slots, *kind(cache_dtype), method="empty_cache")


def kind(cache_dtype: Any) -> list[Any]:
    """The cache's dtype as a further argument, none for the model's own."""
    return [] if cache_dtype is None else [jnp.dtype(cache_dtype)]


def last_logits(apply: Bound, params: Any, rows: Rows, cache: Any) -> tuple[jax.Array, Any]:
    """(logits [B, 1, V] of each row's last token, the new cache); those of all tokens [B, T, V]
    where the model has no `unembed` apart.
    """
    inputs = {name: x for name, x in rows.items() if name != "tokens"}
    if not apply.hidden_states:
        return apply(params, rows["tokens"], cache=cache, **inputs)
    hidden, cache = apply(params, rows["tokens"], cache=cache, method="hidden", **inputs)
    return apply(params, hidden[:, -1:], method="unembed"), cache


def outdated(apply: Bound, params: Any, cache: Any) -> jax.Array | None:
    """Whether one more token makes what is cached of its row [B] wrong; None for a model of which
    that is never so.
    """
    return apply(params, cache, method="outdated") if apply.outdates else None


def renewed(
    apply: Bound,
    params: Any,
    rows: Rows,
    tokens: jax.Array,
    count: jax.Array,
    cache: Any,
    cache_dtype: Any,
) -> Any:
    """`cache` made anew from the prompts' rows and the first `count` of `tokens` [B, N] after
    them, the last of which is about to be written. Columns to come are padding.
    """
    (B, T), N = rows["tokens"].shape, tokens.shape[1]
    column = jnp.arange(N)[None]
    there = jnp.broadcast_to(column < count, (B, N))
    after = {
        "tokens": jnp.maximum(tokens, 0),
        "positions": rows["positions"][:, -1:] + 1 + column,
        "segment_ids": there,
    }
    none = jnp.zeros((B, N), jnp.int32)  # of what stands beside prompts
    parts = {name: jnp.where(there, after.get(name, none), 0) for name in rows}
    whole = {
        name: jnp.concatenate([x, parts[name].astype(x.dtype)], axis=1) for name, x in rows.items()
    }
    empty = new_cache(apply, params, B, T + N, cache_dtype)
    made = last_logits(apply, params, whole, empty)[1]
    # The newest token is written once more.
    return jax.tree.map(lambda new, old: new if new.ndim else old, made, cache)
