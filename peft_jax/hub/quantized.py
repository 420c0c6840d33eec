"""Quantized checkpoints in and out, codes as they are: nothing is dequantized on the way.

Read: bitsandbytes (4 and 8 bits), GPTQ, AWQ and compressed-tensors. Written: compressed-tensors,
which vLLM reads, and bitsandbytes NF4 and FP4. Hugging Face weights are [out, in]; here a matrix is
[in, out].
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.packing import pack, unpack
from peft_jax.hub.names import is_conv1d
from peft_jax.hub.safetensors_io import Checkpoint
from peft_jax.quantization.dynamic_map import BLOCK, DoubleScale, dynamic_map
from peft_jax.quantization.formats import FP4, FP8, MXFP4, NF4, Format, Int
from peft_jax.quantization.quantized import Quantized

logger = logging.getLogger("peft_jax")
Read = Callable[[str], np.ndarray]  # suffix of a module's tensor -> the tensor


class Parts(NamedTuple):
    """One matrix as `Quantized` keeps it, on the host."""

    format: Format
    codes: np.ndarray
    scale: Any
    zero: np.ndarray | None = None
    order: np.ndarray | None = None
    input_scale: np.ndarray | None = None


class Scheme(NamedTuple):
    """How one tool stores a quantized module: the tensor that marks it, those that belong to it,
    and its matrix.

    `settle` gives the configuration as a checkpoint bears it out.
    """

    marks: tuple[str, ...]
    tensors: tuple[str, ...]
    read: Callable[[Read, frozenset[str], tuple[int, int], Mapping[str, Any]], Parts]
    settle: Callable[[Checkpoint, Mapping[str, Any]], Mapping[str, Any]] = (
        lambda checkpoint, config: config
    )


class QuantizedReader:
    """Reads the quantized modules of a checkpoint; `config` is its `quantization_config`.

    Raises ValueError for a method that is not supported, naming those that are.
    """

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> None:
        self._checkpoint, self._config = checkpoint, config or {}
        method = str(self._config.get("quant_method", "")) if config else ""
        if config and method not in SCHEMES:
            raise ValueError(
                f"quant_method {method!r} is not supported; supported: {', '.join(SCHEMES)}"
            )
        self._scheme = SCHEMES[method] if config else None
        if self._scheme is not None:
            self._config = self._scheme.settle(checkpoint, self._config)
        self._names = set(checkpoint.names)

    def tensors(self, module: str) -> list[str]:
        """The tensors of a quantized module; none where the module is not quantized."""
        if self._scheme is None or not any(
            f"{module}.{m}" in self._names for m in self._scheme.marks
        ):
            return []
        return [f"{module}.{t}" for t in self._scheme.tensors if f"{module}.{t}" in self._names]

    def weight(
        self, modules: list[tuple[str, int | None]], shape: tuple[int, ...], dtype: Any
    ) -> Quantized:
        """The Quantized weight of logical shape [in, out], or [layers, in, out] of stacked
        modules.
        """
        parts = [self._parts(module, (shape[-2], shape[-1])) for module, _ in modules]
        stacked = modules[0][1] is not None
        return assemble_parts(modules[0][0], parts, shape, dtype, stacked=stacked)

    def _parts(self, module: str, shape: tuple[int, int]) -> Parts:
        assert self._scheme is not None
        names = frozenset(n.removeprefix(module + ".") for n in self.tensors(module))

        @functools.cache
        def read(suffix: str) -> np.ndarray:
            if suffix not in names:
                raise ValueError(f"{module} is quantized and lacks {module}.{suffix}")
            return self._checkpoint.read(f"{module}.{suffix}")

        try:
            return self._scheme.read(read, names, shape, self._config)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error


def assemble_parts(
    name: str, parts: list[Parts], shape: tuple[int, ...], dtype: Any, *, stacked: bool
) -> Quantized:
    """One weight of the parts of its layers. Raises ValueError where layers differ in format."""
    if len({p.format for p in parts}) > 1 or len({p.zero is None for p in parts}) > 1:
        raise ValueError(
            f"the layers of {name} differ in their quantization; load with scan_layers=False"
        )
    if any(p.order is not None for p in parts):
        parts = [
            p if p.order is not None else p._replace(order=np.arange(shape[-2], dtype=np.int32))
            for p in parts
        ]
    fields = [p._asdict() for p in parts]
    arrays = [{k: v for k, v in f.items() if k != "format"} for f in fields]
    joined = jax.tree.map(lambda *a: jnp.asarray(np.stack(a) if stacked else a[0]), *arrays)
    return Quantized(
        **joined,
        format=parts[0].format,
        logical_dtype=jnp.dtype(dtype),
        in_sizes=(shape[-2],),
        out_sizes=(shape[-1],),
    )


def _expect(name: str, array: np.ndarray, shape: tuple[int, ...], dtypes: str) -> np.ndarray:
    """The array, if its shape and the kind of its dtype are as they should be."""
    kind = (
        "f"
        if array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
        else array.dtype.kind
    )
    if array.shape != shape or kind not in dtypes:
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}, expected shape {shape}"
        )
    return array


def _words(array: np.ndarray) -> np.ndarray:
    """int32 words [..., n] as their bytes [..., 4 n], lowest first."""
    return np.ascontiguousarray(array).astype("<i4").view(np.uint8)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    return np.asarray(unpack(jnp.asarray(packed), bits))


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    return np.asarray(pack(jnp.asarray(codes), bits)) if bits < 8 else codes


def _order(g_idx: np.ndarray, groups: int) -> np.ndarray | None:
    """The inputs in the order of their groups, None where they are already. Raises ValueError for
    uneven groups.
    """
    size = len(g_idx) // groups
    if (np.bincount(g_idx, minlength=groups) != size).any():
        raise ValueError(f"g_idx does not share {len(g_idx)} inputs evenly among {groups} groups")
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if (order == np.arange(len(order))).all() else order


# -------------------------------------------------------------------------------------------------
# bitsandbytes


def _bitsandbytes(
    read: Read, names: frozenset[str], shape: tuple[int, int], config: Mapping[str, Any]
) -> Parts:
    return _llm_int8(read, shape) if "SCB" in names else _bnb4(read, names, shape)


def _llm_int8(read: Read, shape: tuple[int, int]) -> Parts:
    weight = _expect("weight", read("weight"), shape[::-1], "i")
    scale = _expect("SCB", read("SCB"), (shape[1],), "f").astype(np.float32) / 127
    return Parts(Int(bits=8), weight.T, scale[None])


def _bnb4(read: Read, names: frozenset[str], shape: tuple[int, int]) -> Parts:
    n_in, n_out = shape
    kind = "nf4" if "weight.quant_state.bitsandbytes__nf4" in names else "fp4"
    try:
        state = json.loads(read(f"weight.quant_state.bitsandbytes__{kind}").tobytes())
        block, stored = int(state["blocksize"]), tuple(state["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"weight.quant_state is not the JSON that bitsandbytes writes: {error}"
        ) from error
    if stored != (n_out, n_in):
        raise ValueError(f"weight.quant_state says shape {stored}, expected {(n_out, n_in)}")
    if block < 2 or n_in % block:
        raise ValueError(
            f"blocks of {block} do not divide its {n_in} inputs and would straddle outputs"
        )
    made = {"nf4": NF4, "fp4": FP4}[kind]
    if not np.allclose(
        _expect("weight.quant_map", read("weight.quant_map"), (16,), "f"), made.table, atol=1e-6
    ):
        raise ValueError(f"weight.quant_map is not the {kind} table")
    flat = (
        _expect("weight", read("weight"), (n_in * n_out // 2, 1), "u").reshape(n_out, n_in // 2).T
    )
    codes = (flat >> 4) | (flat << 4)  # the first of two codes takes the high bits there
    double = "weight.nested_absmax" in names
    absmax = _expect(
        "weight.absmax", read("weight.absmax"), (n_out * n_in // block,), "u" if double else "f"
    )
    absmax = absmax.reshape(n_out, n_in // block).T
    format = made(block_size=block, double=double)
    if not double:
        return Parts(format, codes, absmax.astype(np.float32))
    if state.get("nested_blocksize") != BLOCK:
        raise ValueError(
            f"nested blocks of {state.get('nested_blocksize')} are not supported; bitsandbytes "
            f"writes {BLOCK}"
        )
    if not np.allclose(
        _expect("weight.nested_quant_map", read("weight.nested_quant_map"), (256,), "f"),
        dynamic_map(),
        atol=1e-6,
    ):
        raise ValueError("weight.nested_quant_map is not the dynamic map")
    nested = _expect(
        "weight.nested_absmax", read("weight.nested_absmax"), (-(-absmax.size // BLOCK),), "f"
    )
    return Parts(
        format,
        codes,
        DoubleScale(absmax, nested.astype(np.float32), np.float32(state["nested_offset"])),
    )  # type: ignore[arg-type]


def write_bitsandbytes(w: Quantized) -> dict[str, np.ndarray]:
    """The tensors of one 4-bit matrix [in, out] by suffix. Raises ValueError for another format or
    `smooth`, `order`.
    """
    if not isinstance(w.format, (NF4, FP4)) or w.smooth is not None or w.order is not None:
        raise ValueError("bitsandbytes holds NF4 and FP4 in nearest or stochastic rounding only")
    n_in, n_out = w.in_sizes[0], w.out_sizes[0]
    codes = np.asarray(w.codes).T
    dtype = str(jnp.dtype(w.dtype))
    state: dict[str, Any] = {
        "quant_type": w.format.kind,
        "blocksize": w.format.block_size,
        "dtype": dtype,
        "shape": [n_out, n_in],
    }
    tensors = {
        "weight": ((codes >> 4) | (codes << 4)).reshape(-1, 1),
        "weight.quant_map": w.format.table,
        "weight.absmax": np.asarray(
            w.scale.codes if isinstance(w.scale, DoubleScale) else w.scale
        ).T.reshape(-1),
    }
    if isinstance(w.scale, DoubleScale):
        tensors["weight.nested_absmax"] = np.asarray(w.scale.absmax)
        tensors["weight.nested_quant_map"] = dynamic_map()
        offset = float(np.asarray(w.scale.offset))
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    name = f"weight.quant_state.bitsandbytes__{w.format.kind}"
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


# -------------------------------------------------------------------------------------------------
# GPTQ and AWQ


_GPTQ_BITS = (2, 3, 4, 8)


def _integer(bits: Any, group: Any, n_in: int, *, symmetric: bool, known: tuple[int, ...]) -> Int:
    if bits not in known:
        raise ValueError(f"{bits} bits are not supported; supported: {', '.join(map(str, known))}")
    group = None if group in (None, -1) else int(group)
    if group is not None and (group < 1 or n_in % group):
        raise ValueError(f"groups of {group} do not divide its {n_in} inputs")
    return Int(bits=bits, block_size=group, symmetric=symmetric)


def _gptq(
    read: Read, names: frozenset[str], shape: tuple[int, int], config: Mapping[str, Any]
) -> Parts:
    (n_in, n_out), bits = shape, config.get("bits")
    format = _integer(
        bits,
        config.get("group_size"),
        n_in,
        symmetric=bool(config.get("sym", True)),
        known=_GPTQ_BITS,
    )
    groups = n_in // (format.block_size or n_in)
    words = _expect("qweight", read("qweight"), (n_in * format.bits // 32, n_out), "i")
    packed = np.moveaxis(_words(words.reshape(*words.shape, 1)), -1, 1).reshape(-1, n_out)
    zero = _gptq_zeros(
        _expect("qzeros", read("qzeros"), (groups, n_out * format.bits // 32), "i"), format.bits
    )
    if (
        config.get("checkpoint_format", "gptq") == "gptq"
    ):  # the first version stores zero points less one
        zero = (zero.astype(np.int32) + 1).astype(np.uint8) & np.uint8(format.levels)
    scale = _expect("scales", read("scales"), (groups, n_out), "f")
    order = (
        _order(_expect("g_idx", read("g_idx"), (n_in,), "i"), groups) if "g_idx" in names else None
    )
    if order is not None:
        packed = _packed(_unpacked(packed, format.bits)[order], format.bits)
    return _without_zero(format, packed, scale, zero, order)


def _gptq_zeros(words: np.ndarray, bits: int) -> np.ndarray:
    """The zero points [groups, out] as they are stored."""
    return _unpacked(_words(words).T, bits).T


def _gptq_version(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with the version that a symmetric checkpoint holds, whichever it says: its
    zero points all are the middle, which the first version stores less one.
    """
    said, bits = config.get("checkpoint_format", "gptq"), config.get("bits")
    name = next((n for n in checkpoint.names if n.endswith(".qzeros")), None)
    if (
        name is None
        or bits not in _GPTQ_BITS
        or not config.get("sym", True)
        or said not in ("gptq", "gptq_v2")
    ):
        return config
    stored, middle = _gptq_zeros(checkpoint.read(name), bits), 2 ** (bits - 1)
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


