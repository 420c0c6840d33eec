"""GPTQ, in its two versions: integers, read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.hub.quantized.integers import (
    input_order,
    integer_format,
    repacked,
    unpacked,
    without_zero,
    words_as_bytes,
)
from peft_jax.hub.quantized.tool import Parts, Read, Tool, expect
from peft_jax.hub.safetensors_io import NamedTensors
from peft_jax.quantization.formats import Int

logger = logging.getLogger("peft_jax")


_BITS = (2, 3, 4, 8)


def _read(
    read: Read, names: frozenset[str], shape: tuple[int, int], config: Mapping[str, Any]
) -> Parts:
    (n_in, n_out), bits = shape, config.get("bits")
    format = integer_format(
        bits,
        config.get("group_size"),
        n_in,
        symmetric=bool(config.get("sym", True)),
        known=_BITS,
    )
    groups = n_in // (format.block_size or n_in)
    words = expect("qweight", read("qweight"), (n_in * format.bits // 32, n_out), "i")
    packed = np.moveaxis(words_as_bytes(words.reshape(*words.shape, 1)), -1, 1).reshape(-1, n_out)
    zero = _stored_zeros(
        expect("qzeros", read("qzeros"), (groups, n_out * format.bits // 32), "i"), format.bits
    )
    if (
        config.get("checkpoint_format", "gptq") == "gptq"
    ):  # the first version stores zero points less one
        zero = (zero.astype(np.int32) + 1).astype(np.uint8) & np.uint8(format.levels)
    scale = expect("scales", read("scales"), (groups, n_out), "f")
    order = (
        input_order(expect("g_idx", read("g_idx"), (n_in,), "i"), groups)
        if "g_idx" in names
        else None
    )
    if order is not None:
        packed = repacked(unpacked(packed, format.bits)[order], format.bits)
    return without_zero(format, packed, scale, zero, order)


def _stored_zeros(words: np.ndarray, bits: int) -> np.ndarray:
    """The zero points [groups, out] as they are stored."""
    return unpacked(words_as_bytes(words).T, bits).T


def _true_version(checkpoint: NamedTensors, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with the version that a symmetric checkpoint holds, whichever it says: its
    zero points all are the middle, which the first version stores less one.
    """
    said, bits = config.get("checkpoint_format", "gptq"), config.get("bits")
    name = next((n for n in checkpoint.names if n.endswith(".qzeros")), None)
    if (
        name is None
        or bits not in _BITS
        or not config.get("sym", True)
        or said not in ("gptq", "gptq_v2")
    ):
        return config
    stored, middle = _stored_zeros(checkpoint.read(name), bits), 2 ** (bits - 1)
    found = next(
        (v for v, zero in (("gptq", middle - 1), ("gptq_v2", middle)) if (stored == zero).all()),
        said,
    )
    if found != said:
        logger.warning(
            f"checkpoint_format says {said}, and {name} holds the zero points of {found}: it is "
            f"read as {found}"
        )
    return {**config, "checkpoint_format": found}


TOOL = Tool(
    name="gptq",
    marks=("qweight",),
    tensors=("qweight", "qzeros", "scales", "g_idx"),
    read=_read,
    reads=(Int,),
    settle=_true_version,
)
