"""8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from peft_jax.quantization.formats.exact import nonzero
from peft_jax.quantization.formats.format import Activations, Format, StorageFormat
from peft_jax.quantization.formats.stochastic import finite_values, neighbours


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(Format):
    """8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433): e4m3 (up to 448) or e5m2 (up to
    57,344).

    One scale for each output or, `per="tensor"`, one for the matrix. `activations` as for `Int`.
    """

    kind: ClassVar[str] = "fp8"
    bits: int = 8
    type: Literal["e4m3", "e5m2"] = "e4m3"
    per: Literal["channel", "tensor"] = "channel"
    activations: Activations | None = None

    def __post_init__(self) -> None:
        if (
            self.bits != 8
            or self.type not in ("e4m3", "e5m2")
            or self.per not in ("channel", "tensor")
        ):
            raise ValueError(
                f"FP8 is e4m3 or e5m2 per channel or tensor, not {self.type!r} per {self.per!r} of "
                f"{self.bits} bits"
            )
        if self.block_size is not None:
            raise ValueError("FP8 has a scale per channel or tensor and takes no block_size")

    @property
    def storage(self) -> Any:
        return jnp.float8_e4m3fn if self.type == "e4m3" else jnp.float8_e5m2

    @property
    def largest(self) -> float:
        return float(jnp.finfo(self.storage).max)

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        axes = (-2,) if self.per == "channel" else (-2, -1)
        return nonzero(jnp.abs(w).max(axes, keepdims=True) / self.largest), None

    def encode(
        self, w: jax.Array, scale: jax.Array, zero: jax.Array | None, noise: jax.Array | None = None
    ) -> jax.Array:
        x = jnp.clip(w / scale, -self.largest, self.largest)
        if noise is not None:
            values = finite_values(self.storage)
            lower, upper, share = neighbours(x, values)
            x = jnp.where(noise < share, upper, lower)
        return x.astype(self.storage)

    def decode(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        return codes.astype(jnp.float32)


FORMAT = StorageFormat(
    name="fp8",
    made=FP8,
    follows="Micikevicius et al. 2022, arXiv:2209.05433; ml_dtypes",
    examples=(
        FP8(),
        FP8(type="e5m2", per="tensor"),
        FP8(activations="dynamic"),
        FP8(activations="static"),
    ),
)
