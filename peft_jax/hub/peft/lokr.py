"""PEFT's LOKR."""

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
    number,
    only,
    options,
    pattern,
    usual,
)
from peft_jax.low_rank.lokr import LoKr


def _write(node: LoKr, embedding: bool) -> Tensors:
    tensors: Tensors = {}
    for name, factor in (("lokr_w1", node.w1), ("lokr_w2", node.w2)):
        if isinstance(factor, tuple):
            tensors[f"{name}_a"], tensors[f"{name}_b"] = (
                np.asarray(factor[1]).T,
                np.asarray(factor[0]).T,
            )
        else:
            tensors[name] = np.asarray(factor).T
    return tensors


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    r = pattern(config, "rank_pattern", module.name, number(config, "r"))
    alpha = pattern(config, "alpha_pattern", module.name, number(config, "alpha"))

    def factor(name: str) -> Any:
        return (
            tensors[name].T if name in tensors else (tensors[f"{name}_b"].T, tensors[f"{name}_a"].T)
        )

    return LoKr, {
        "w1": factor("lokr_w1"),
        "w2": factor("lokr_w2"),
        "scale": np.float32(alpha / r),
        "rank": r,
        "factor": config.get("decompose_factor", -1),
    }


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    ranks = {m: n.rank for m, n in nodes.items()}
    alphas = {m: round(float(n.scale) * n.rank, 6) for m, n in nodes.items()}
    r, alpha = usual(ranks.values()), usual(alphas.values())
    return {
        "r": r,
        "alpha": alpha,
        "rank_pattern": exceptions(ranks, r),
        "alpha_pattern": exceptions(alphas, alpha),
        "decompose_both": any(isinstance(n.w1, tuple) for n in nodes.values()),
        "decompose_factor": only(nodes, "decompose_factor", lambda n: n.factor),
    }


FORMAT = PeftFormat(
    name="LOKR",
    nodes=(LoKr,),
    tensors=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("r alpha rank_pattern alpha_pattern decompose_both decompose_factor"),
    starts=("lycoris",),
)
