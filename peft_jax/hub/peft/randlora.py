"""PEFT's RANDLORA: projections that all modules share."""

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
from peft_jax.low_rank.randlora import RandLoRA


def _write(node: RandLoRA, embedding: bool) -> Tensors:
    return {"randlora_lambda": np.asarray(node.lambdas), "randlora_gamma": np.asarray(node.gamma)}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    return RandLoRA, {
        "lambdas": tensors["randlora_lambda"],
        "gamma": tensors["randlora_gamma"],
        "scale": np.float32(number(config, "randlora_alpha") / number(config, "r")),
        "dropout": float(config.get("randlora_dropout") or 0.0),
    }


def _read_shared(
    tensors: Tensors, config: Config, sizes: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    if not {"randlora_A", "randlora_B"} <= set(tensors):
        raise ValueError(
            "the RandLoRA adapter was saved without its projections; save it with "
            "save_projection=True"
        )
    return {}, {"a": tensors["randlora_A"], "b": tensors["randlora_B"]}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = only(nodes, "r", lambda n: n.lambdas.shape[-2])
    return {
        "r": r,
        "randlora_alpha": only(nodes, "randlora_alpha", lambda n: round(float(n.scale) * r, 4)),
        "randlora_dropout": usual(n.dropout for n in nodes.values()),
        "save_projection": True,
    }


FORMAT = PeftFormat(
    name="RANDLORA",
    nodes=(RandLoRA,),
    tensors=("randlora_lambda", "randlora_gamma"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options(
        "r projection_prng_key save_projection randlora_alpha randlora_dropout sparse very_sparse"
    ),
    shared={
        "randlora_A": lambda s: fetch(s.fixed["a"]),
        "randlora_B": lambda s: fetch(s.fixed["b"]),
    },
    read_shared=_read_shared,
)
