"""Stacked layers (one array per weight with a leading layer axis, for scanning) to looped ones and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_LAYERS = "layers"


def unstack_layers(params: Any) -> Any:
    """A tree for `scan_layers=False`: `model/layers` [L, ...] becomes `model/layers_0` ... `model/layers_{L-1}`.

    Nodes (LoRA and the like) are split with their arrays, since each array of a node keeps the leading layer axis.
    """
    model = dict(params["model"])
    if _LAYERS not in model:
        raise ValueError("these parameters are not stacked: there is no 'model/layers'")
    stacked = model.pop(_LAYERS)
    count = jax.tree.leaves(stacked)[0].shape[0]
    for i in range(count):
        model[f"{_LAYERS}_{i}"] = jax.tree.map(lambda a, i=i: a[i], stacked)
    return {**params, "model": model}


def stacked(model: Any, params: Any) -> tuple[Any, Any]:
    """(model, params) with the layers stacked and scanned; as they are where they are already."""
    return (model, params) if model.scan_layers else (model.clone(scan_layers=True), stack_layers(params))


def stack_layers(params: Any) -> Any:
    """The inverse of `unstack_layers`. Raises ValueError where the layers' trees differ in structure or shape."""
    model = dict(params["model"])
    names = sorted((n for n in model if n.startswith(f"{_LAYERS}_")), key=lambda n: int(n.rsplit("_", 1)[1]))
    if not names:
        raise ValueError("these parameters are not looped: there is no 'model/layers_0'")
    layers = [model.pop(name) for name in names]
    structures = {jax.tree.structure(layer) for layer in layers}
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(layer)) for layer in layers}
    if len(structures) > 1 or len(shapes) > 1:
        raise ValueError("layers differ in structure or shape and cannot be stacked; keep scan_layers=False")
    model[_LAYERS] = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    return {**params, "model": model}
