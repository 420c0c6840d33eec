"""What is compiled of generation: reading the prompts, and writing token after token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.bind import Bound, bound_of
from peft_jax.generation.cache import Rows, kind, last_logits, new_cache, outdated, renewed
from peft_jax.generation.ends import ends_of, is_end
from peft_jax.generation.sampling import Sampling, make_sampling, sample

CHUNK = 32  # tokens decoded between looks at stop strings


class Written(NamedTuple):
    """What is written so far."""

    tokens: jax.Array  # [B, N] generated so far
    length: jax.Array  # how many columns of it
    last: jax.Array  # [B] the newest token
    position: jax.Array  # [B] its position
    done: jax.Array  # [B]
    cache: Any
    keys: jax.Array  # [B]


def prefill(
    apply: Bound,
    params: Any,
    rows: Rows,
    keys: jax.Array,
    ends: Any,
    sampling: Sampling | None,
    *,
    slots: int,
    cache_dtype: Any,
) -> Written:
    """The first token after prompts that are padded on the left, so that all rows write the same
    slots; there is room for `slots` tokens.
    """
    tokens, positions = rows["tokens"], rows["positions"]
    B, T = tokens.shape
    if apply.encoder_decoder:
        more = (rows["segment_ids"], slots, *kind(cache_dtype))
        cache = apply(params, tokens, *more, method="start")
        tokens = jnp.full((B, 1), apply.config.start_token, jnp.int32)
        positions = jnp.zeros((B, 1), jnp.int32)
        logits, cache = apply(params, tokens, positions=positions, cache=cache, method="decode")
    else:
        cache = new_cache(apply, params, B, T + slots, cache_dtype)
        logits, cache = last_logits(apply, params, rows, cache)
    first = sample(logits[:, -1], sampling, jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys))
    out = jnp.full((B, slots), ends[0], jnp.int32).at[:, 0].set(first)
    position = positions[:, -1] + 1
    return Written(out, jnp.int32(1), first, position, is_end(first, ends), cache, keys)


def decode(
    apply: Bound,
    params: Any,
    state: Written,
    rows: Rows,
    done: Any,
    ends: Any,
    sampling: Sampling | None,
    most: Any,
    *,
    cache_dtype: Any,
) -> Written:
    """Up to a chunk of further tokens (to the next multiple of it, and to `most`); rows that are
    `done` get no more.
    """
    state = state._replace(done=state.done | done)
    end = jnp.minimum((state.length // CHUNK + 1) * CHUNK, most)
    return _decode_until(apply, params, state, rows, ends, sampling, end, cache_dtype)


def _decode_until(
    apply: Bound,
    params: Any,
    state: Written,
    rows: Rows,
    ends: Any,
    sampling: Sampling | None,
    end: Any,
    cache_dtype: Any,
) -> Written:
    """Further tokens, until there are `end` of them or all rows have ended; the first of the `ends`
    after a row's own.
    """
    method = {"method": "decode"} if apply.encoder_decoder else {}

    def more(s: Written) -> jax.Array:
        return (s.length < end) & ~s.done.all()

    def one(s: Written) -> Written:
        cache = _current_cache(apply, params, rows, s, cache_dtype)
        logits, cache = apply(
            params, s.last[:, None], positions=s.position[:, None], cache=cache, **method
        )
        keys = jax.vmap(jax.random.fold_in, (0, None))(s.keys, s.length)
        token = jnp.where(s.done, ends[0], sample(logits[:, -1], sampling, keys))
        tokens = jax.lax.dynamic_update_slice_in_dim(s.tokens, token[:, None], s.length, axis=1)
        done = s.done | is_end(token, ends)
        return Written(tokens, s.length + 1, token, s.position + 1, done, cache, s.keys)

    return jax.lax.while_loop(more, one, state)


def _current_cache(apply: Bound, params: Any, rows: Rows, s: Written, cache_dtype: Any) -> Any:
    """The state's cache, made anew where the newest token outdates it."""
    if (old := outdated(apply, params, s.cache)) is None:
        return s.cache

    def again() -> Any:
        return renewed(apply, params, rows, s.tokens, s.length, s.cache, cache_dtype)

    return jax.lax.cond((old & ~s.done).any(), again, lambda: s.cache)


def next_tokens(
    apply: Bound,
    params: Any,
    buffer: jax.Array,
    last: jax.Array,
    keys: jax.Array,
    sampling: Sampling | None,
) -> jax.Array:
    """The token [B] after the one at the place `last` [B] of each row of `buffer` [B, T], of a
    model without a cache.
    """
    logits = apply(params, buffer)
    logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
    return sample(logits, sampling, keys)


def continuations(
    apply: Any,
    params: Any,
    tokens: jax.Array,
    segment_ids: jax.Array,
    key: jax.Array,
    *,
    max_tokens: int,
    eos: int | Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """`max_tokens` sampled tokens [B, max_tokens] for prompts [B, T] that are padded on the left
    (segment 0). A row ends at any of the tokens `eos` (-1, or none: never), after which there is
    the first of them. To be traced inside a jitted function; temperature 0 is greedy.
    """
    apply = bound_of(apply)
    positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1) - 1, 0).astype(jnp.int32)
    sampling, ends = make_sampling(temperature, top_k, top_p), jnp.asarray(ends_of(eos))
    keys = jax.random.split(key, tokens.shape[0])
    rows = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": (segment_ids > 0).astype(jnp.int32),
    }
    state = prefill(apply, params, rows, keys, ends, sampling, slots=max_tokens, cache_dtype=None)
    return _decode_until(apply, params, state, rows, ends, sampling, max_tokens, None).tokens
