"""PEFT's PREFIX_TUNING: keys and values before those of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np

from peft_jax.adapters.prefix import Offset, Prefix, offset_stack
from peft_jax.core.attachment import attach
from peft_jax.core.placing import attention_cores, layers_of, token_stack
from peft_jax.core.prepare import distribute
from peft_jax.core.roles import role_of
from peft_jax.core.tree import places
from peft_jax.hub.layers import join_layers, put_nodes, split_layers
from peft_jax.hub.peft.formats import Config, Tensors, WholeFormat


def prefix_places(params: Any) -> list[tuple[str, int]]:
    """(canonical path of an attention core, number of the pair of keys and values there) for PEFT's
    prefixes.

    A decoder's layers have a pair each. In an encoder-decoder of L decoder layers, layer i attends
    to itself with the pair 2 i, counted round L, and to the encoder with none: PEFT cuts its list
    of pairs, twice over, in fours, and uses the first two.
    """
    cores = [n for core in attention_cores(params) for n, _ in layers_of(params, core)[1]]
    if token_stack(params)[0] != "encoder-decoder":
        return [(core, i) for i, core in enumerate(cores)]
    own = [
        core
        for core in cores
        if core.startswith("decoder/") and role_of(core.rpartition("/")[0]) == "attention"
    ]
    return [(core, 2 * i % len(own)) for i, core in enumerate(own)]


def _write(params: Any, nodes: Mapping[str, Any], name: str) -> tuple[Tensors, dict[str, Any]]:
    split, order = _split_prefixes(params, nodes, name), prefix_places(params)
    if missing := [p for p, _ in order if f"{p}/prefix" not in split]:
        raise ValueError(
            f"PEFT's prefix tuning has a prefix in every layer, and {missing[0]} has none"
        )
    pairs = {i: split[f"{core}/prefix"] for core, i in order}
    pairs = {
        i: pairs.get(i, pairs[0]) for i in range(len(order))
    }  # what an encoder-decoder's list has and does not use
    both = [x for i in sorted(pairs) for x in (pairs[i].keys, pairs[i].values)]  # [P, K d] each
    if any(x is None for x in both):
        raise ValueError("a prefix in Flax's attention layers has no PEFT format")
    tensors = {"prompt_embeddings": np.concatenate(both, axis=-1)}
    own = {
        "num_virtual_tokens": both[0].shape[0],
        "num_layers": len(pairs),
        "prefix_projection": False,
    }
    return tensors, own | _sizes_of(params, both[0].shape[-1])


def _split_prefixes(params: Any, nodes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The prefixes by layer."""
    whole = places(distribute(params))
    return split_layers(
        params, {p: _made(whole[p]) for p, n in nodes.items() if isinstance(n, Prefix)}, name
    )


def _sizes_of(params: Any, features: int) -> dict[str, int]:
    """What PEFT asks of an encoder-decoder's attention with keys of so many features."""
    if token_stack(params)[0] != "encoder-decoder":
        return {}
    table = next(
        w
        for p, w in places(params).items()
        if p.endswith("/embedding") and role_of(p.rpartition("/")[0]) == "relative"
    )
    return {
        "num_transformer_submodules": 2,
        "num_attention_heads": table.shape[-1],
        "token_dim": features,
    }


def prefixes_fit(params: Any, nodes: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT's format can hold these prefixes: in an encoder-decoder those of its decoder's
    attention to itself, equal where PEFT has one pair for two layers.
    """
    if token_stack(params)[0] != "encoder-decoder":
        return True
    split, order = _split_prefixes(params, nodes, name), prefix_places(params)
    if set(split) != {f"{core}/prefix" for core, _ in order}:
        return False
    first = {i: split[f"{core}/prefix"] for core, i in order}
    return all(
        np.array_equal(getattr(split[f"{core}/prefix"], field), getattr(first[i], field))
        for core, i in order
        for field in ("keys", "values")
    )


def _made(node: Prefix) -> Prefix:
    """The prefix itself in the place of what makes it."""
    keys, values = node.arrays_by_layer()
    plain = {
        "weight": None,
        "bias": None,
        "shared": None,
        "group": "",
        "gating_weight": None,
        "gating_bias": None,
    }
    return node.replace(keys=keys, values=values, **plain)


def _read(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    if config.get("prefix_projection") and "prompt_embeddings" not in tensors:
        raise ValueError(
            "the adapter has its prefix as an encoder; save it with PEFT's inference mode"
        )
    return place_prefix(
        params, tensors["prompt_embeddings"].astype(np.float32), prefix_places(params), name
    )


def place_prefix(
    params: Any, flat: np.ndarray, order: list[tuple[str, int]], name: str, *, offset: bool = True
) -> Any:
    """`params` with a prefix from `flat` [P, 2 * pairs * K d], keys and values of each pair in
    turn; `order` says where.
    """
    from peft_jax.adapters.prefix import kv_features

    if not order:
        raise ValueError(
            "prefix tuning needs attention of this package's models, and this model has none"
        )
    count = len(order)
    wanted = 2 * count * kv_features(params)
    if flat.ndim != 2 or flat.shape[1] != wanted:
        raise ValueError(
            f"prompt_embeddings has shape {flat.shape}, expected (tokens, {wanted}) for this model"
        )
    parts = cast("list[jax.Array]", np.split(flat, 2 * count, axis=1))  # on the host
    nodes = {
        f"{core}/prefix": Prefix(
            keys=parts[2 * i],
            values=parts[2 * i + 1],
            length=flat.shape[0],
            offset=offset,
            name=name,
        )
        for core, i in order
    }
    placed, stack = put_nodes(params, join_layers(params, nodes, name)), offset_stack(params)
    if not offset or stack is None:
        return placed
    return attach(placed, {stack: {f"offset_{name}": Offset(length=flat.shape[0], name=name)}})


def _is_pair(node: Any) -> bool:
    """Whether a node is a prefix of keys and values, or what shifts the positions by it."""
    if isinstance(node, Offset):
        return True
    return node.part == "both" and node.gating_weight is None and node.offset


FORMAT = WholeFormat(
    name="PREFIX_TUNING",
    nodes=(Prefix, Offset),
    write=_write,
    read=_read,
    fits=_is_pair,
    fit=prefixes_fit,
)
