"""PEFT's BOFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, only, options
from peft_jax.low_rank.boft import BOFT


def _write(node: BOFT, embedding: bool) -> Tensors:
    return {"boft_R": np.asarray(node.r), "boft_s": np.asarray(node.s)[:, None]}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    return BOFT, {"r": tensors["boft_R"], "s": tensors["boft_s"][:, 0]}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "boft_block_size": only(nodes, "boft_block_size", lambda n: n.r.shape[-1]),
        "boft_block_num": 0,
        "boft_n_butterfly_factor": only(nodes, "boft_n_butterfly_factor", lambda n: n.r.shape[-4]),
    }


FORMAT = PeftFormat(
    name="BOFT",
    nodes=(BOFT,),
    tensors=("boft_R", "boft_s"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("boft_block_size boft_block_num boft_n_butterfly_factor"),
)
