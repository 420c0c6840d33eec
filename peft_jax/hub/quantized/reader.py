"""Quantized modules of a checkpoint, codes as they are."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.hub.quantized.tool import TOOLS, Parts
from peft_jax.hub.safetensors_io import NamedTensors
from peft_jax.quantization.quantized import Quantized


class QuantizedReader:
    """Reads the quantized modules of a checkpoint; `config` is its `quantization_config`.

    Raises ValueError for a method that is not supported, naming those that are.
    """

    def __init__(self, checkpoint: NamedTensors, config: Mapping[str, Any] | None) -> None:
        self._checkpoint, self._config = checkpoint, config or {}
        method = str(self._config.get("quant_method", "")) if config else ""
        if config and method not in TOOLS:
            raise ValueError(
                f"quant_method {method!r} is not supported; supported: {', '.join(TOOLS)}"
            )
        self._tool = TOOLS[method] if config else None
        if self._tool is not None:
            self._config = self._tool.settle(checkpoint, self._config)
        self._names = set(checkpoint.names)

    def tensors(self, module: str) -> list[str]:
        """The tensors of a quantized module; none where the module is not quantized."""
        if self._tool is None or not any(f"{module}.{m}" in self._names for m in self._tool.marks):
            return []
        return [f"{module}.{t}" for t in self._tool.tensors if f"{module}.{t}" in self._names]

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
        assert self._tool is not None
        names = frozenset(n.removeprefix(module + ".") for n in self.tensors(module))

        @functools.cache
        def read(suffix: str) -> np.ndarray:
            if suffix not in names:
                raise ValueError(f"{module} is quantized and lacks {module}.{suffix}")
            return self._checkpoint.read(f"{module}.{suffix}")

        try:
            return self._tool.read(read, names, shape, self._config)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error


def assemble_parts(
    name: str, parts: list[Parts], shape: tuple[int, ...], dtype: Any, *, stacked: bool
) -> Quantized:
    """One weight of the parts of its layers. Raises ValueError where layers differ in format."""
    optional = {(p.zero is None, p.smooth is None, p.input_scale is None) for p in parts}
    if len({p.format for p in parts}) > 1 or len(optional) > 1:
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
