"""One token for each row of logits: the likeliest one, or one drawn."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are drawn, see `generate`."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


def make_sampling(temperature: float, top_k: int, top_p: float) -> Sampling | None:
    """What `sample` is given; None for the greedy choice. A temperature too small for float32 is
    its smallest number.
    """
    if temperature <= 0:
        return None
    temperature = max(temperature, float(jnp.finfo(jnp.float32).tiny))
    return Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


def sample(logits: jax.Array, sampling: Sampling | None, keys: jax.Array) -> jax.Array:
    """One token for each row of logits [B, V] with a key each; greedy without `sampling`."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    logits = (
        logits - logits.max(-1, keepdims=True)
    ) / sampling.temperature  # the highest is 0 at any temperature
    whole = (sampling.top_k == 0) & (
        sampling.top_p >= 1
    )  # nothing to leave out, so nothing to sort
    logits = jax.lax.cond(whole, lambda x: x, functools.partial(likeliest, sampling), logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def likeliest(sampling: Sampling, logits: jax.Array) -> jax.Array:
    """The logits [B, V] with -inf where a token is not among the `top_k` and not in the `top_p`."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    V = logits.shape[-1]
    kth = jnp.take(
        ordered, jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V) - 1, axis=-1
    )
    ordered = jnp.where(ordered >= kth[:, None], ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = (
        jnp.cumsum(probabilities, axis=-1) - probabilities
    )  # 0 of the first, which is always kept
    kept = ((before < sampling.top_p) | (sampling.top_p >= 1)) & (ordered > -jnp.inf)
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
