"""What comes back of a matrix in each storage format of this package, by other means than its own:
NumPy, ml_dtypes, bitsandbytes. A format of another package brings its reference in its record.
"""

import bitsandbytes.functional as bnb
import ml_dtypes
import numpy as np
import torch


def blocks_of(w, format):
    """w [in, out] as [groups, block, out], float64."""
    return w.astype(np.float64).reshape(-1, format.block_size or len(w), w.shape[1])


def integers(w, format):
    """scale * (code - zero), with codes of 2^bits whole numbers."""
    blocks, levels = blocks_of(w, format), 2**format.bits - 1
    if format.symmetric:
        scale, middle = np.abs(blocks).max(1, keepdims=True) / (levels / 2), (levels + 1) // 2
        codes = np.clip(np.round(blocks / scale), -middle, middle - 1)
        return (codes * scale).reshape(w.shape)
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    scale = ((high - low) / levels)[:, None]
    zero = np.round(-low[:, None] / scale)
    codes = np.clip(np.round(blocks / scale) + zero, 0, levels)
    return ((codes - zero) * scale).reshape(w.shape)


def four_bit_tables(w, format):
    """The nearest of bitsandbytes' values; its own scales of scales where they are doubled."""
    blocks = blocks_of(w, format)
    values = bnb.get_4bit_type(format.kind, device="cpu").numpy().astype(np.float64)
    largest = np.abs(blocks).max(1)  # [groups, out]
    nearest = np.abs((blocks / largest[:, None])[..., None] - values).argmin(-1)
    scale = doubled(largest) if format.double else largest
    return (values[nearest] * scale[:, None]).reshape(w.shape)


def doubled(scale):
    """Scales [groups, out] through bitsandbytes' 8-bit codes, of blocks that run as [out, in]."""
    flat = torch.tensor(scale.T.astype(np.float32)).reshape(-1)
    mean = flat.mean()
    codes, state = bnb.quantize_blockwise(flat - mean, blocksize=256)
    back = bnb.dequantize_blockwise(codes, state) + mean
    return back.numpy().astype(np.float64).reshape(scale.T.shape).T


def eight_bit_floats(w, format):
    """ml_dtypes' cast of the scaled weights."""
    dtype = ml_dtypes.float8_e4m3fn if format.type == "e4m3" else ml_dtypes.float8_e5m2
    axis = 0 if format.per == "channel" else None
    scale = np.abs(w).max(axis, keepdims=True) / np.float32(ml_dtypes.finfo(dtype).max)
    return (w / scale).astype(dtype).astype(np.float64) * scale


def microscaling(w, format):
    """ml_dtypes' cast of the weights over the power of two that the largest is below 8 of."""
    blocks = blocks_of(w, format)
    scale = np.exp2(np.floor(np.log2(np.abs(blocks).max(1, keepdims=True))) - 2)
    inside = (blocks / scale).clip(-6, 6).astype(np.float32)
    return (inside.astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale).reshape(w.shape)


REFERENCES = {
    "int": integers,
    "nf4": four_bit_tables,
    "fp4": four_bit_tables,
    "fp8": eight_bit_floats,
    "mxfp4": microscaling,
}
