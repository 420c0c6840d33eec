"""Stacked layers (one array per weight with a leading layer axis, for scanning) to looped ones and
back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.roles import stack_names


def stacked(model: Any, params: Any) -> tuple[Any, Any]:
    """(model, params) with the layers stacked and scanned; as they are where they are already."""
    return (
        (model, params)
        if model.scan_layers
        else (model.clone(scan_layers=True), stack_layers(params))
    )


def unstack_layers(params: Any) -> Any:
    """A tree for `scan_layers=False`: `model/layers` [L, ...] becomes `model/layers_0` ...
    `model/layers_{L-1}`.

    So does every other stack (see `Roles.stack`). Nodes (LoRA and the like) are split with their
    arrays, since each array of a node keeps the leading layer axis. Raises ValueError where no
    layers are stacked.
    """

    stacks = stack_names()

    def split(tree: Mapping[str, Any]) -> dict[str, Any]:
        result = {}
        for name, part in tree.items():
            if name in stacks and isinstance(part, Mapping):
                count = jax.tree.leaves(part)[0].shape[0]
                result |= {
                    f"{name}_{i}": jax.tree.map(lambda a, i=i: a[i], part) for i in range(count)
                }
            else:
                result[name] = part
        return result

    whole = _walk(params, split)
    if jax.tree.structure(whole) == jax.tree.structure(params):
        raise ValueError(f"these parameters are not stacked: there is none of {', '.join(stacks)}")
    return whole


def stack_layers(params: Any) -> Any:
    """The inverse of `unstack_layers`. Raises ValueError where the layers' trees differ in
    structure or shape.
    """

    def join(tree: Mapping[str, Any]) -> dict[str, Any]:
        result = dict(tree)
        for stack in stack_names():
            found = [n for n in tree if re.fullmatch(rf"{stack}_\d+", n)]
            if found and stack not in tree:
                names = sorted(found, key=lambda n: int(n.rsplit("_", 1)[1]))
                result[stack] = _stack([result.pop(name) for name in names])
        return result

    whole = _walk(params, join)
    if jax.tree.structure(whole) == jax.tree.structure(params):
        raise ValueError("these parameters are not looped: there is no 'layers_0' or the like")
    return whole


def _walk(tree: Any, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Any:
    """`change` applied to each mapping of a tree from the top, what lies within a stack left
    alone.
    """
    if not isinstance(tree, Mapping):
        return tree
    stack = re.compile(rf"({'|'.join(stack_names())})(_\d+)?")
    return {
        n: part if stack.fullmatch(n) else _walk(part, change) for n, part in change(tree).items()
    }


def _stack(layers: list[Any]) -> Any:
    structures = {jax.tree.structure(layer) for layer in layers}
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(layer)) for layer in layers}
    if len(structures) > 1 or len(shapes) > 1:
        raise ValueError(
            "layers differ in structure or shape and cannot be stacked; keep scan_layers=False"
        )
    return jax.tree.map(lambda *a: jnp.stack(a), *layers)


def layer_by_layer(model: Any, params: Any, change: Callable[[Any, Any], Any]) -> Any:
    """`change(model, params)` of the model with its layers looped; the tree that it gives is
    stacked again where it was.
    """
    if not model.scan_layers:
        return change(model, params)
    return stack_layers(change(model.clone(scan_layers=False), unstack_layers(params)))
