"""A tree made ready for one call: shared arrays, randomness and the rows' adapters handed to its
nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from peft_jax.core.attachment import Attachment, Shared
from peft_jax.core.tree import data_fields, is_node, map_nodes, map_places, places
from peft_jax.core.weight import Weight


def distribute(params: Any) -> Any:
    """Nodes given the arrays that they share (see `Shared`), repeated over their leading axes."""
    groups = (
        {k: x for k, x in params.items() if isinstance(x, Shared)}
        if isinstance(params, Mapping)
        else {}
    )
    if not groups:
        return params

    def fill(_: str, x: Any) -> Any:
        return _fill_shared(x, groups)

    return map_places(fill, params)


def _fill_shared(x: Any, groups: Mapping[str, Shared]) -> Any:
    if not is_node(x):
        return map_nodes(lambda y: _fill_shared(y, groups), x)
    changes = {f: _fill_shared(getattr(x, f), groups) for f in data_fields(x)}
    if group := getattr(x, "group", ""):
        if (source := groups.get(f"shared_{group}")) is None:
            raise ValueError(
                f"the tree lacks 'shared_{group}', which its {type(x).__name__} nodes need"
            )
        arrays = {**source.fixed, **source.trained}
        changes["shared"] = {
            n: jax.numpy.broadcast_to(a, (*getattr(x, "lead", ()), *a.shape))
            for n, a in arrays.items()
        }
    return x.replace(**changes)


def resolve(params: Any) -> Any:
    """Nodes that are an array as it is used replaced by the array."""
    return map_places(lambda _, x: x.resolved() if isinstance(x, Weight) else x, params)


def prepare(params: Any, rng: jax.Array | None = None, adapter_ids: Any = None) -> Any:
    """The tree as `bind` runs it: shared arrays, randomness and the rows' adapters handed to the
    nodes.
    """
    return resolve(link(with_adapter_ids(with_rng(distribute(params), rng), adapter_ids)))


def link(params: Any) -> Any:
    """Attachments given what they need of the rest of the tree (`Attachment.linked`)."""
    return map_places(
        lambda path, x: x.linked(params, path) if isinstance(x, Attachment) else x, params
    )


def cache_slots(params: Any) -> int:
    """Slots of a key/value cache that the tree's attachments take before the first token."""
    return sum(x.slots for x in places(params).values() if isinstance(x, Attachment))


def with_rng(params: Any, rng: jax.Array | None) -> Any:
    """Stochastic nodes given a key each (one per slice of their leading axes), folded in by their
    place.
    """
    if rng is None:
        return params

    def inner(x: Any, key: jax.Array) -> Any:
        if not is_node(x):
            return map_nodes(lambda y: inner(y, key), x)
        x = x.drawn(rng)
        changes = {
            f: inner(getattr(x, f), jax.random.fold_in(key, 1)) for f in _descended(x) if f != "key"
        }
        if x.stochastic:
            changes["key"] = jax.random.split(key, x.lead) if x.lead else key
        return x.replace(**changes)

    counter = iter(range(10**9))
    return map_places(lambda _, x: inner(x, jax.random.fold_in(rng, next(counter))), params)


def with_adapter_ids(params: Any, ids: jax.Array | np.ndarray | None) -> Any:
    """Nodes that hold a bank of adapters told which one each row of the batch uses: `ids` [B]."""
    if ids is None:
        return params
    ids = jax.numpy.asarray(ids)

    def inner(x: Any) -> Any:
        if not is_node(x):
            return map_nodes(inner, x)
        changes = {f: inner(getattr(x, f)) for f in _descended(x) if f != "ids"}
        if x.routed:
            changes["ids"] = jax.numpy.broadcast_to(ids, (*x.lead, *ids.shape))
        return x.replace(**changes)

    return map_places(lambda _, x: inner(x), params)


def _descended(node: Any) -> list[str]:
    """The data fields without a bank's adapters, which have neither rows nor randomness of their
    own.
    """
    return [f for f in data_fields(node) if f != "adapters"]
