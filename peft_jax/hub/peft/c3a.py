"""PEFT's C3A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import (
    Config,
    Module,
    PeftFormat,
    Tensors,
    exceptions,
    options,
    usual,
)
from peft_jax.low_rank.c3a import C3A


def _write(node: C3A, embedding: bool) -> Tensors:
    return {"c3a_kernel": np.asarray(node.kernel)}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    return C3A, {"kernel": tensors["c3a_kernel"]}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {m: n.kernel.shape[-1] for m, n in nodes.items()}
    size = usual(sizes.values())
    return {"block_size": size, "block_size_pattern": exceptions(sizes, size, whole=False)}


FORMAT = PeftFormat(
    name="C3A",
    nodes=(C3A,),
    tensors=("c3a_kernel",),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("block_size block_size_pattern"),
    starts=("gaussian", "kaiming_uniform", "xavier_uniform"),
)
