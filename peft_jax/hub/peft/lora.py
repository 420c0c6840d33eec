"""PEFT's LORA: LoRA, DoRA and QA-LoRA."""

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
    exceptions,
    number,
    only,
    options,
    pattern,
    usual,
)
from peft_jax.low_rank.dora import DoRA
from peft_jax.low_rank.lora import LoRA, scaling
from peft_jax.quantization.qalora import QALoRA

# starts of `init_lora_weights` that leave the base as it is
STARTS = ("gaussian", "orthogonal", "eva", "mica")
LORA_OPTIONS = (
    "alpha_pattern init_lora_weights loftq_config lora_alpha lora_dropout megatron_core "
    "qalora_group_size r rank_pattern "
    "runtime_config use_rslora use_dora use_qalora ensure_weight_tying trainable_token_indices "
    "target_parameters"
)


def _write(node: LoRA, embedding: bool) -> Tensors:
    a, b = (np.asarray(f) for f in node.factors())
    used = a.any(axis=0) | b.any(axis=1)  # columns padded to a common rank are zero in both
    used = used if used.any() else np.ones_like(used)
    names = (
        ("lora_embedding_A", "lora_embedding_B")
        if embedding
        else ("lora_A.weight", "lora_B.weight")
    )
    tensors = {names[0]: a[:, used].T, names[1]: b[used].T}
    if isinstance(node, DoRA):
        tensors["lora_magnitude_vector"] = np.asarray(node.magnitude)
    return tensors


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    names = (
        ("lora_embedding_A", "lora_embedding_B")
        if module.embedding
        else ("lora_A.weight", "lora_B.weight")
    )
    if not set(names) <= set(tensors):
        raise ValueError(f"{module.name} has only one of lora_A and lora_B")
    a, b = (tensors[n] for n in names)
    r = pattern(config, "rank_pattern", module.name, number(config, "r"))
    if a.shape[0] != r or b.shape[1] != r:
        raise ValueError(
            f"{module.name} has lora_A {a.shape} and lora_B {b.shape}, expected rank {r}"
        )
    alpha = pattern(config, "alpha_pattern", module.name, number(config, "lora_alpha"))
    rslora = bool(config.get("use_rslora"))
    fields = {
        "a": a.T,
        "b": b.T,
        "scale": np.float32(scaling(alpha, r, rslora)),
        "rslora": rslora,
        "dropout": float(config.get("lora_dropout") or 0.0),
    }
    if config.get("use_qalora"):
        if config.get("use_dora") or module.embedding or rslora:
            raise ValueError(
                f"{module.name}: use_qalora beside use_dora, use_rslora or an embedding is not "
                "supported"
            )
        size = number(config, "qalora_group_size")
        if a.shape[1] * size != module.n_in:
            raise ValueError(
                f"{module.name} has lora_A {a.shape}, expected {module.n_in} inputs in groups "
                f"of {size}"
            )
        return QALoRA, {k: v for k, v in fields.items() if k != "rslora"}
    if not config.get("use_dora"):
        if "lora_magnitude_vector" in tensors:
            raise ValueError(
                f"{module.name} has lora_magnitude_vector, but the adapter does not say use_dora"
            )
        return LoRA, fields
    if "lora_magnitude_vector" not in tensors:
        raise ValueError(f"{module.name} lacks lora_magnitude_vector, which use_dora needs")
    return DoRA, {**fields, "magnitude": tensors["lora_magnitude_vector"].reshape(-1)}


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    rslora = all(getattr(n, "rslora", False) for n in nodes.values())
    ranks = {m: next(iter(_write(n, False).values())).shape[0] for m, n in nodes.items()}
    alphas = {
        m: round(float(n.scale) * (ranks[m] ** 0.5 if rslora else ranks[m]), 6)
        for m, n in nodes.items()
    }
    r, alpha = usual(ranks.values()), usual(alphas.values())
    kinds = {type(n) for n in nodes.values()}
    if len(kinds) > 1:
        raise ValueError(
            "PEFT's use_dora and use_qalora hold for all modules; this adapter has LoRA, DoRA or "
            "QA-LoRA in parts"
        )
    kind = kinds.pop()
    blocks = (
        {"qalora_group_size": only(nodes, "qalora_group_size", lambda n: n.block)}
        if kind is QALoRA
        else {}
    )
    return {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": usual(n.dropout for n in nodes.values()),
        "use_rslora": rslora,
        "use_dora": kind is DoRA,
        "use_qalora": kind is QALoRA,
        **blocks,
        "rank_pattern": exceptions(ranks, r),
        "alpha_pattern": exceptions(alphas, alpha),
        "init_lora_weights": True,
    }


def swap_factors(node: Any) -> Any:
    """The LoRA or HiRA of the transposed weight."""
    node = node.plain()
    return node.replace(a=np.swapaxes(node.b, -1, -2), b=np.swapaxes(node.a, -1, -2))


def _mirror(node: Any) -> Any:
    """The LoRA of the transposed weight; None for DoRA and QA-LoRA, whose other arrays belong to
    one side.
    """
    return swap_factors(node) if type(node) is LoRA else None


FORMAT = PeftFormat(
    name="LORA",
    nodes=(LoRA, DoRA, QALoRA),
    tensors=(
        "lora_A.weight",
        "lora_B.weight",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    ),
    write=_write,
    read=_read,
    describe=_describe,
    options=options(LORA_OPTIONS),
    starts=STARTS,
    beside=("bias", "trainable_token_indices", "ensure_weight_tying"),
    mirror=_mirror,
)
