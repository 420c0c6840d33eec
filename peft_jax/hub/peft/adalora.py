"""PEFT's ADALORA."""

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
    number,
    only,
    options,
    usual,
)
from peft_jax.hub.peft.lora import LORA_OPTIONS, STARTS
from peft_jax.low_rank.adalora import AdaLoRA


def _write(node: AdaLoRA, embedding: bool) -> Tensors:
    return {
        "lora_A": np.asarray(node.a).T,
        "lora_B": np.asarray(node.b).T,
        "lora_E": np.asarray(node.e)[:, None],
    }


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    r = tensors["lora_A"].shape[0]
    alpha = number(config, "lora_alpha")
    first = config.get("init_r") or r  # PEFT divides by init_r, however many ranks are kept
    return AdaLoRA, {
        "a": tensors["lora_A"].T,
        "e": tensors["lora_E"][:, 0],
        "b": tensors["lora_B"].T,
        "scale": np.float32((alpha if alpha > 0 else r) / (first + 1e-5)),
        "dropout": float(config.get("lora_dropout") or 0.0),
        "orthogonal": float(config.get("orth_reg_weight") or 0.0),
    }


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = only(nodes, "init_r", lambda n: n.e.shape[-1])
    return {
        "init_r": r,
        "target_r": r,
        "lora_alpha": only(nodes, "lora_alpha", lambda n: round(float(n.scale) * (r + 1e-5), 4)),
        "lora_dropout": usual(n.dropout for n in nodes.values()),
        "orth_reg_weight": only(nodes, "orth_reg_weight", lambda n: n.orthogonal) or 0.5,
        "tinit": 0,
        "tfinal": 0,
        "total_step": 1,
    }


FORMAT = PeftFormat(
    name="ADALORA",
    nodes=(AdaLoRA,),
    tensors=("lora_A", "lora_B", "lora_E"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options(
        LORA_OPTIONS + " target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step"
    ),
    starts=STARTS,
)
