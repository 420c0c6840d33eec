"""PEFT's DELORA."""

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
    check_rank,
    exceptions,
    options,
    usual,
)
from peft_jax.low_rank.delora import DeLoRA


def _write(node: DeLoRA, embedding: bool) -> Tensors:
    return {
        "delora_A": np.asarray(node.a).T,
        "delora_B": np.asarray(node.b).T,
        "delora_lambda": np.asarray(node.strength),
        "delora_w_norm": np.asarray(node.norm),
    }


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    check_rank(tensors, config, module, "delora_A", 0)
    fields = {
        "a": tensors["delora_A"].T,
        "b": tensors["delora_B"].T,
        "strength": tensors["delora_lambda"],
    }
    return DeLoRA, {**fields, "norm": tensors["delora_w_norm"]}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    ranks = {m: n.a.shape[-1] for m, n in nodes.items()}
    r = usual(ranks.values())
    if any(n.dropout for n in nodes.values()):
        raise ValueError("PEFT's DeLoRA has no dropout of inputs")
    return {"r": r, "rank_pattern": exceptions(ranks, r)}


FORMAT = PeftFormat(
    name="DELORA",
    nodes=(DeLoRA,),
    tensors=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("r rank_pattern delora_lambda lambda_pattern"),
)
