"""Paths in a parameter tree and tensor names in a Hugging Face checkpoint.

`model/layers/self_attn/q_proj/kernel` [L, in, out] is `model.layers.{i}.self_attn.q_proj.weight` [out, in] for each
layer i; looped trees have `model/layers_{i}/...` instead.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_WEIGHT_LEAVES = ("kernel", "embedding", "scale")


class Tensor(NamedTuple):
    """A checkpoint tensor and where it goes: its name, the layer it fills (None: all of the leaf), transposed or not."""

    name: str
    layer: int | None
    transposed: bool


def tensors_of(path: str, layers: int | None) -> list[Tensor]:
    """The checkpoint tensors behind the leaf at `path`; `layers` is the number of stacked layers."""
    *module, leaf = path.split("/")
    transposed = leaf == "kernel"
    suffix = "weight" if leaf in _WEIGHT_LEAVES else leaf
    names = module_names("/".join(module), layers)
    return [Tensor(f"{name}.{suffix}", layer, transposed) for name, layer in names]


def module_names(module: str, layers: int | None) -> list[tuple[str, int | None]]:
    """(Hugging Face module name, layer) for each module behind a tree's module path."""
    parts = module.split("/")
    if "layers" in parts and layers is not None:
        at = parts.index("layers") + 1
        return [(".".join([*parts[:at], str(i), *parts[at:]]), i) for i in range(layers)]
    return [(re.sub(r"\blayers_(\d+)\b", r"layers.\1", ".".join(parts)), None)]
