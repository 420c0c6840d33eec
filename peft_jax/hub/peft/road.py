"""PEFT's ROAD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, only, options
from peft_jax.low_rank.road import RoAd


def _write(node: RoAd, embedding: bool) -> Tensors:
    return {"road_theta": np.asarray(node.theta), "road_alpha": np.asarray(node.alpha)}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    fields = {"theta": tensors["road_theta"], "alpha": tensors["road_alpha"]}
    return RoAd, {
        **fields,
        "variant": config.get("variant", "road_1"),
        "group_size": config.get("group_size", 64),
    }


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: only(nodes, name, lambda n, name=name: getattr(n, name))
        for name in ("variant", "group_size")
    }


FORMAT = PeftFormat(
    name="ROAD",
    nodes=(RoAd,),
    tensors=("road_theta", "road_alpha"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("variant group_size"),
)
