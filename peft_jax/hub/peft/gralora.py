"""PEFT's GRALORA."""

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
    number,
    only,
    options,
    usual,
)
from peft_jax.low_rank.gralora import GraLoRA


def _write(node: GraLoRA, embedding: bool) -> Tensors:
    tensors = {"gralora_A": np.asarray(node.a), "gralora_B": np.asarray(node.b)}
    if node.hybrid is not None:
        tensors |= {
            f"gralora_{n}_general.weight": np.asarray(f).T
            for n, f in zip("AB", node.hybrid, strict=True)
        }
    return tensors


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    hybrid = config.get("hybrid_r") or 0
    names = [f"gralora_{n}_general.weight" for n in "AB"]
    return GraLoRA, {
        "a": tensors["gralora_A"],
        "b": tensors["gralora_B"],
        "scale": np.float32(number(config, "alpha") / (number(config, "r") + hybrid)),
        "hybrid": tuple(tensors[n].T for n in names) if hybrid else None,
        "dropout": float(config.get("gralora_dropout") or 0.0),
    }


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = only(nodes, "r", lambda n: n.a.shape[-1])
    hybrid = only(nodes, "hybrid_r", lambda n: 0 if n.hybrid is None else n.hybrid[0].shape[-1])
    return {
        "r": r,
        "hybrid_r": hybrid,
        "gralora_k": only(nodes, "gralora_k", lambda n: n.a.shape[-3]),
        "alpha": only(nodes, "alpha", lambda n: round(float(n.scale) * (r + hybrid), 4)),
        "gralora_dropout": usual(n.dropout for n in nodes.values()),
    }


FORMAT = PeftFormat(
    name="GRALORA",
    nodes=(GraLoRA,),
    tensors=("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("r hybrid_r alpha gralora_k gralora_dropout"),
)
