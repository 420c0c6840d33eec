"""Integers of 8, 4, 3 and 2 bits, symmetric or with zero points."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from peft_jax.quantization.formats.exact import nonzero
from peft_jax.quantization.formats.format import Activations, Format, StorageFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int(Format):
    """Integers of 8, 4, 3 or 2 bits: symmetric, w = scale * q with q in [-2^(b-1), 2^(b-1) - 1] and
    scale = max|w| / ((2^b - 1) / 2), or with zero points, w = scale * (q - zero) with q and zero in
    [0, 2^b - 1].

    With `activations` (8 bits, symmetric, one scale an output) inputs are quantized to 8 bits too
    and the product is one of integers: "dynamic" takes a scale for each token, "static" one for the
    weight, from calibration.
    """

    kind: ClassVar[str] = "int"
    bits: int = 8
    symmetric: bool = True
    activations: Activations | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(
                f"integers of {self.bits} bits are not supported; bits must be 8, 4, 3 or 2"
            )
        if self.activations and not (self.bits == 8 and self.symmetric and self.block_size is None):
            raise ValueError(
                "activations are quantized beside symmetric 8-bit weights with one scale an "
                "output only"
            )

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def largest(self) -> float:
        """What the largest magnitude is mapped to."""
        return self.levels / 2

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        if self.symmetric:
            scale = jnp.abs(w).max(-2, keepdims=True) / self.largest
            return nonzero(scale), None
        low, high = (
            jnp.minimum(w.min(-2, keepdims=True), 0),
            jnp.maximum(w.max(-2, keepdims=True), 0),
        )
        scale = nonzero((high - low) / self.levels)
        return scale, jnp.round(-low / scale)

    def encode(
        self, w: jax.Array, scale: jax.Array, zero: jax.Array | None, noise: jax.Array | None = None
    ) -> jax.Array:
        whole = (
            jnp.round(zero) if zero is not None else 0 if self.bits == 8 else self.levels // 2 + 1
        )
        q = w / scale if zero is None else w / scale + (zero - whole)
        if zero is None and noise is None:
            # A block's largest negative weight lies just between two codes, where rounding errors
            # would decide.
            q = jnp.where(q < -self.largest * (1 - 1e-6), q - 0.25, q)
        q = whole + (jnp.round(q) if noise is None else jnp.floor(q + noise))
        if zero is None and self.bits == 8:
            return jnp.clip(q, -128, 127).astype(jnp.int8)
        return jnp.clip(q, 0, self.levels).astype(jnp.uint8)

    def decode(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        q = codes.astype(jnp.float32)
        if zero is None:
            return q if codes.dtype == jnp.int8 else q - (self.levels // 2 + 1)
        return q - zero


FORMAT = StorageFormat(
    name="int",
    made=Int,
    bits=(8, 4, 3, 2),
    follows="the formula of GPTQ and compressed-tensors: scale * (code - zero)",
    examples=(
        Int(bits=8),
        Int(bits=8, block_size=16, symmetric=False),
        Int(bits=4, block_size=16),
        Int(bits=4, block_size=32, symmetric=False),
        Int(bits=3, block_size=16),
        Int(bits=2, block_size=16, symmetric=False),
        Int(bits=8, activations="dynamic"),
        Int(bits=8, activations="static"),
    ),
)
