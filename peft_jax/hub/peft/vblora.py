"""PEFT's VBLORA: a bank of vectors that all modules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.sharding import fetch
from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, only, options, usual
from peft_jax.low_rank.vblora import VBLoRA


def _write(node: VBLoRA, embedding: bool) -> Tensors:
    return {
        "vblora_logits_A": np.asarray(node.logits_a),
        "vblora_logits_B": np.asarray(node.logits_b),
    }


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    fields = {"logits_a": tensors["vblora_logits_A"], "logits_b": tensors["vblora_logits_B"]}
    return VBLoRA, {
        **fields,
        "top_k": config.get("topk", 2),
        "dropout": float(config.get("vblora_dropout") or 0.0),
    }


def _read_shared(
    tensors: Tensors, config: Config, sizes: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    if "vblora_vector_bank" not in tensors:
        raise ValueError("the VB-LoRA adapter lacks base_model.vblora_vector_bank")
    return {"bank": tensors["vblora_vector_bank"]}, {}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    def length(n: Any) -> int:
        return n.features[0] // n.logits_a.shape[-2]

    return {
        "r": only(nodes, "r", lambda n: n.logits_a.shape[-3]),
        "num_vectors": only(nodes, "num_vectors", lambda n: n.logits_a.shape[-1]),
        "vector_length": only(nodes, "vector_length", length),
        "topk": only(nodes, "topk", lambda n: n.top_k),
        "vblora_dropout": usual(n.dropout for n in nodes.values()),
    }


FORMAT = PeftFormat(
    name="VBLORA",
    nodes=(VBLoRA,),
    tensors=("vblora_logits_A", "vblora_logits_B"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options(
        "r num_vectors vector_length topk vblora_dropout init_vector_bank_bound init_logits_std"
    ),
    shared={"vblora_vector_bank": lambda s: fetch(s.trained["bank"])},
    read_shared=_read_shared,
)
