"""Codes of 1 to 8 bits in bytes: a little-endian bit stream along the input axis, as GPTQ's
checkpoints have.

The first of several codes in a byte takes its low bits; eight 3-bit codes take three bytes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

_WORD = 4  # bytes of the longest unit that is put together in one number


def pack_padded(codes: jax.Array, bits: int) -> jax.Array:
    """As `pack`, for any number of inputs: the last bytes are filled up with zeros."""
    missing = -codes.shape[-2] % codes_per_unit(bits)
    return pack(jnp.pad(codes, [*[(0, 0)] * (codes.ndim - 2), (0, missing), (0, 0)]), bits)


def unpack_padded(packed: jax.Array, bits: int, n_in: int) -> jax.Array:
    """The inverse of `pack_padded` for `n_in` inputs."""
    return unpack(packed, bits)[..., :n_in, :]


def codes_per_unit(bits: int) -> int:
    """How many codes are packed together: the number of inputs must be a multiple of it."""
    return _unit(bits)[0]


def _unit(bits: int) -> tuple[int, int]:
    """(codes, bytes) that are packed together. Raises ValueError for codes beyond a byte."""
    if bits not in range(1, 9):
        raise ValueError(f"codes of {bits} bits cannot be packed; a code has 1 to 8 bits")
    shared = math.gcd(8, bits)
    return 8 // shared, bits // shared


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes [..., in, out] below 2^bits -> bytes [..., in * bits / 8, out], uint8."""
    codes_in, bytes_out = _unit(bits)
    *lead, n_in, n_out = codes.shape
    if bytes_out > _WORD:
        return _pack_bits(codes, bits)
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
    codes_out, bytes_in = _unit(bits)
    if bits == 8:
        return packed
    if bytes_in > _WORD:
        return _unpack_bits(packed, bits)
    *lead, n, n_out = packed.shape
    word = jnp.uint8 if bytes_in == 1 else jnp.uint32
    parts = packed.astype(word).reshape(*lead, n // bytes_in, bytes_in, n_out)
    shifts = 8 * jnp.arange(bytes_in, dtype=word)[:, None]
    words = parts[..., 0, :] if bytes_in == 1 else jnp.sum(parts << shifts, axis=-2, dtype=word)
    split = (
        words[..., None, :] >> (word(bits) * jnp.arange(codes_out, dtype=word)[:, None])
    ) & word(2**bits - 1)
    return split.astype(jnp.uint8).reshape(*lead, n // bytes_in * codes_out, n_out)


def _pack_bits(codes: jax.Array, bits: int) -> jax.Array:
    """`pack` of codes whose unit is longer than a word, bit by bit."""
    return _join(_split(codes, bits), 8)


def _unpack_bits(packed: jax.Array, bits: int) -> jax.Array:
    """`unpack` of codes whose unit is longer than a word, bit by bit."""
    return _join(_split(packed, 8), bits)


def _split(x: jax.Array, bits: int) -> jax.Array:
    """Numbers [..., n, out] as their bits [..., n * bits, out], lowest first."""
    *lead, n, out = x.shape
    shifts = jnp.arange(bits, dtype=jnp.uint8)[:, None]
    return ((x[..., None, :] >> shifts) & jnp.uint8(1)).reshape(*lead, n * bits, out)


def _join(x: jax.Array, bits: int) -> jax.Array:
    """The inverse of `_split`."""
    *lead, n, out = x.shape
    shifts = jnp.arange(bits, dtype=jnp.uint8)[:, None]
    parts = x.reshape(*lead, n // bits, bits, out) << shifts
    return parts.sum(-2, dtype=jnp.uint8)
