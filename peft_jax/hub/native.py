"""This package's own adapter folders: any nodes of a tree, several methods together, in safetensors
and JSON.

`adapter_config.json` says where each node stands (layer by layer, so that stacked and looped trees
share it), its class and its options; `adapter_model.safetensors` has its arrays. Classes are looked
up among this package's own and those that are registered (`core/nodes.py`); a class that could not
be read is refused before anything is written.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.attachment import Shared
from peft_jax.core.files import read_json
from peft_jax.core.nodes import node_class, node_name
from peft_jax.core.placing import hidden_size
from peft_jax.core.select import OUTPUT_EMBEDDING
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import data_fields, is_node, places
from peft_jax.hub.layers import join_layers, put_nodes, split_layers
from peft_jax.hub.safetensors_io import CONFIG, open_checkpoint, write_adapter
from peft_jax.models.families import untie

WEIGHTS, FORMAT = "adapter_model.safetensors", "peft_jax"
_LEFT = (
    "base",
    "key",
    "shared",
)  # fields that the tree or `bind` fills, as it does the `ids` of banks


def save_native(
    folder: str | os.PathLike[str],
    params: Any,
    nodes: dict[str, Any],
    *,
    name: str,
    base: Any,
    revision: Any,
) -> None:
    """Write these nodes (place -> node) of the adapter `name`, and what it shares.

    Raises ValueError naming the place of a node that no folder can hold.
    """
    groups = {
        f"shared_{n.group}": params[f"shared_{n.group}"]
        for n in nodes.values()
        if getattr(n, "group", "")
    }
    tensors: dict[str, np.ndarray] = {}
    split = split_layers(params, nodes, name)
    described = {p: _describe(n, p, tensors) for p, n in split.items()}
    config = {
        "format": FORMAT,
        "version": 1,
        "base_model_name_or_path": base,
        "revision": revision,
        "hidden_size": _width(params),
        "untied": any(p.endswith(f"/{OUTPUT_EMBEDDING}") for p in places(params)),
        "nodes": described,
        "shared": {p: _describe(n, p, tensors) for p, n in groups.items()},
    }
    write_adapter(folder, WEIGHTS, tensors, config)


def _width(params: Any) -> int | None:
    try:
        return hidden_size(params)
    except ValueError:
        return None


def _describe(x: Any, path: str, tensors: dict[str, np.ndarray]) -> Any:
    """A value of a node's field as JSON; arrays go to `tensors` under `path`."""
    if is_node(x):
        fixed = [
            f.name
            for f in dataclasses.fields(x)
            if f.metadata.get("static") and f.name not in ("name", "frozen")
        ]
        left = (*_LEFT, "ids") if x.routed else _LEFT
        data = {
            f: _describe(getattr(x, f), f"{path}.{f}", tensors)
            for f in data_fields(x)
            if f not in left
        }
        return {
            "class": _named_class(x, path),
            "options": {f: _plain(getattr(x, f), f"{path}.{f}") for f in fixed},
            "fields": data,
        }
    if x is None:
        return None
    if isinstance(x, tuple | list):
        return {"tuple": [_describe(y, f"{path}.{i}", tensors) for i, y in enumerate(x)]}
    if isinstance(x, dict):
        return {"dict": {k: _describe(y, f"{path}.{k}", tensors) for k, y in x.items()}}
    tensors[path] = fetch(x)
    return {"tensor": path}


def _named_class(x: Any, path: str) -> str:
    try:
        return node_name(type(x))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _plain(x: Any, path: str) -> Any:
    """An option as JSON. Raises ValueError for what JSON would not give back."""
    if isinstance(x, tuple):
        return [_plain(y, path) for y in x]
    if x is None or type(x) in (bool, int, float, str):
        return x
    raise ValueError(
        f"{path} is {x!r}, and an option that is stored is a number, a string or a tuple of them"
    )


