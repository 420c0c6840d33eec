"""PEFT's HRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, only, options
from peft_jax.low_rank.hra import HRA


def _write(node: HRA, embedding: bool) -> Tensors:
    return {"hra_u": np.asarray(node.u)}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    return HRA, {"u": tensors["hra_u"], "orthogonal": bool(config.get("apply_GS"))}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "r": only(nodes, "r", lambda n: n.u.shape[-1]),
        "apply_GS": only(nodes, "apply_GS", lambda n: n.orthogonal),
    }


FORMAT = PeftFormat(
    name="HRA",
    nodes=(HRA,),
    tensors=("hra_u",),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("r apply_GS"),
)
