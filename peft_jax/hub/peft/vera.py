"""PEFT's VERA: projections that all modules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.sharding import fetch
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
from peft_jax.low_rank.vera import VeRA, projections


def _write(node: VeRA, embedding: bool) -> Tensors:
    return {"vera_lambda_d": np.asarray(node.d), "vera_lambda_b": np.asarray(node.b)}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    fields = {"d": tensors["vera_lambda_d"], "b": tensors["vera_lambda_b"]}
    return VeRA, {**fields, "dropout": float(config.get("vera_dropout") or 0.0)}


def _read_shared(
    tensors: Tensors, config: Config, sizes: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    if "vera_A" in tensors and "vera_B" in tensors:
        return {}, {"a": tensors["vera_A"].T, "b": tensors["vera_B"].T}
    return {}, projections(number(config, "r"), *sizes, config.get("projection_prng_key", 0))


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = only(nodes, "r", lambda n: n.d.shape[-1])
    return {
        "r": r,
        "vera_dropout": usual(n.dropout for n in nodes.values()),
        "save_projection": True,
        "projection_prng_key": 0,
    }


FORMAT = PeftFormat(
    name="VERA",
    nodes=(VeRA,),
    tensors=("vera_lambda_d", "vera_lambda_b"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("r projection_prng_key save_projection d_initial vera_dropout"),
    shared={"vera_A": lambda s: fetch(s.fixed["a"]).T, "vera_B": lambda s: fetch(s.fixed["b"]).T},
    read_shared=_read_shared,
)
