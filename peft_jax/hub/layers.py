"""An adapter's nodes layer by layer, whatever the tree: what the adapter formats are written from
and read into.

A node is known by where it stands with its layer's number as a part of the path and the adapter's
name left out: `model/layers/3/mlp_residual/bottleneck`, `model/layers/3/self_attn/q_proj/kernel`.
It has no leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.attachment import Attachment, attach
from peft_jax.core.placing import layers_of, module_paths
from peft_jax.core.select import nearest
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import map_places, places


def split_layers(params: Any, nodes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The nodes at these places, one for each layer that has one, with NumPy arrays and without
    their bases.
    """
    found = {}
    for path, node in nodes.items():
        module, _, key = path.rpartition("/")
        key = key.removesuffix(f"_{name}") if isinstance(node, Attachment) else key
        lead, node = (
            node.lead,
            jax.tree.map(fetch, node.replace(base=None) if hasattr(node, "base") else node),
        )
        names = [n for n, _ in layers_of(params, module)[1]]
        if not lead or len(set(names)) < len(names):
            found[f"{names[0] if not lead else module}/{key}".strip("/")] = node
            continue
        gate = getattr(node, "gate", None)
        for i, layer in enumerate(names):
            if gate is None or gate[i] > 0:
                one = jax.tree.map(lambda a, i=i: a[i], node)
                found[f"{layer}/{key}"] = one if gate is None else one.replace(gate=None)
    return found


def join_layers(params: Any, nodes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """place -> node for a tree, stacked where its layers are; layers without a node have the gate
    0.

    Raises ValueError for a node of a module that the tree lacks, and stacked layers whose nodes
    differ.
    """
    left, joined = dict(nodes), {}
    by_module: dict[str, list[str]] = {}
    for path in nodes:
        by_module.setdefault(path.rpartition("/")[0], []).append(path)
    for module in ["", *module_paths(params)]:
        lead, numbered = layers_of(params, module) if module else ((), [("", None)])
        names = [n for n, _ in numbered]
        whole = not lead or len(set(names)) < len(names)
        keys = dict.fromkeys(
            p.rpartition("/")[2]
            for n in ([names[0], module] if whole else names)
            for p in by_module.get(n, ())
        )
        for key in keys:
            place = f"{module}/{key}".strip("/")
            mine = [
                left.pop(f"{n}/{key}".strip("/"), None)
                for n in dict.fromkeys([names[0], module] if whole else names)
            ]
            if not any(n is not None for n in mine):
                continue
            node = next(n for n in mine if n is not None) if whole else _stacked(mine, place)
            joined[f"{place}_{name}" if isinstance(node, Attachment) else place] = jax.tree.map(
                jnp.asarray, node
            )
    if left:
        known = [n for p in module_paths(params) for n, _ in layers_of(params, p)[1]]
        module = sorted(left)[0].rpartition("/")[0]
        raise ValueError(
            f"the adapter has {sorted(left)[0]}, which the model lacks.{nearest(module, known)}"
        )
    return joined


def _stacked(nodes: list[Any], place: str) -> Any:
    present = next(n for n in nodes if n is not None)
    if any(n is not None and _form(n) != _form(present) for n in nodes):
        raise ValueError(
            f"the adapter's layers differ at {place}; load the model with scan_layers=False"
        )
    stacked = jax.tree.map(lambda *a: np.stack(a), *(present if n is None else n for n in nodes))
    if all(n is not None for n in nodes):
        return stacked
    return stacked.replace(gate=np.asarray([float(n is not None) for n in nodes], np.float32))


def _form(node: Any) -> Any:
    return jax.tree.structure(node), [np.shape(a) for a in jax.tree.leaves(node)]


def put_nodes(params: Any, nodes: Mapping[str, Any]) -> Any:
    """`params` with attachments beside modules, and Weights over what stood in their places (as
    their `base`).
    """
    beside: dict[str, dict[str, Any]] = {}
    for path, node in nodes.items():
        if isinstance(node, Attachment):
            module, _, key = path.rpartition("/")
            beside.setdefault(module, {})[key] = node
    known = places(params)
    weights = {p: n for p, n in nodes.items() if not isinstance(n, Attachment)}
    if missing := set(weights) - set(known):
        raise ValueError(
            f"the adapter has {sorted(missing)[0]}, which the model "
            f"lacks.{nearest(sorted(missing)[0], known)}"
        )

    def over(p, w):
        return weights[p].replace(base=w) if hasattr(weights[p], "base") else weights[p]

    return attach(map_places(lambda p, w: over(p, w) if p in weights else w, params), beside)
