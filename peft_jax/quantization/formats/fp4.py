"""The 4-bit float of bitsandbytes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from peft_jax.quantization.formats.format import StorageFormat
from peft_jax.quantization.formats.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP4(Table):
    """The 4-bit float of bitsandbytes: sign, two bits of exponent, one of mantissa, over 12."""

    kind: ClassVar[str] = "fp4"
    table: ClassVar[np.ndarray] = (
        np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32)
        / np.float32(12)
    ).astype(np.float32)
    order: ClassVar[np.ndarray] = np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3])


FORMAT = StorageFormat(
    name="fp4",
    made=FP4,
    follows="bitsandbytes",
    examples=(FP4(block_size=32), FP4(block_size=16, double=True)),
)
