"""Parameter trees with nodes: their places, and the nodes in them.

A path is written with slashes, as in `model/layers/self_attn/q_proj/kernel`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from flax.core import meta

from peft_jax.core.weight import Node

_UNBOX = {
    meta.AxisMetadata: "flax.linen.meta.unbox",
    nnx.Variable: "flax.nnx.to_pure_dict",
}  # boxes -> what takes them off


def is_node(x: Any) -> bool:
    """Whether `x` is a Weight or an Attachment."""
    return isinstance(x, Node)


def path_str(path: Any) -> str:
    """A key path as a string with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def places(params: Any) -> dict[str, Any]:
    """path -> array or node, nodes not entered."""
    leaves = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: is_node(x) or isinstance(x, tuple(_UNBOX))
    )[0]
    for path, leaf in leaves:
        if call := next((call for box, call in _UNBOX.items() if isinstance(leaf, box)), None):
            raise ValueError(
                f"{path_str(path)} is boxed ({type(leaf).__name__}); call {call} first"
            )
    return {path_str(path): leaf for path, leaf in leaves}


def map_places(fn: Callable[[str, Any], Any], params: Any) -> Any:
    """The tree with each array or node replaced by `fn(path, it)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(path_str(path), leaf), params, is_leaf=is_node
    )


def stack_of(w: Any) -> list[Any]:
    """A place's nodes, outermost first."""
    found = []
    while is_node(w):
        found.append(w)
        w = getattr(w, "base", None)
    return found


def data_fields(node: Any) -> list[str]:
    """Names of a node's fields that hold arrays or nodes."""
    return [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]


def map_nodes(fn: Callable[[Any], Any], x: Any) -> Any:
    """The container x (a node's field) with each node in it replaced by `fn(node)`."""
    return jax.tree.map(lambda y: fn(y) if is_node(y) else y, x, is_leaf=is_node)


def nodes_in(x: Any) -> Iterator[Any]:
    """The nodes in a place, those within others too."""
    if not is_node(x):
        for y in jax.tree.leaves(x, is_leaf=is_node):
            yield from nodes_in(y) if is_node(y) else ()
        return
    yield x
    for f in data_fields(x):
        yield from nodes_in(getattr(x, f))
