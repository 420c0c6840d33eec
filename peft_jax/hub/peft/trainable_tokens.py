"""PEFT's TRAINABLE_TOKENS: rows of an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, only, options, pattern
from peft_jax.low_rank.trainable_tokens import TrainableTokens


def _write(node: TrainableTokens, embedding: bool) -> Tensors:
    return {"trainable_tokens_delta": np.asarray(node.rows)}


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    ids: Any = config.get("token_indices") or config.get("trainable_token_indices")
    if "token_indices" in tensors:  # a tied head's
        ids = tensors["token_indices"].tolist()
    if isinstance(ids, Mapping):
        ids = pattern({"ids": ids}, "ids", module.name, None)
    rows = tensors.get(
        "token_adapter.trainable_tokens_delta", tensors.get("trainable_tokens_delta")
    )
    if not ids or rows is None or len(ids) != len(rows):
        raise ValueError(
            f"{module.name} has rows for trainable tokens that do not fit the token indices {ids}"
        )
    if not all(isinstance(i, int) and 0 <= i < module.n_in for i in ids):
        raise ValueError(
            f"{module.name} has {module.n_in} tokens; the token indices {ids} lie outside"
        )
    return TrainableTokens, {"rows": rows, "ids": np.asarray(ids, np.int32)}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "token_indices": list(
            only(nodes, "token_indices", lambda n: tuple(np.asarray(n.ids).tolist()))
        )
    }


FORMAT = PeftFormat(
    name="TRAINABLE_TOKENS",
    nodes=(TrainableTokens,),
    tensors=("token_adapter.trainable_tokens_delta", "trainable_tokens_delta"),
    write=_write,
    read=_read,
    describe=_describe,
    options=options("token_indices"),
    without=("bias", "modules_to_save", "fan_in_fan_out"),
)
