"""compressed-tensors, which vLLM reads: integers, 8-bit floats and MXFP4, in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax.hub.names import is_conv1d
from peft_jax.hub.quantized.integers import (
    bytes_as_words,
    input_order,
    integer_format,
    repacked,
    unpacked,
    without_zero,
    words_as_bytes,
)
from peft_jax.hub.quantized.tool import Parts, Read, Tool, expect, held_formats
from peft_jax.quantization.formats import FP8, MXFP4, Format, Int
from peft_jax.quantization.quantized import Quantized

_TENSORS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)


def _read(
    read: Read, names: frozenset[str], shape: tuple[int, int], config: Mapping[str, Any]
) -> Parts:
    n_in, n_out = shape
    format = _scheme_format(names, config, n_in, read)
    if isinstance(format, MXFP4):
        codes = expect("weight_packed", read("weight_packed"), (n_out, n_in // 2), "u").T
        return Parts(
            format, codes, expect("weight_scale", read("weight_scale"), (n_out, n_in // 32), "u").T
        )
    scale = read("weight_scale")
    groups = n_in // (format.block_size or n_in)
    wanted = (1, 1) if isinstance(format, FP8) and format.per == "tensor" else (n_out, groups)
    scale = expect(
        "weight_scale",
        scale.reshape(wanted) if scale.size == np.prod(wanted) else scale,
        wanted,
        "f",
    ).T
    static = read("input_scale").reshape(()).astype(np.float32) if "input_scale" in names else None
    if isinstance(format, FP8):
        return Parts(
            format,
            expect("weight", read("weight"), (n_out, n_in), "f").T,
            scale,
            input_scale=static,
        )
    assert isinstance(format, Int)
    if "weight" in names:
        codes = expect("weight", read("weight"), (n_out, n_in), "i").T
        if format.symmetric:
            return Parts(format, codes, scale, input_scale=static)
        found = read("weight_zero_point")
        zero = expect(
            "weight_zero_point",
            found.reshape(wanted) if found.size == n_out * groups else found,
            wanted,
            "i",
        ).T

        def unsigned(a):
            return (a.astype(np.int16) + 128).astype(np.uint8)

        return Parts(format, unsigned(codes), scale, unsigned(zero), input_scale=static)
    row = -(-n_in * format.bits // 32)
    packed = words_as_bytes(expect("weight_packed", read("weight_packed"), (n_out, row), "i"))[
        :, : n_in * format.bits // 8
    ].T
    zero = np.full((groups, n_out), format.levels // 2 + 1, np.uint8)
    if not format.symmetric:
        zero_words = words_as_bytes(
            expect(
                "weight_zero_point",
                read("weight_zero_point"),
                (-(-n_out * format.bits // 32), groups),
                "i",
            ).T
        )
        zero = unpacked(zero_words.T, format.bits)[:n_out].T
    order = (
        input_order(expect("weight_g_idx", read("weight_g_idx"), (n_in,), "i"), groups)
        if "weight_g_idx" in names
        else None
    )
    if order is not None:
        packed = repacked(unpacked(packed, format.bits)[order], format.bits)
    return without_zero(format, packed, scale, zero, order)


def _scheme_format(
    names: frozenset[str], config: Mapping[str, Any], n_in: int, read: Read
) -> Format:
    """The format of a module. Groups are told apart by what the module holds, not by their
    targets.
    """
    groups = [
        g
        for g in config.get("config_groups", {}).values()
        if isinstance(g, Mapping) and g.get("weights")
    ]
    fitting = [g for g in groups if _holds(g, names, n_in, read)]
    if not fitting:
        raise ValueError("none of the config_groups describes the tensors that are there")
    weights, inputs = fitting[0]["weights"], fitting[0].get("input_activations")
    _check_scheme(fitting[0], config, names, read)
    activations = None if not inputs else "dynamic" if inputs.get("dynamic") else "static"
    if weights["type"] == "float" and weights["num_bits"] == 4:
        return MXFP4()
    if weights["type"] == "float":
        return FP8(
            per="tensor" if weights.get("strategy") == "tensor" else "channel",
            activations=activations,
        )
    format = integer_format(
        weights["num_bits"],
        weights.get("group_size"),
        n_in,
        symmetric=bool(weights.get("symmetric", True)),
        known=(2, 3, 4, 8),
    )
    return dataclasses.replace(format, activations=activations)


# What the fields of a scheme may say; other values change what is computed, and are refused by
# name.
_WEIGHTS = {
    "dynamic": (False, None),
    "strategy": ("channel", "group", "tensor", None),
    "block_structure": (None,),
}


_INPUTS = {
    "num_bits": (8, None),
    "symmetric": (True, None),
    "group_size": (None,),
    "block_structure": (None,),
}


def _check_scheme(
    group: Mapping[str, Any], config: Mapping[str, Any], names: frozenset[str], read: Read
) -> None:
    """Raise ValueError for a field of compressed-tensors' scheme that asks for what is not computed
    here.
    """
    weights, inputs = group["weights"], group.get("input_activations") or {}
    expected = {("weights", k): v for k, v in _WEIGHTS.items()}
    if weights.get("actorder") in ("group", "dynamic", True) and "weight_g_idx" not in names:
        raise ValueError(
            "weights.actorder says that inputs are reordered, and weight_g_idx is not there"
        )
    if inputs:
        expected |= {("input_activations", k): v for k, v in _INPUTS.items()}
        strategy = ("token", None) if inputs.get("dynamic") is True else ("tensor", None)
        expected[("input_activations", "dynamic")] = (True, False, None)
        expected[("input_activations", "strategy")] = strategy
        expected[("input_activations", "type")] = (weights.get("type"), None)
    for (part, field), allowed in expected.items():
        value = group[part].get(field)
        if value not in allowed:
            known = ", ".join(repr(v) for v in allowed if v is not None) or "none"
            raise ValueError(
                f"{part}.{field}={value!r} of the scheme is not supported; supported: {known}"
            )
    for name, value in (
        ("output_activations", group.get("output_activations")),
        ("transform_config", config.get("transform_config")),
    ):
        if value:
            raise ValueError(f"{name}={value!r} of the scheme is not supported")
    if "input_zero_point" in names and read("input_zero_point").astype(np.float32).any():
        raise ValueError(
            "input_zero_point is not zero, and inputs are quantized symmetrically here"
        )


def _holds(group: Mapping[str, Any], names: frozenset[str], n_in: int, read: Read) -> bool:
    """Whether a module's tensors can be of a group: packed ones by the width of a row, others by
    their dtype.
    """
    weights = group["weights"]
    bits, kind = weights.get("num_bits"), weights.get("type")
    if "weight_packed" not in names:
        return bits == 8 and ("f" if kind == "float" else "i") == (
            "f" if "float8" in read("weight").dtype.name else "i"
        )
    row = read("weight_packed").shape[-1]
    if kind == "float":
        return bits == 4 and weights.get("group_size") == 32 and row == n_in // 2
    if row != -(-n_in * bits // 32):
        return False
    scales = read("weight_scale")
    size = weights.get("group_size")
    return scales.ndim == 2 and scales.shape[1] == (1 if size in (None, -1) else n_in // size)


def _write(w: Quantized) -> dict[str, np.ndarray]:
    """The tensors of one matrix [in, out] by suffix. Raises ValueError for what the format cannot
    hold.
    """
    _check_held(w)
    n_in, n_out = w.in_sizes[0], w.out_sizes[0]
    codes, scale = np.asarray(w.codes), np.asarray(w.scale).T
    static = {} if w.input_scale is None else {"input_scale": np.asarray(w.input_scale).reshape(1)}
    if isinstance(w.format, MXFP4):
        return {"weight_packed": codes.T, "weight_scale": scale}
    if isinstance(w.format, FP8):
        return {
            "weight": codes.T,
            "weight_scale": scale.reshape(1) if scale.size == 1 else scale,
            **static,
        }
    format = w.format
    assert isinstance(format, Int)
    if format.activations:
        return {"weight": codes.T, "weight_scale": scale, **static}
    unsigned = codes.view(np.uint8) ^ np.uint8(128) if codes.dtype == np.int8 else codes
    tensors = {
        "weight_packed": bytes_as_words(unsigned.T),
        "weight_scale": scale,
        "weight_shape": np.asarray([n_out, n_in], np.int64),
    }
    if w.zero is not None:
        zero = repacked(
            _padded(np.asarray(w.zero).T.astype(np.uint8), 32), format.bits
        )  # [out * bits / 8, groups]
        tensors["weight_zero_point"] = bytes_as_words(zero.T).T[: -(-n_out * format.bits // 32)]
    return tensors


def _check_held(w: Quantized) -> None:
    if isinstance(w.format, FP8) and w.format.type == "e5m2":
        raise ValueError("compressed-tensors has no e5m2 weights; use e4m3")
    if w.smooth is not None:
        raise ValueError(
            "has inputs scaled by AWQ or SmoothQuant, which compressed-tensors keeps in the "
            "layer before"
        )
    if w.order is not None:
        raise ValueError("has inputs in activation order, which compressed-tensors no longer holds")
    if w.zero is not None and not np.issubdtype(np.asarray(w.zero).dtype, np.integer):
        raise ValueError(
            "has fractional zero points (HQQ, QA-LoRA), which compressed-tensors cannot hold"
        )


def _padded(array: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(array, ((0, -len(array) % multiple), (0, 0)))


def _group(format: Format) -> tuple[str, dict[str, Any]]:
    """(compressor's name, entry of config_groups) of a format."""
    if isinstance(format, MXFP4):
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "dynamic": False,
        }
        weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        return "mxfp4-pack-quantized", {"weights": weights, "input_activations": None}
    kind = "float" if isinstance(format, FP8) else "int"
    strategy = (
        "group"
        if format.block_size
        else "tensor"
        if getattr(format, "per", "") == "tensor"
        else "channel"
    )
    weights = {
        "num_bits": format.bits,
        "type": kind,
        "symmetric": getattr(format, "symmetric", True),
        "strategy": strategy,
        "group_size": format.block_size,
        "dynamic": False,
    }
    inputs, activations = None, getattr(format, "activations", None)
    if activations:
        dynamic = activations == "dynamic"
        strategy = "token" if dynamic else "tensor"
        inputs = {
            "num_bits": 8,
            "type": kind,
            "symmetric": True,
            "strategy": strategy,
            "dynamic": dynamic,
        }
    name = (
        "float-quantized"
        if kind == "float"
        else "int-quantized"
        if activations
        else "pack-quantized"
    )
    return name, {"weights": weights, "input_activations": inputs}


