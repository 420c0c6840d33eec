"""PEFT's LOHA."""

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
    number,
    options,
    pattern,
    usual,
)
from peft_jax.low_rank.loha import LoHa


def _write(node: LoHa, embedding: bool) -> Tensors:
    used = (
        np.asarray(node.b1).any(axis=1)
        | np.asarray(node.a2).any(axis=0)
        | np.asarray(node.b2).any(axis=1)
    )
    fields = {
        "hada_w1_a": node.b1,
        "hada_w1_b": node.a1,
        "hada_w2_a": node.b2,
        "hada_w2_b": node.a2,
    }
    return {
        n: np.asarray(f)[used].T if n.endswith("a") else np.asarray(f)[:, used].T
        for n, f in fields.items()
    }


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    r = check_rank(tensors, config, module, "hada_w1_b", 0)
    alpha = pattern(config, "alpha_pattern", module.name, number(config, "alpha"))
    names = {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"}
    return LoHa, {**{f: tensors[n].T for f, n in names.items()}, "scale": np.float32(alpha / r)}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    ranks = {m: _write(n, False)["hada_w1_b"].shape[0] for m, n in nodes.items()}
    alphas = {m: round(float(n.scale) * ranks[m], 6) for m, n in nodes.items()}
    r, alpha = usual(ranks.values()), usual(alphas.values())
    return {
        "r": r,
        "alpha": alpha,
        "rank_pattern": exceptions(ranks, r),
        "alpha_pattern": exceptions(alphas, alpha),
    }


FORMAT = PeftFormat(
    name="LOHA",
    nodes=(LoHa,),
    tensors=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("r alpha rank_pattern alpha_pattern"),
)
