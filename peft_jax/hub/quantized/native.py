"""This package's own folders: quantized weights of every registered format and rounding, which
`peft_jax.load` alone reads.

A module has its format's name and options as JSON in bytes, and the arrays of its `Quantized`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.hub.quantized.tool import Parts, Read, Tool, expect
from peft_jax.quantization.dynamic_map import DoubleScale
from peft_jax.quantization.formats import Format, make_format
from peft_jax.quantization.quantize import quantize_weight
from peft_jax.quantization.quantized import Quantized, weight_only

_FORMAT, _CODES, _SCALE = "weight.format", "weight.codes", "weight.scale"
_DOUBLE = tuple(f.name for f in dataclasses.fields(DoubleScale))
_OPTIONAL = ("zero", "order", "smooth", "input_scale")


def _write(w: Quantized) -> dict[str, np.ndarray]:
    """The tensors of one matrix [in, out] by suffix. Raises ValueError for a format that has no
    record, which nothing could read.
    """
    said = json.dumps({"format": w.format.name, "options": _options(w.format)})
    if not _is_known(json.loads(said), w.format):
        raise ValueError(
            f"is in the format {type(w.format).__name__}, which the name {w.format.name!r} does "
            "not give; register a record of it in peft_jax.quantization.formats.FORMATS"
        )
    tensors = {_FORMAT: np.frombuffer(said.encode(), np.uint8), _CODES: w.codes}
    if isinstance(w.scale, DoubleScale):
        tensors |= {f"{_SCALE}.{name}": getattr(w.scale, name) for name in _DOUBLE}
    else:
        tensors[_SCALE] = w.scale
    tensors |= {f"weight.{n}": getattr(w, n) for n in _OPTIONAL if getattr(w, n) is not None}
    return {name: np.asarray(array) for name, array in tensors.items()}


def _options(format: Format) -> dict[str, Any]:
    names = (f.name for f in dataclasses.fields(format) if f.name != "bits")
    return {name: getattr(format, name) for name in names}


def _is_known(said: Mapping[str, Any], format: Format) -> bool:
    """Whether what is said of a format gives it back."""
    try:
        return _made(said) == format
    except ValueError:
        return False


def _made(said: Mapping[str, Any]) -> Format:
    return make_format(str(said["format"]), **said["options"])


def _read(
    read: Read, names: frozenset[str], shape: tuple[int, int], config: Mapping[str, Any]
) -> Parts:
    try:
        format = _made(json.loads(read(_FORMAT).tobytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{_FORMAT} names no storage format: {error}") from error
    wanted = jax.eval_shape(
        lambda w: quantize_weight("weight", w, weight_only(format)),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    scale = {f"{_SCALE}.{n}": n for n in _DOUBLE} if isinstance(wanted.scale, DoubleScale) else {}
    found: dict[str, Any] = {
        n: _like(read, suffix, getattr(wanted.scale, n)) for suffix, n in scale.items()
    }
    groups = shape[0] // (format.block_size or shape[0])
    sizes = {"zero": (groups, shape[1]), "order": shape[:1], "smooth": shape[:1], "input_scale": ()}
    kinds = {"zero": "uf", "order": "i", "smooth": "f", "input_scale": "f"}
    rest = {
        n: expect(f"weight.{n}", read(f"weight.{n}"), sizes[n], kinds[n])
        for n in _OPTIONAL
        if f"weight.{n}" in names
    }
    if "order" in rest and (np.sort(rest["order"]) != np.arange(shape[0])).any():
        raise ValueError("weight.order is no order of its inputs")
    return Parts(
        format=format,
        codes=_like(read, _CODES, wanted.codes),
        scale=DoubleScale(**found) if found else _like(read, _SCALE, wanted.scale),
        **rest,
    )


def _like(read: Read, suffix: str, wanted: Any) -> np.ndarray:
    """The tensor, of this shape and dtype."""
    array = read(suffix)
    if array.shape != wanted.shape or array.dtype != wanted.dtype:
        raise ValueError(
            f"{suffix} has shape {array.shape} and dtype {array.dtype}, expected {wanted.shape} "
            f"and {wanted.dtype}"
        )
    return array


def _config(
    modules: Mapping[str, Quantized], plain: Sequence[str], float32: Sequence[str]
) -> dict[str, Any]:
    return {"quant_method": TOOL.name}


TOOL = Tool(
    name="peft_jax",
    marks=(_FORMAT,),
    tensors=(
        _FORMAT,
        _CODES,
        _SCALE,
        *(f"{_SCALE}.{n}" for n in _DOUBLE),
        *(f"weight.{n}" for n in _OPTIONAL),
    ),
    read=_read,
    write=_write,
    config=_config,
    own=True,
)
