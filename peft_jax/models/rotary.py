"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and the ways of stretching them.

Scalings: linear, dynamic NTK, YaRN (Peng et al. 2023, arXiv:2309.00071), LongRoPE (Ding et al.
2024, arXiv:2402.13753) and Llama 3's wavelength-dependent one. Half-split layout, as in Hugging
Face checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Rotary settings with Hugging Face's key names; `dim` is the rotated part of the head size."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    dim: int = 64
    max_position: int = 2048
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in _TYPES:
            raise ValueError(
                f"rope_type {self.rope_type!r} is not supported; supported: {', '.join(_TYPES)}"
            )
        if self.rope_type in ("linear", "dynamic", "llama3") and self.factor is None:
            raise ValueError(f"rope_type {self.rope_type!r} needs a factor")
        if self.rope_type == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError("rope_type 'longrope' needs short_factor and long_factor")

    @property
    def by_length(self) -> bool:
        """Whether a token's rotation depends on how long its sequence is."""
        return self.rope_type in ("dynamic", "longrope")

    def changes(self, length: jax.Array) -> jax.Array:
        """Whether all tokens of a sequence of `length` rotate in another way than before its last
        one.
        """
        if self.rope_type == "longrope":
            return length == _original(self) + 1
        return (
            length > self.max_position
            if self.rope_type == "dynamic"
            else jnp.zeros_like(length, bool)
        )


_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def _inverse_frequencies(c: RotaryConfig) -> np.ndarray:
    return 1.0 / (c.rope_theta ** (np.arange(0, c.dim, 2, dtype=np.float32) / np.float32(c.dim)))


def _original(c: RotaryConfig) -> int:
    return c.original_max_position_embeddings or c.max_position


def _llama3(c: RotaryConfig) -> np.ndarray:
    inv = _inverse_frequencies(c)
    assert c.factor is not None
    wavelength = 2 * math.pi / inv
    smooth = (_original(c) / wavelength - c.low_freq_factor) / (
        c.high_freq_factor - c.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * inv / c.factor + smooth * inv


def _yarn(c: RotaryConfig) -> tuple[np.ndarray, float]:
    inv = _inverse_frequencies(c)
    factor = c.factor or c.max_position / _original(c)

    def magnitude(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    def dimension(rotations: float) -> float:
        return (
            c.dim
            * math.log(_original(c) / (rotations * 2 * math.pi))
            / (2 * math.log(c.rope_theta))
        )

    low, high = dimension(c.beta_fast), dimension(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(c.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    attention = c.attention_factor
    if attention is None:
        both = c.mscale and c.mscale_all_dim
        attention = (
            magnitude(factor, c.mscale or 1.0) / magnitude(factor, c.mscale_all_dim or 1.0)
            if both
            else magnitude(factor)
        )
    return inv / factor * ramp + inv * (1 - ramp), attention


def _longrope(c: RotaryConfig, length: jax.Array) -> tuple[jax.Array, float]:
    inv = _inverse_frequencies(c)
    factor = c.factor or c.max_position / _original(c)
    attention = c.attention_factor
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(_original(c)))
    short, long = (
        inv / np.asarray(c.short_factor, np.float32),
        inv / np.asarray(c.long_factor, np.float32),
    )
    return jnp.where(length[..., None] > _original(c), long, short), attention


def _dynamic(c: RotaryConfig, length: jax.Array) -> jax.Array:
    assert c.factor is not None
    length = jnp.maximum(length, c.max_position).astype(jnp.float32)
    stretch = (c.factor * length / c.max_position - (c.factor - 1)) ** (c.dim / (c.dim - 2))
    return 1.0 / (c.rope_theta * stretch[..., None]) ** (
        np.arange(0, c.dim, 2, dtype=np.float32) / c.dim
    )


def sequence_lengths(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """How long each token's sequence is, by its highest position: [B, 1], or [B, T] where a row
    holds several segments.

    A token that all segments see (the segment -1) is as far as its row goes.
    """
    if segment_ids is None:
        return jnp.max(positions, axis=-1, keepdims=True) + 1
    positions, segment_ids = jnp.broadcast_arrays(positions, segment_ids)
    whole = jnp.max(jnp.where(segment_ids == 0, 0, positions), axis=-1, keepdims=True) + 1
    return jnp.where(segment_ids < 0, whole, jax.vmap(_furthest)(positions, segment_ids) + 1)


def _furthest(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The highest position in each token's segment [T], whatever the segments' numbers."""
    order = jnp.argsort(segment_ids)
    steps = jnp.diff(segment_ids[order], prepend=segment_ids[order[:1]]) != 0
    number = jnp.zeros_like(order).at[order].set(jnp.cumsum(steps))
    return jax.ops.segment_max(positions, number, num_segments=len(order))[number]


def rotary_table(
    config: RotaryConfig, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32 [B, T, dim/2], for integer `positions` [B, T] of sequences of
    `lengths` [B, 1 or T].

    Lengths are those of whole rows by default (`sequence_lengths`); they count for the types that
    are `by_length`.
    """
    attention, length = 1.0, sequence_lengths(positions, None) if lengths is None else lengths
    if config.rope_type == "yarn":
        inv, attention = _yarn(config)
    elif config.rope_type == "longrope":
        inv, attention = _longrope(config, length)
    elif config.rope_type == "dynamic":
        inv = _dynamic(config, length)
    elif config.rope_type == "llama3":
        inv = _llama3(config)
    else:
        inv = _inverse_frequencies(config) / (
            config.factor if config.rope_type == "linear" else 1.0
        )
    angles = positions.astype(jnp.float32)[..., None] * inv
    return jnp.cos(angles) * attention, jnp.sin(angles) * attention


Tables = tuple[jax.Array, jax.Array]  # (cos, sin), each [R, B, T, dim/2]


def rotary_tables(
    configs: Sequence[RotaryConfig | None], positions: jax.Array, lengths: jax.Array | None = None
) -> Tables:
    """The tables of R ways to rotate, stacked; None is the way that leaves everything as it is."""
    found = {c: rotary_table(c, positions, lengths) for c in configs if c is not None}
    cos, sin = next(iter(found.values()))
    still = (jnp.ones_like(cos), jnp.zeros_like(sin))
    each = [still if c is None else found[c] for c in configs]
    return jnp.stack([cos for cos, _ in each]), jnp.stack([sin for _, sin in each])


def table_of(tables: Tables, way: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of one of the R ways, whose number a scanned layer has as an array."""
    cos, sin = (jax.lax.dynamic_index_in_dim(x, way, keepdims=False) for x in tables)
    return cos, sin


@jax.custom_vjp
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first 2*dim/2 features of each head; x [B, T, H, d], cos and sin [B, T, dim/2].

    The gradient with respect to `x` is the rotation the other way; the tables have none.
    """
    turned = 2 * cos.shape[-1]
    cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    cos, sin = cos[:, :, None, :].astype(x.dtype), sin[:, :, None, :].astype(x.dtype)
    part = x[..., :turned]
    part = (
        part * cos + jnp.roll(part, turned // 2, axis=-1) * sin
    )  # on a CPU much faster than joining two halves
    return part if turned == x.shape[-1] else jnp.concatenate([part, x[..., turned:]], axis=-1)


def _rotate_forward(x: jax.Array, cos: jax.Array, sin: jax.Array) -> Any:
    return rotate(x, cos, sin), (cos, sin)


def _rotate_backward(tables: Any, grad: jax.Array) -> Any:
    cos, sin = tables
    return rotate(grad, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


rotate.defvjp(_rotate_forward, _rotate_backward)
