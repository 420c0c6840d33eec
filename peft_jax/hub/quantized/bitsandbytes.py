"""bitsandbytes: NF4 and FP4 in and out, 8-bit integers (LLM.int8) in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax.hub.quantized.tool import Parts, Read, Tool, expect
from peft_jax.quantization.dynamic_map import BLOCK, DoubleScale, dynamic_map
from peft_jax.quantization.formats import FP4, NF4, Int
from peft_jax.quantization.quantized import Quantized

_TENSORS = (
    "weight",
    "SCB",
    "weight_format",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
)


_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")


def _read(
    read: Read, names: frozenset[str], shape: tuple[int, int], config: Mapping[str, Any]
) -> Parts:
    return _read_8bit(read, shape) if "SCB" in names else _read_4bit(read, names, shape)


def _read_8bit(read: Read, shape: tuple[int, int]) -> Parts:
    weight = expect("weight", read("weight"), shape[::-1], "i")
    scale = expect("SCB", read("SCB"), (shape[1],), "f").astype(np.float32) / 127
    return Parts(Int(bits=8), weight.T, scale[None])


def _read_4bit(read: Read, names: frozenset[str], shape: tuple[int, int]) -> Parts:
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
        expect("weight.quant_map", read("weight.quant_map"), (16,), "f"), made.table, atol=1e-6
    ):
        raise ValueError(f"weight.quant_map is not the {kind} table")
    flat = expect("weight", read("weight"), (n_in * n_out // 2, 1), "u").reshape(n_out, n_in // 2).T
    codes = (flat >> 4) | (flat << 4)  # the first of two codes takes the high bits there
    double = "weight.nested_absmax" in names
    absmax = expect(
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
        expect("weight.nested_quant_map", read("weight.nested_quant_map"), (256,), "f"),
        dynamic_map(),
        atol=1e-6,
    ):
        raise ValueError("weight.nested_quant_map is not the dynamic map")
    nested = expect(
        "weight.nested_absmax", read("weight.nested_absmax"), (-(-absmax.size // BLOCK),), "f"
    )
    scale: dict[str, Any] = {
        "codes": absmax,
        "absmax": nested.astype(np.float32),
        "offset": np.float32(state["nested_offset"]),
    }
    return Parts(format, codes, DoubleScale(**scale))


def _write(w: Quantized) -> dict[str, np.ndarray]:
    """The tensors of one 4-bit matrix [in, out] by suffix. Raises ValueError for inputs that are
    scaled or reordered.
    """
    if w.smooth is not None or w.order is not None:
        raise ValueError("has inputs that are scaled or reordered, which bitsandbytes cannot hold")
    format: Any = w.format
    n_in, n_out = w.in_sizes[0], w.out_sizes[0]
    codes = np.asarray(w.codes).T
    dtype = str(jnp.dtype(w.dtype))
    state: dict[str, Any] = {
        "quant_type": format.kind,
        "blocksize": format.block_size,
        "dtype": dtype,
        "shape": [n_out, n_in],
    }
    tensors = {
        "weight": ((codes >> 4) | (codes << 4)).reshape(-1, 1),
        "weight.quant_map": format.table,
        "weight.absmax": np.asarray(
            w.scale.codes if isinstance(w.scale, DoubleScale) else w.scale
        ).T.reshape(-1),
    }
    if isinstance(w.scale, DoubleScale):
        tensors["weight.nested_absmax"] = np.asarray(w.scale.absmax)
        tensors["weight.nested_quant_map"] = dynamic_map()
        offset = float(np.asarray(w.scale.offset))
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    name = f"weight.quant_state.bitsandbytes__{format.kind}"
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def _config(
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


TOOL = Tool(
    name="bitsandbytes",
    marks=(*_STATES, "SCB"),
    tensors=(*_TENSORS, *_STATES),
    read=_read,
    reads=(NF4, FP4, Int),
    writes=(NF4, FP4),
    write=_write,
    config=_config,
)
