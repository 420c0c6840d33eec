"""The records of tools that store quantized modules: what a checkpoint of each holds.

Each tool's record stands at the end of a file of its own in this package, as `TOOL`; another
package offers its own as an entry point of the group `peft_jax.checkpoint_tools`. Codes stay as
they are: nothing is dequantized on the way. Hugging Face weights are [out, in]; here a matrix is
[in, out].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax.core.registry import Registry
from peft_jax.hub.safetensors_io import NamedTensors
from peft_jax.quantization.formats import Format
from peft_jax.quantization.quantized import Quantized

Read = Callable[[str], np.ndarray]  # suffix of a module's tensor -> the tensor


class Parts(NamedTuple):
    """One matrix as `Quantized` keeps it, on the host."""

    format: Format
    codes: np.ndarray
    scale: Any
    zero: np.ndarray | None = None
    order: np.ndarray | None = None
    smooth: np.ndarray | None = None
    input_scale: np.ndarray | None = None


def expect(name: str, array: np.ndarray, shape: tuple[int, ...], dtypes: str) -> np.ndarray:
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


def _as_said(checkpoint: NamedTensors, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tool:
    """How one tool stores a quantized module; `name` is the configuration's `quant_method`.

    `marks` are the tensors that tell a quantized module, `tensors` those that belong to it. `read`
    makes a matrix of (how to read one of them, those that are there, the matrix' shape, the
    configuration); `settle` gives the configuration as a checkpoint bears it out. `reads` and
    `writes` are the storage formats that its folders can hold. `write` gives the tensors of one
    matrix by suffix, `config` the `quantization_config` of a folder; both raise ValueError for
    what cannot be said. This package's `own` folders hold every format, and are written only where
    they are asked for, since no other tool reads them.
    """

    name: str
    marks: tuple[str, ...]
    tensors: tuple[str, ...]
    read: Callable[[Read, frozenset[str], tuple[int, int], Mapping[str, Any]], Parts]
    reads: tuple[type[Format], ...] = ()
    settle: Callable[[NamedTensors, Mapping[str, Any]], Mapping[str, Any]] = _as_said
    writes: tuple[type[Format], ...] = ()
    write: Callable[[Quantized], dict[str, np.ndarray]] | None = None
    config: (
        Callable[[Mapping[str, Quantized], Sequence[str], Sequence[str]], dict[str, Any]] | None
    ) = None
    own: bool = False

    def holds(self, format: Format) -> bool:
        """Whether a folder of this tool can be written with a storage format."""
        return self.own or type(format) in self.writes


TOOLS: Registry[Tool] = Registry(
    "checkpoint tool", ("peft_jax.hub.quantized",), "TOOL", "peft_jax.checkpoint_tools"
)


def writing_tools() -> list[Tool]:
    """The tools whose folders are written for others to read."""
    return [tool for tool in TOOLS.values() if tool.write is not None and not tool.own]


def held_formats(without: str = "") -> str:
    """Which tool holds which formats, in words; without the tool of that name."""
    tools = [tool for tool in writing_tools() if tool.name != without]
    return ", ".join(f"{t.name} holds {' and '.join(f.kind for f in t.writes)}" for t in tools)
