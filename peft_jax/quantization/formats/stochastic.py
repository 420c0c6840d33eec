"""Stochastic rounding: a value becomes one of its two neighbours, its mean stays."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def neighbours(x: jax.Array, values: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the value below x, the one above, how far x is on the way) among ascending `values`."""
    place = below(x, values)
    table = jnp.asarray(values, jnp.float32)
    lower, upper = jnp.take(table, place), jnp.take(table, place + 1)
    return lower, upper, (x - lower) / (upper - lower)


def below(x: jax.Array, values: np.ndarray) -> jax.Array:
    """The place of the value below x among ascending `values`, the last but one at most."""
    return jnp.clip(
        jnp.searchsorted(jnp.asarray(values, jnp.float32), x, side="right") - 1, 0, len(values) - 2
    )


def stochastic_codes(
    x: jax.Array, table: np.ndarray, order: np.ndarray, noise: jax.Array
) -> jax.Array:
    """Codes of the neighbours of x, the upper one with the probability that makes the mean x."""
    values, first = np.unique(table[order], return_index=True)  # of two zeros one will do
    _, _, share = neighbours(x, values)
    codes = jnp.asarray(order[first], jnp.uint8)
    return jnp.take(codes, below(x, values) + (noise < share))


@functools.cache
def finite_values(dtype: Any) -> np.ndarray:
    """The finite numbers of an 8-bit dtype, ascending."""
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return np.unique(every[np.isfinite(every)])
