"""4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from peft_jax.quantization.formats.format import StorageFormat
from peft_jax.quantization.formats.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(Table):
    """4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314, appendix E): quantiles of a normal
    distribution.

    `double` quantizes the blocks' scales in turn: 4.127 bits a weight with blocks of 64 instead of
    4.5.
    """

    kind: ClassVar[str] = "nf4"
    double: bool = True
    table: ClassVar[np.ndarray] = np.array(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ],
        np.float32,
    )
    order: ClassVar[np.ndarray] = np.arange(16)


FORMAT = StorageFormat(
    name="nf4",
    made=NF4,
    follows="Dettmers et al. 2023, arXiv:2305.14314, appendix E; bitsandbytes",
    examples=(NF4(block_size=16, double=False), NF4(block_size=16)),
)
