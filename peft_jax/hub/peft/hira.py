"""PEFT's HIRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, only, options, usual
from peft_jax.hub.peft.lora import swap_factors
from peft_jax.low_rank.hira import HiRA


def _write(node: HiRA, embedding: bool) -> Tensors:
    a, b = np.asarray(node.a), np.asarray(node.b)
    used = a.any(axis=0) | b.any(axis=1)
    names = ("hira_embedding_A", "hira_embedding_B") if embedding else ("hira_A", "hira_B")
    return {names[0]: a[:, used].T, names[1]: b[used].T}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    names = ("hira_embedding_A", "hira_embedding_B") if module.embedding else ("hira_A", "hira_B")
    fields = {
        "a": tensors[names[0]].T,
        "b": tensors[names[1]].T,
    }  # PEFT 0.21 does not read its rank_pattern
    return HiRA, {**fields, "dropout": float(config.get("hira_dropout") or 0.0)}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = only(nodes, "r", lambda n: _write(n, False)["hira_A"].shape[0])
    return {"r": r, "hira_dropout": usual(n.dropout for n in nodes.values())}


FORMAT = PeftFormat(
    name="HIRA",
    nodes=(HiRA,),
    tensors=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("r rank_pattern hira_dropout"),
    mirror=swap_factors,
    starts=("gaussian",),
)