def load_native(params: Any, path: Path, name: str) -> Any:
    """`params` with the adapter of a folder that `save_native` wrote. Raises ValueError naming what
    cannot be used.
    """
    config = read_json(path / CONFIG)
    if config.get("version") != 1:
        raise ValueError(
            f"{path / CONFIG}: version {config.get('version')!r} of the format is not known; this "
            "package reads 1"
        )
    width = _width(params)
    if width and config.get("hidden_size") not in (None, width):
        raise ValueError(
            f"the adapter in {path} is for a model of {config['hidden_size']} features; this one "
            f"has {width}"
        )
    with open_checkpoint(path, WEIGHTS, WEIGHTS + ".index.json") as checkpoint:
        tensors = {n: checkpoint.read(n) for n in checkpoint.names}
    if config.get("untied"):
        params = untie(params)
    if config.get("trained"):
        raise ValueError(
            f"{path / CONFIG} is of an older version, which kept whole modules in a section of "
            "their own; write it again with "
            "this one"
        )

    def read(part):
        return {
            p: _restore(s, tensors, name, f"{path / CONFIG}: {p}")
            for p, s in (config.get(part) or {}).items()
        }

    nodes = join_layers(params, {p: _named(n, name) for p, n in read("nodes").items()}, name)
    groups = {
        f"{key.rpartition('_')[0]}_{name}": node
        for key, node in read("shared").items()
        if isinstance(node, Shared)
    }
    for place, node in nodes.items():
        _check_lead(params, place, node)
    return {**put_nodes(params, nodes), **groups} if groups else put_nodes(params, nodes)


def _check_lead(params: Any, place: str, node: Any) -> None:
    base = places(params).get(place)
    if not hasattr(node, "in_axes") or base is None:
        return
    placed = node.replace(base=base)
    lead = tuple(np.shape(jax.tree.leaves(node)[0])[: len(placed.lead)])
    if placed.shape != base.shape or placed.lead != lead or _made_shape(placed) != base.shape:
        raise ValueError(
            f"the adapter's arrays at {place} do not fit a weight of shape {base.shape}"
        )


def _made_shape(node: Any) -> tuple[int, ...] | None:
    """The shape of the array that a node makes; None where its arrays do not go together."""
    if getattr(node, "group", ""):
        return node.shape  # what it shares is handed out later
    try:
        return jax.eval_shape(lambda n: n.materialize(), node).shape
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return None


def _named(node: Any, name: str) -> Any:
    group = getattr(node, "group", "")
    return node.replace(
        name=name, **({"group": f"{group.rpartition('_')[0]}_{name}"} if group else {})
    )


def _restore(spec: Any, tensors: dict[str, np.ndarray], name: str, where: str) -> Any:
    """The value that `_describe` described."""
    if spec is None:
        return None
    if not isinstance(spec, dict):
        raise ValueError(f"{where} is no description of a node")
    if "tensor" in spec:
        if spec["tensor"] not in tensors:
            raise ValueError(f"{where} needs the tensor {spec['tensor']!r}, which {WEIGHTS} lacks")
        return tensors[spec["tensor"]]
    if "tuple" in spec:
        return tuple(_restore(s, tensors, name, where) for s in spec["tuple"])
    if "dict" in spec:
        return {k: _restore(s, tensors, name, where) for k, s in spec["dict"].items()}
    try:
        cls: Any = node_class(str(spec.get("class", "")))
    except ValueError as error:
        raise ValueError(f"{where} has {error}") from error
    fields = {f.name: f for f in dataclasses.fields(cls)}
    options, data = spec.get("options") or {}, spec.get("fields") or {}
    if unknown := [k for k in (*options, *data) if k not in fields]:
        raise ValueError(f"{where} has a field {unknown[0]!r}, which a {cls.__name__} lacks")
    values = {k: _restore(s, tensors, name, where) for k, s in data.items()}
    values |= {k: _tuples(v) for k, v in options.items()} | (
        {"base": None} if "base" in fields else {}
    )
    try:
        made = cls(**values)
    except TypeError as error:
        raise ValueError(f"{where} is no whole {cls.__name__}: {error}") from error
    for field in cls.trainable:
        for array in jax.tree.leaves(getattr(made, field, None)):
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(
                    f"{where} has {field} of dtype {array.dtype}, and what trains is floating point"
                )
    return made


def _tuples(x: Any) -> Any:
    return tuple(_tuples(y) for y in x) if isinstance(x, list) else x
