"""A storage format of one's own in one file: NormalFloat with 3 bits.

Installed with a package, an entry point makes it known wherever peft_jax names formats: in YAML
(`quantize.format=nf3`), in `quantize(params, "nf3")`, in folders written with `tool="peft_jax"`.

    [project.entry-points."peft_jax.formats"]
    nf3 = "storage_format:FORMAT"

A program of its own registers it, as below. Numbers that are no table subclass `Format` instead and
say `fit`, `encode` and `decode`; see peft_jax/quantization/formats/mxfp4.py.
"""

import dataclasses
from statistics import NormalDist
from typing import ClassVar

import numpy as np

from peft_jax.quantization.formats import FORMATS, StorageFormat, Table


def quantiles(count: int) -> np.ndarray:
    """`count` quantiles of the normal distribution, the largest first, without its median."""
    shares = np.linspace(0.9677083, 0.5, count + 1)[:-1]
    return np.array([NormalDist().inv_cdf(share) for share in shares])


def normal_float(bits: int) -> np.ndarray:
    """2^bits values in [-1, 1], ascending, with zero and one more above it than below."""
    upper, lower = quantiles(2 ** (bits - 1)), -quantiles(2 ** (bits - 1) - 1)
    values = np.sort([*upper, 0.0, *lower])
    return (values / values.max()).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF3(Table):
    """3-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314, with k = 3)."""

    kind: ClassVar[str] = "nf3"
    bits: int = 3
    table: ClassVar[np.ndarray] = normal_float(3)
    order: ClassVar[np.ndarray] = np.arange(8)


def reference(w: np.ndarray, format: NF3) -> np.ndarray:
    """What comes back of a matrix [in, out]: the nearest of the values, for each block."""
    blocks = w.astype(np.float64).reshape(-1, format.block_size or len(w), w.shape[1])
    scale = np.abs(blocks).max(1, keepdims=True)
    values = normal_float(3).astype(np.float64)
    nearest = np.abs((blocks / scale)[..., None] - values).argmin(-1)
    return (values[nearest] * scale).reshape(w.shape)


FORMAT = StorageFormat(
    name="nf3",
    made=NF3,
    follows="Dettmers et al. 2023, arXiv:2305.14314, appendix E",
    examples=(NF3(block_size=16),),
    reference=reference,
)


if __name__ == "__main__":
    import jax

    import peft_jax

    FORMATS.register(FORMAT)
    model, params = peft_jax.load("builtin:base")
    params = peft_jax.quantize(params, "nf3")
    peft_jax.save("nf3", model, params, tool="peft_jax")
    model, params = peft_jax.load("nf3")
    params = peft_jax.lora(params, jax.random.key(0), rank=8)
    print(peft_jax.core.count(params), "of 3-bit weights under a LoRA")
