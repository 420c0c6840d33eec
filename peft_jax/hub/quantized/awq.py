"""AWQ (gemm): 4-bit integers with zero points, read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.hub.quantized.integers import integer_format, repacked
from peft_jax.hub.quantized.tool import Parts, Read, Tool, expect
from peft_jax.quantization.formats import Int

_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


def _read(
    read: Read, names: frozenset[str], shape: tuple[int, int], config: Mapping[str, Any]
) -> Parts:
    n_in, n_out = shape
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"AWQ version {config['version']!r} is not supported; supported: gemm")
    format = integer_format(
        config.get("bits"), config.get("group_size"), n_in, symmetric=False, known=(4,)
    )
    groups = n_in // (format.block_size or n_in)

    def codes(name: str, rows: int) -> np.ndarray:
        words = expect(name, read(name), (rows, n_out // 8), "i").astype(np.uint32)
        nibbles = np.stack([(words >> np.uint32(4 * i)) & np.uint32(15) for i in range(8)], -1)
        return nibbles[..., np.argsort(_NIBBLES)].reshape(rows, n_out).astype(np.uint8)

    scale = expect("scales", read("scales"), (groups, n_out), "f")
    return Parts(format, repacked(codes("qweight", n_in), 4), scale, codes("qzeros", groups))


TOOL = Tool(
    name="awq",
    marks=("qweight",),
    tensors=("qweight", "qzeros", "scales"),
    read=_read,
    reads=(Int,),
)