def _config(
    modules: Mapping[str, Quantized], plain: Sequence[str], float32: Sequence[str]
) -> dict[str, Any]:
    by_format: dict[Format, list[str]] = {}
    for name, w in modules.items():
        if is_conv1d(name):
            raise ValueError(
                f"{name} is a Conv1D in transformers, which reads no compressed-tensors there; "
                f"{held_formats(without=TOOL.name)}"
            )
        by_format.setdefault(w.format, []).append(name)
    groups, names = {}, set()
    for i, (format, members) in enumerate(by_format.items()):
        name, entry = _group(format)
        names.add(name)
        targets = ["Linear"] if len(by_format) == 1 else members
        groups[f"group_{i}"] = {
            "targets": targets,
            "output_activations": None,
            "format": name,
            **entry,
        }
    config = {
        "quant_method": "compressed-tensors",
        "format": names.pop() if len(names) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(plain),
        "kv_cache_scheme": None,
    }
    dense = any(_read_dense(module, w.format, float32) for module, w in modules.items())
    return config | ({"dequantize": True} if dense else {})


def _read_dense(module: str, format: Format, float32: Sequence[str]) -> bool:
    """Whether transformers 5 must dequantize a module as it loads it.

    It has no room for packed zero points, decodes MXFP4 to bfloat16 whatever the model's dtype, and
    looks at the dtype of weights that it keeps in float32, which packed modules do not have.
    """
    if isinstance(format, MXFP4) or not getattr(format, "symmetric", True):
        return True
    return _group(format)[0] == "pack-quantized" and module.endswith(tuple(float32))


TOOL = Tool(
    name="compressed-tensors",
    marks=("weight_packed", "weight_scale"),
    tensors=_TENSORS,
    read=_read,
    reads=(Int, FP8, MXFP4),
    writes=(Int, FP8, MXFP4),
    write=_write,
    config=_config,
)
