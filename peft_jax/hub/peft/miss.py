"""PEFT's MISS: MiSS, its small variant and Bat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, only, options, usual
from peft_jax.low_rank.miss import BatMiSS, MiSS


def _write(node: Any, embedding: bool) -> Tensors:
    return {"miss_block": np.asarray(node.block)}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    node = BatMiSS if config.get("init_weights") == "bat" else MiSS
    return node, {
        "block": tensors["miss_block"],
        "dropout": float(config.get("miss_dropout") or 0.0),
    }


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    kind = only(nodes, "init_weights", _kind)
    return {
        "r": only(nodes, "r", lambda n: n.block.shape[-2]),
        "mini_r": only(nodes, "mini_r", lambda n: n.block.shape[-1]) if kind == "mini" else 1,
        "init_weights": True if kind == "miss" else kind,
        "miss_dropout": usual(n.dropout for n in nodes.values()),
    }


def _kind(node: Any) -> str:
    if isinstance(node, BatMiSS):
        return "bat"
    return "miss" if node.block.shape[-1] == node.features[1] else "mini"


FORMAT = PeftFormat(
    name="MISS",
    nodes=(MiSS, BatMiSS),
    tensors=("miss_block",),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("r mini_r miss_dropout"),
    starts=("bat", "mini"),
)
