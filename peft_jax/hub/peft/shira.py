"""PEFT's SHIRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, only, options
from peft_jax.low_rank.shira import SHiRA


def _write(node: SHiRA, embedding: bool) -> Tensors:
    places = np.asarray(node.places)
    n_in = node.features[0]
    return {
        "shira_indices": np.stack([places // n_in, places % n_in]).astype(np.int32),
        "shira_weight": np.asarray(node.values),
    }


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    rows, cols = tensors["shira_indices"].astype(np.int64)
    if rows.size and not (
        0 <= rows.min() <= rows.max() < module.n_out and 0 <= cols.min() <= cols.max() < module.n_in
    ):
        raise ValueError(
            f"{module.name} has shira_indices outside its {module.n_out} x {module.n_in} weight"
        )
    return SHiRA, {
        "values": tensors["shira_weight"],
        "places": (rows * module.n_in + cols).astype(np.int32),
    }


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = only(nodes, "r", lambda n: n.values.shape[-1] / sum(n.features))
    if r != int(r):
        raise ValueError(
            "PEFT's SHiRA trains r (in + out) entries of a weight; this adapter has another number"
        )
    return {"r": int(r), "mask_type": "random"}


FORMAT = PeftFormat(
    name="SHIRA",
    nodes=(SHiRA,),
    tensors=("shira_indices", "shira_weight"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("r mask_type random_seed"),
)
