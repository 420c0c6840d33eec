"""Pruning of experts: a mixture with fewer of them, those that the router gives least to taken away
(Lu et al. 2024, arXiv:2402.14800, and Chen et al. 2022, arXiv:2206.00277, for the scores).

The layers keep as many experts each, not the same ones. Letters: L layers, E experts, D hidden
channels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from peft_jax.core.attachment import module_at
from peft_jax.core.bind import bind
from peft_jax.core.placing import modules_with_roles
from peft_jax.core.roles import is_expert, role_of
from peft_jax.core.tree import is_node, map_places, places
from peft_jax.models.decoder import Decoder
from peft_jax.models.families import remade
from peft_jax.models.layers import stacked, unstack_layers
from peft_jax.pruning.structured import keep_best

ExpertScore = Literal["probability", "frequency"]


def expert_importance(
    model: Decoder,
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    score: ExpertScore = "probability",
) -> jax.Array:
    """[L, E], float32: the mean probability that the router gives each expert, or how often it is
    chosen, on `batches`.

    Raises ValueError for a model without experts in every layer, an unknown score, and where there
    is no batch.
    """
    _check_mixture(model)
    if score not in ("probability", "frequency"):
        raise ValueError(f"unknown score of experts {score!r}; there are probability and frequency")
    model, params = stacked(model, params)
    mixture = modules_with_roles(params)["experts"][0].rpartition("/")[0]
    apply = bind(model)

    @jax.jit
    def run(params: Any, tokens: Any, inputs: Any) -> Any:
        sown = apply(params, tokens, method="hidden", mutable=["router"], **inputs)[1]["router"]
        return module_at(sown, mixture)

    name, total, count = "probabilities" if score == "probability" else "chosen", 0.0, 0.0
    for batch in batches:
        found = run(
            params,
            batch["tokens"],
            {k: v for k, v in batch.items() if k in ("positions", "segment_ids")},
        )
        total, count = total + found[name][0], count + found["tokens"][0]
    if isinstance(total, float):
        raise ValueError("there is no batch to look at")
    return total / jnp.asarray(count)[:, None]


def prune_experts(
    model: Decoder,
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    keep: int,
    *,
    score: ExpertScore = "probability",
) -> tuple[Decoder, Any]:
    """(model, params) with `keep` experts in each layer, those that matter most; a token goes to at
    most as many.

    Raises ValueError as `expert_importance` does, for a number outside 1..E, and for trees that do
    not hold arrays.
    """
    _check_mixture(model)
    for path, w in places(params).items():
        if is_node(w):
            raise ValueError(
                f"{path} is a {type(w).__name__}; merge or densify before prune_experts"
            )
    kept = keep_best(
        expert_importance(model, params, batches, score=score), keep, "experts"
    )  # [L, keep]
    config = json.loads(model.config.hf_config)
    config[next(n for n in ("num_local_experts", "num_experts") if n in config)] = keep
    config["num_experts_per_tok"] = min(keep, model.config.experts_per_token)

    def place(path: str, w: jax.Array) -> jax.Array:
        expert = is_expert(path) or role_of(path.rpartition("/")[0]) == "router"
        return (
            jnp.take_along_axis(
                w, jnp.asarray(kept).reshape(*kept.shape, *[1] * (w.ndim - 2)), axis=1
            )
            if expert
            else w
        )

    small = map_places(place, stacked(model, params)[1])
    smaller = model.clone(config=remade(model.config, config))
    return smaller, small if model.scan_layers else unstack_layers(small)


def _check_mixture(model: Any) -> None:
    config = getattr(model, "config", None)
    if not getattr(config, "num_experts", 0) or config.dense_layers:  # type: ignore[union-attr]
        kind = getattr(config, "model_type", type(model).__name__)
        raise ValueError(
            f"this {kind} model has no experts in every layer; they are what prune_experts "
            "takes away"
        )
