"""8-bit dynamic quantization (Dettmers 2015, arXiv:1511.04561): blocks of 256 numbers over a map of
256 values.

The exponent takes a variable number of bits, so that small numbers keep relative precision. QLoRA's
double quantization keeps the scales of 4-bit blocks this way, and 8-bit optimizers their moments.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The 256 values of bitsandbytes' dynamic type, ascending: in [-1, 1], or [0, 1] where not
    signed.
    """
    values: list[float] = [0.0, 1.0]
    for i in range(7):
        count = (2**i if signed else 2 ** (i + 1)) + 1
        edges = _linspace(count)
        means = ((edges[:-1] + edges[1:]) / np.float32(2)).astype(np.float32)
        scaled = (np.float32(10.0 ** (i - 6)) * means).tolist()
        values += [*scaled, *(-v for v in scaled)] if signed else scaled
    return np.sort(np.array([*values, *[0.0] * (256 - len(values))], np.float32))


def _linspace(count: int) -> np.ndarray:
    """`count` float32 numbers from 0.1 to 1, from both ends with fused multiply-adds, as PyTorch
    computes them.
    """
    start, step = (
        np.float64(np.float32(0.1)),
        np.float64((np.float32(1.0) - np.float32(0.1)) / np.float32(count - 1)),
    )
    index = np.arange(count)
    return np.where(
        index < count // 2, start + step * index, 1.0 - step * (count - 1 - index)
    ).astype(np.float32)


def quantize_blocks(x: jax.Array, *, signed: bool = True) -> tuple[jax.Array, jax.Array]:
    """(codes uint8 [..., n], absmax float32 [..., n / 256 rounded up]) of x [..., n], nearest value
    in each block of 256.
    """
    *lead, n = x.shape
    blocks = _blocks(x.astype(jnp.float32))
    absmax = jnp.abs(blocks).max(-1)
    scaled = jnp.clip(blocks * (1.0 / jnp.maximum(absmax, 1e-37))[..., None], -1, 1)
    values = dynamic_map(signed)
    codes = jnp.searchsorted(
        jnp.asarray((values[:-1] + values[1:]) / np.float32(2)),
        scaled,
        side="left",
        method="scan_unrolled",
    )
    return codes.astype(jnp.uint8).reshape(*lead, -1)[..., :n], absmax


def dequantize_blocks(codes: jax.Array, absmax: jax.Array, *, signed: bool = True) -> jax.Array:
    """The inverse of `quantize_blocks`, float32 [..., n]."""
    values = jnp.take(jnp.asarray(dynamic_map(signed)), codes.astype(jnp.int32), mode="clip")
    return values * jnp.repeat(absmax, BLOCK, axis=-1)[..., : codes.shape[-1]]


def _blocks(x: jax.Array) -> jax.Array:
    *lead, n = x.shape
    padded = jnp.pad(x, [*[(0, 0)] * len(lead), (0, -n % BLOCK)])
    return padded.reshape(*lead, -1, BLOCK)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoubleScale:
    """Scales [*lead, groups, out] in 8 bits: codes of that shape, absmax [*lead, blocks] and offset
    [*lead] (their mean).

    Blocks of 256 run over the groups of the first output, then the next, as bitsandbytes' do over
    [out, in] weights.
    """

    codes: jax.Array
    absmax: jax.Array
    offset: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def materialize(self) -> jax.Array:
        """The scales [*lead, groups, out], float32."""
        *lead, groups, out = self.codes.shape
        flat = dequantize_blocks(self.codes.mT.reshape(*lead, out * groups), self.absmax)
        return (flat + self.offset[..., None]).reshape(*lead, out, groups).mT


def double_quantize(scale: jax.Array) -> DoubleScale:
    """Scales [*lead, groups, out] less their mean, in 8-bit dynamic codes."""
    *lead, groups, out = scale.shape
    offset = scale.mean((-2, -1))
    flat = scale.mT.reshape(*lead, out * groups) - offset[..., None]
    codes, absmax = quantize_blocks(flat)
    return DoubleScale(codes.reshape(*lead, out, groups).mT, absmax, offset)
