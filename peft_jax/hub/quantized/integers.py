"""Integer codes in the words that tools pack them into."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax.core.packing import pack, unpack
from peft_jax.hub.quantized.tool import Parts
from peft_jax.quantization.formats import Int


def words_as_bytes(array: np.ndarray) -> np.ndarray:
    """int32 words [..., n] as their bytes [..., 4 n], lowest first."""
    return np.ascontiguousarray(array).astype("<i4").view(np.uint8)


def bytes_as_words(array: np.ndarray) -> np.ndarray:
    """Bytes [rows, n] as int32 words [rows, n / 4 rounded up], lowest byte first."""
    padded = np.pad(array, ((0, 0), (0, -array.shape[1] % 4)))
    return np.ascontiguousarray(padded).view("<i4")


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    return np.asarray(unpack(jnp.asarray(packed), bits))


def repacked(codes: np.ndarray, bits: int) -> np.ndarray:
    return np.asarray(pack(jnp.asarray(codes), bits)) if bits < 8 else codes


def input_order(g_idx: np.ndarray, groups: int) -> np.ndarray | None:
    """The inputs in the order of their groups, None where they are already. Raises ValueError for
    uneven groups.
    """
    size = len(g_idx) // groups
    if (np.bincount(g_idx, minlength=groups) != size).any():
        raise ValueError(f"g_idx does not share {len(g_idx)} inputs evenly among {groups} groups")
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if (order == np.arange(len(order))).all() else order


def integer_format(
    bits: Any, group: Any, n_in: int, *, symmetric: bool, known: tuple[int, ...]
) -> Int:
    if bits not in known:
        raise ValueError(f"{bits} bits are not supported; supported: {', '.join(map(str, known))}")
    group = None if group in (None, -1) else int(group)
    if group is not None and (group < 1 or n_in % group):
        raise ValueError(f"groups of {group} do not divide its {n_in} inputs")
    return Int(bits=bits, block_size=group, symmetric=symmetric)


def without_zero(
    format: Int, packed: np.ndarray, scale: np.ndarray, zero: np.ndarray, order: np.ndarray | None
) -> Parts:
    """Parts of unsigned codes; the zero points of symmetric ones, all in the middle, are left
    out.
    """
    middle = format.levels // 2 + 1
    if not format.symmetric:
        return Parts(format, packed, scale, zero, order)
    if (zero != middle).any():
        raise ValueError(f"is said to be symmetric, and has zero points other than {middle}")
    if format.bits == 8:
        packed = (packed ^ np.uint8(128)).view(np.int8)
    return Parts(format, packed, scale, None, order)