def _without_zero(
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


_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq(
    read: Read, names: frozenset[str], shape: tuple[int, int], config: Mapping[str, Any]
) -> Parts:
    n_in, n_out = shape
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"AWQ version {config['version']!r} is not supported; supported: gemm")
    format = _integer(
        config.get("bits"), config.get("group_size"), n_in, symmetric=False, known=(4,)
    )
    groups = n_in // (format.block_size or n_in)

    def codes(name: str, rows: int) -> np.ndarray:
        words = _expect(name, read(name), (rows, n_out // 8), "i").astype(np.uint32)
        nibbles = np.stack([(words >> np.uint32(4 * i)) & np.uint32(15) for i in range(8)], -1)
        return nibbles[..., np.argsort(_AWQ_ORDER)].reshape(rows, n_out).astype(np.uint8)

    scale = _expect("scales", read("scales"), (groups, n_out), "f")
    return Parts(format, _packed(codes("qweight", n_in), 4), scale, codes("qzeros", groups))


# ---------------------------------------------------------------------------------------------
# compressed-tensors


def _compressed_tensors(
    read: Read, names: frozenset[str], shape: tuple[int, int], config: Mapping[str, Any]
) -> Parts:
    n_in, n_out = shape
    format = _scheme_format(names, config, n_in, read)
    if isinstance(format, MXFP4):
        codes = _expect("weight_packed", read("weight_packed"), (n_out, n_in // 2), "u").T
        return Parts(
            format, codes, _expect("weight_scale", read("weight_scale"), (n_out, n_in // 32), "u").T
        )
    scale = read("weight_scale")
    groups = n_in // (format.block_size or n_in)
    wanted = (1, 1) if isinstance(format, FP8) and format.per == "tensor" else (n_out, groups)
    scale = _expect(
        "weight_scale",
        scale.reshape(wanted) if scale.size == np.prod(wanted) else scale,
        wanted,
        "f",
    ).T
    static = read("input_scale").reshape(()).astype(np.float32) if "input_scale" in names else None
    if isinstance(format, FP8):
        return Parts(
            format,
            _expect("weight", read("weight"), (n_out, n_in), "f").T,
            scale,
            input_scale=static,
        )
    assert isinstance(format, Int)
    if "weight" in names:
        codes = _expect("weight", read("weight"), (n_out, n_in), "i").T
        if format.symmetric:
            return Parts(format, codes, scale, input_scale=static)
        found = read("weight_zero_point")
        zero = _expect(
            "weight_zero_point",
            found.reshape(wanted) if found.size == n_out * groups else found,
            wanted,
            "i",
        ).T

        def unsigned(a):
            return (a.astype(np.int16) + 128).astype(np.uint8)

        return Parts(format, unsigned(codes), scale, unsigned(zero), input_scale=static)
    row = -(-n_in * format.bits // 32)
    packed = _words(_expect("weight_packed", read("weight_packed"), (n_out, row), "i"))[
        :, : n_in * format.bits // 8
    ].T
    zero = np.full((groups, n_out), format.levels // 2 + 1, np.uint8)
    if not format.symmetric:
        zero_words = _words(
            _expect(
                "weight_zero_point",
                read("weight_zero_point"),
                (-(-n_out * format.bits // 32), groups),
                "i",
            ).T
        )
        zero = _unpacked(zero_words.T, format.bits)[:n_out].T
    order = (
        _order(_expect("weight_g_idx", read("weight_g_idx"), (n_in,), "i"), groups)
        if "weight_g_idx" in names
        else None
    )
    if order is not None:
        packed = _packed(_unpacked(packed, format.bits)[order], format.bits)
    return _without_zero(format, packed, scale, zero, order)


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
    format = _integer(
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


def write_compressed_tensors(w: Quantized) -> dict[str, np.ndarray]:
    """The tensors of one matrix [in, out] by suffix. Raises ValueError for what the format cannot
    hold.
    """
    _check_compressed(w)
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
        "weight_packed": _as_words(unsigned.T),
        "weight_scale": scale,
        "weight_shape": np.asarray([n_out, n_in], np.int64),
    }
    if w.zero is not None:
        zero = _packed(
            _padded(np.asarray(w.zero).T.astype(np.uint8), 32), format.bits
        )  # [out * bits / 8, groups]
        tensors["weight_zero_point"] = _as_words(zero.T).T[: -(-n_out * format.bits // 32)]
    return tensors


def _check_compressed(w: Quantized) -> None:
    if isinstance(w.format, FP8) and w.format.type == "e5m2":
        raise ValueError("compressed-tensors has no e5m2 weights; use e4m3")
    if not isinstance(w.format, (Int, FP8, MXFP4)):
        raise ValueError(f"compressed-tensors has no {w.format.kind}; save as bitsandbytes")
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


def _as_words(array: np.ndarray) -> np.ndarray:
    """Bytes [rows, n] as int32 words [rows, n / 4 rounded up], lowest byte first."""
    padded = np.pad(array, ((0, 0), (0, -array.shape[1] % 4)))
    return np.ascontiguousarray(padded).view("<i4")


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


# --------------------------------------------------------------------------------------------------
# writing


def writer(
    weights: Iterable[Quantized],
) -> tuple[str, Callable[[Quantized], dict[str, np.ndarray]]]:
    """(method, function) that writes all of the weights: bitsandbytes for NF4 and FP4,
    compressed-tensors for others.

    Raises ValueError where neither can.
    """
    tables = {isinstance(w.format, (NF4, FP4)) for w in weights}
    if len(tables) > 1:
        raise ValueError(
            "NF4 or FP4 beside other formats fits no checkpoint format; quantize all alike or "
            "dequantize some"
        )
    return (
        ("bitsandbytes", write_bitsandbytes)
        if tables == {True}
        else ("compressed-tensors", write_compressed_tensors)
    )


def quantization_config(
    method: str, modules: Mapping[str, Quantized], plain: Sequence[str], float32: Sequence[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of a folder: of the linear modules that transformers has, `modules`
    are quantized and `plain` are not. `float32` are the ends of names of those that it keeps in
    float32.

    Raises ValueError for a module that transformers would not read as quantized.
    """
    if method == "bitsandbytes":
        return _bitsandbytes_config(modules, plain, float32)
    return _compressed_tensors_config(modules, plain, float32)


def _bitsandbytes_config(
    modules: Mapping[str, Quantized], plain: Sequence[str], float32: Sequence[str]
) -> dict[str, Any]:
    formats = {w.format for w in modules.values()}
    if len(formats) > 1:
        raise ValueError("bitsandbytes folders have one 4-bit format for all weights")
    for module in modules:
        if name := next((name for name in (*plain, *float32) if _passes_over(name, module)), None):
            why = (
                "keeps it in float32"
                if name in float32
                else f"passes over it with {name}, which is not quantized"
            )
            raise ValueError(
                f"{module}: transformers {why}; quantize with exclude={module.rpartition('.')[2]!r}"
            )
    format: Any = formats.pop()
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": format.kind,
        "bnb_4bit_use_double_quant": format.double,
        "bnb_4bit_compute_dtype": str(next(iter(modules.values())).dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(plain),
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def _passes_over(name: str, module: str) -> bool:
    """Whether transformers leaves a module as it is where `name` is to be skipped (its
    `should_convert_module`).
    """
    return module.endswith(name) or module.startswith(name + ".")


def _compressed_tensors_config(
    modules: Mapping[str, Quantized], plain: Sequence[str], float32: Sequence[str]
) -> dict[str, Any]:
    by_format: dict[Format, list[str]] = {}
    for name, w in modules.items():
        if is_conv1d(name):
            raise ValueError(
                f"{name} is a Conv1D in transformers, which reads no compressed-tensors there; use "
                "nf4 or fp4"
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


_BNB = (
    "weight",
    "SCB",
    "weight_format",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
)
_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_COMPRESSED = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)
SCHEMES: dict[str, Scheme] = {
    "bitsandbytes": Scheme((*_STATES, "SCB"), (*_BNB, *_STATES), _bitsandbytes),
    "gptq": Scheme(("qweight",), ("qweight", "qzeros", "scales", "g_idx"), _gptq, _gptq_version),
    "awq": Scheme(("qweight",), ("qweight", "qzeros", "scales"), _awq),
    "compressed-tensors": Scheme(
        ("weight_packed", "weight_scale"), _COMPRESSED, _compressed_tensors
    ),
}
