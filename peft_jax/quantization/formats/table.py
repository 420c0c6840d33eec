"""Codes into a table of values."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.quantization.dynamic_map import DoubleScale, double_quantize
from peft_jax.quantization.formats.exact import largest_magnitude, over_absmax
from peft_jax.quantization.formats.format import Format
from peft_jax.quantization.formats.stochastic import stochastic_codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Format):
    """Codes into a table of 2^bits values, scaled by the block's largest magnitude.

    A subclass gives the table, in [-1, 1], and the order of its values. `double` quantizes the
    blocks' scales in turn.
    """

    bits: int = 4
    block_size: int | None = 64
    double: bool = False
    table: ClassVar[np.ndarray]  # code -> value
    order: ClassVar[np.ndarray]  # codes in ascending order of their values

    def __post_init__(self) -> None:
        if 2**self.bits != len(self.table):
            bits = len(self.table).bit_length() - 1
            raise ValueError(f"{type(self).__name__} has {bits} bits, not {self.bits}")

    @classmethod
    def bounds(cls) -> np.ndarray:
        """Where the nearest value changes, one fewer than values."""
        values = cls.table[cls.order]
        return (values[:-1] + values[1:]) / np.float32(2)

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return largest_magnitude(w), None

    def encode(
        self, w: jax.Array, scale: jax.Array, zero: jax.Array | None, noise: jax.Array | None = None
    ) -> jax.Array:
        x = over_absmax(w, scale)
        if noise is not None:
            return stochastic_codes(x, self.table, self.order, noise)
        place = functools.reduce(jnp.add, [(x > b).astype(jnp.uint8) for b in self.bounds()])
        if (self.order == np.arange(len(self.order))).all():
            return place
        return jnp.take(jnp.asarray(self.order, jnp.uint8), place)

    def decode(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        return look_up(self.table, codes)

    def store_scale(self, scale: jax.Array) -> Any:
        return double_quantize(scale) if self.double else scale

    def load_scale(self, stored: Any) -> jax.Array:
        return (
            stored.materialize() if isinstance(stored, DoubleScale) else stored.astype(jnp.float32)
        )


def look_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """table[codes] for codes below its length, a power of 2: a small table by choosing between
    halves for each bit, since looking up single numbers is the slowest thing that a TPU does.
    """
    if len(table) > 16:
        return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")
    values: list[Any] = list(table)
    for bit in range(len(table).bit_length() - 1):
        high = (codes >> bit) & 1 != 0
        values = [jnp.where(high, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]
