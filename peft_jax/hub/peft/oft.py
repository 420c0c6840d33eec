"""PEFT's OFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, only, options
from peft_jax.low_rank.oft import OFT


def _write(node: OFT, embedding: bool) -> Tensors:
    return {"oft_R.weight": np.asarray(node.skew)}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    skew = tensors["oft_R.weight"]
    block_size = (1 + round((1 + 8 * skew.shape[1]) ** 0.5)) // 2
    return OFT, {
        "skew": skew,
        "block_size": block_size,
        "terms": config.get("num_cayley_neumann_terms", 5)
        if config.get("use_cayley_neumann", True)
        else 0,
        "constrained": bool(config.get("coft")),
        "eps": float(config.get("eps", 6e-5)),
    }


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    terms = only(nodes, "num_cayley_neumann_terms", lambda n: n.terms)
    return {
        "r": 0,
        "oft_block_size": only(nodes, "oft_block_size", lambda n: n.block_size),
        "coft": only(nodes, "coft", lambda n: n.constrained),
        "eps": only(nodes, "eps", lambda n: n.eps),
        "block_share": all(n.skew.shape[-2] == 1 for n in nodes.values()),
        "use_cayley_neumann": terms > 0,
        "num_cayley_neumann_terms": terms or 5,
    }


FORMAT = PeftFormat(
    name="OFT",
    nodes=(OFT,),
    tensors=("oft_R.weight",),
    write=_write,
    read=_read,
    describe=_describe,
    options=options(
        "r oft_block_size coft eps block_share use_cayley_neumann num_cayley_neumann_terms"
    ),
)
