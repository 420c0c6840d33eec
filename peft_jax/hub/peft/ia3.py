"""PEFT's IA3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.adapters.ia3 import IA3
from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, options


def _write(node: IA3, embedding: bool) -> Tensors:
    scale = np.asarray(node.scale)
    return {"ia3_l": scale[None] if node.feedforward else scale[:, None]}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    scale = tensors["ia3_l"]
    wanted = {(module.n_out, 1): False, (1, module.n_in): True}
    if scale.shape not in wanted:
        raise ValueError(
            f"{module.name} has ia3_l {scale.shape}, expected {' or '.join(map(str, wanted))}"
        )
    return IA3, {"scale": scale.reshape(-1), "feedforward": wanted[scale.shape]}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Full names throughout: PEFT wants the modules whose inputs are scaled to be among the targets
    by the same name.
    """
    inputs = sorted(m for m, n in nodes.items() if n.feedforward)
    return {"target_modules": sorted(nodes), "feedforward_modules": inputs}


FORMAT = PeftFormat(
    name="IA3",
    nodes=(IA3,),
    tensors=("ia3_l",),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("feedforward_modules init_ia3_weights"),
)
