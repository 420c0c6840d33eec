"""OCP Microscaling MXFP4 (Rouhani et al. 2023, arXiv:2310.10537)."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.quantization.formats.exact import (
    AMPLIFY,
    SMALL,
    amplified,
    exponent_of,
    largest_magnitude,
    power_of_two,
)
from peft_jax.quantization.formats.format import Format, StorageFormat
from peft_jax.quantization.formats.stochastic import stochastic_codes
from peft_jax.quantization.formats.table import look_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class MXFP4(Format):
    """OCP Microscaling MXFP4 (Rouhani et al. 2023, arXiv:2310.10537): e2m1 elements, a shared power
    of two for each 32.
    """

    kind: ClassVar[str] = "mxfp4"
    bits: int = 4
    block_size: int | None = 32
    table: ClassVar[np.ndarray] = np.array(
        [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
    )

    def __post_init__(self) -> None:
        if self.bits != 4 or self.block_size != 32:
            raise ValueError(
                f"MXFP4 has blocks of 32 and 4 bits, not {self.block_size} and {self.bits}"
            )

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        exponent = exponent_of(largest_magnitude(w)) - 2  # 6 = 1.5 * 2^2 is the largest element
        return power_of_two(jnp.maximum(exponent, 0)), None

    def encode(
        self, w: jax.Array, scale: jax.Array, zero: jax.Array | None, noise: jax.Array | None = None
    ) -> jax.Array:
        small = scale < SMALL
        x = jnp.where(small, amplified(w), w) / jnp.where(small, scale * AMPLIFY, scale)
        sign = jnp.where(jnp.signbit(x), jnp.uint8(8), jnp.uint8(0))
        size, values = jnp.abs(x), self.table[:8]
        if noise is not None:
            inside = jnp.minimum(size, values[-1])
            return sign | stochastic_codes(inside, values, np.arange(8), noise)
        bounds = (values[:-1] + values[1:]) / np.float32(2)  # ties go to the even code
        steps = [
            ((size > b) if i % 2 == 0 else (size >= b)).astype(jnp.uint8)
            for i, b in enumerate(bounds)
        ]
        return sign | functools.reduce(jnp.add, steps)

    def decode(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        return look_up(self.table, codes)

    def store_scale(self, scale: jax.Array) -> jax.Array:
        return exponent_of(scale).astype(jnp.uint8)

    def load_scale(self, stored: jax.Array) -> jax.Array:
        return power_of_two(stored.astype(jnp.int32))


FORMAT = StorageFormat(
    name="mxfp4",
    made=MXFP4,
    follows="Rouhani et al. 2023, arXiv:2310.10537; ml_dtypes",
    examples=(MXFP4(),),
)
