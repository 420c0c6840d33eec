"""Codes of 1, 2, 3, 4 and 8 bits in bytes: a little-endian bit stream along the input axis, as
GPTQ's checkpoints have.

The first of several codes in a byte takes its low bits; eight 3-bit codes take three bytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_UNITS = {
    8: (1, 1),
    4: (2, 1),
    2: (4, 1),
    1: (8, 1),
    3: (8, 3),
}  # bits -> (codes, bytes) that are packed together


def pack_padded(codes: jax.Array, bits: int) -> jax.Array:
    """As `pack`, for any number of inputs: the last bytes are filled up with zeros."""
    missing = -codes.shape[-2] % codes_per_unit(bits)
    return pack(jnp.pad(codes, [*[(0, 0)] * (codes.ndim - 2), (0, missing), (0, 0)]), bits)


def unpack_padded(packed: jax.Array, bits: int, n_in: int) -> jax.Array:
    """The inverse of `pack_padded` for `n_in` inputs."""
    return unpack(packed, bits)[..., :n_in, :]


def codes_per_unit(bits: int) -> int:
    """How many codes are packed together: the number of inputs must be a multiple of it."""
    return _UNITS[bits][0]


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes [..., in, out] below 2^bits -> bytes [..., in * bits / 8, out], uint8."""
    codes_in, bytes_out = _UNITS[bits]
    *lead, n_in, n_out = codes.shape
    word = jnp.uint8 if bytes_out == 1 else jnp.uint32
    parts = codes.astype(word).reshape(*lead, n_in // codes_in, codes_in, n_out)
    shifts = jnp.arange(codes_in, dtype=word)[:, None] * word(bits)
    words = jnp.sum(parts << shifts, axis=-2, dtype=word)
    if bytes_out == 1:
        return words
    split = words[..., None, :] >> (8 * jnp.arange(bytes_out, dtype=word)[:, None])
    return split.astype(jnp.uint8).reshape(*lead, n_in * bits // 8, n_out)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`: bytes [..., n, out] -> codes [..., n * 8 / bits, out], uint8."""
    codes_out, bytes_in = _UNITS[bits]
    if bits == 8:
        return packed
    *lead, n, n_out = packed.shape
    word = jnp.uint8 if bytes_in == 1 else jnp.uint32
    parts = packed.astype(word).reshape(*lead, n // bytes_in, bytes_in, n_out)
    shifts = 8 * jnp.arange(bytes_in, dtype=word)[:, None]
    words = parts[..., 0, :] if bytes_in == 1 else jnp.sum(parts << shifts, axis=-2, dtype=word)
    split = (
        words[..., None, :] >> (word(bits) * jnp.arange(codes_out, dtype=word)[:, None])
    ) & word(2**bits - 1)
    return split.astype(jnp.uint8).reshape(*lead, n // bytes_in * codes_out, n_out)
