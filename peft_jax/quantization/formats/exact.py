"""Exact arithmetic: XLA flushes subnormal numbers to zero on CPUs and TPUs; this keeps blocks of
them, through their bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

AMPLIFY = np.float32(2.0**64)
SMALL = np.float32(2.0**-60)


def nonzero(scale: jax.Array) -> jax.Array:
    """Scales to divide by: 1 where a block is zero."""
    return jnp.where(scale == 0, 1.0, scale)


def largest_magnitude(w: jax.Array) -> jax.Array:
    """max |w| over the block axis, exact for subnormal numbers too: magnitudes are ordered as their
    bits are.
    """
    bits = jax.lax.bitcast_convert_type(w.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    return jax.lax.bitcast_convert_type(bits.max(-2, keepdims=True), jnp.float32)


def amplified(x: jax.Array) -> jax.Array:
    """x * 2^64, exact for subnormal x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    small = (bits & 0x7FFFFF).astype(jnp.float32) * np.float32(2.0**-85)
    return jnp.where((bits & 0x7F800000) == 0, jnp.where(bits < 0, -small, small), x * AMPLIFY)


def over_absmax(w: jax.Array, absmax: jax.Array) -> jax.Array:
    """w / absmax in [-1, 1] as bitsandbytes computes it: times the reciprocal of at least 1e-38."""
    small = absmax < SMALL
    least = jnp.where(small, np.float32(1e-38) * AMPLIFY, SMALL)
    size = jnp.maximum(jnp.where(small, amplified(absmax), absmax), least)
    return jnp.clip(jnp.where(small, amplified(w), w) * (1.0 / size), -1, 1)


def exponent_of(x: jax.Array) -> jax.Array:
    """The biased exponent of positive float32 numbers."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^(exponent - 127), at least the smallest normal number."""
    return jax.lax.bitcast_convert_type(jnp.maximum(exponent, 1) << 23, jnp.float32)
