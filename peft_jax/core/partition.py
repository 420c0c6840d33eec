"""What of a tree trains: partition and combination, freezing, full fine-tuning, counts and
penalties.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from peft_jax.core.attachment import Attachment
from peft_jax.core.method import Method
from peft_jax.core.select import Targets, matches, matches_nothing, select
from peft_jax.core.tree import data_fields, is_node, map_nodes, map_places, nodes_in, places
from peft_jax.core.weight import Trainable, Weight


def trainable_mask(params: Any) -> Any:
    """The tree of `params` with True for each array that trains.

    An array trains where the innermost node around it lists its field in `trainable` and is not
    frozen.
    """

    def mask(x: Any, trains: bool) -> Any:
        if is_node(x):
            return x.replace(
                **{
                    f: mask(getattr(x, f), f in x.trainable and not x.frozen)
                    for f in data_fields(x)
                }
            )
        return jax.tree.map(lambda y: mask(y, False) if is_node(y) else trains, x, is_leaf=is_node)

    return mask(params, False)


def partition(params: Any) -> tuple[Any, Any]:
    """(trainable, frozen): two trees like `params` with None where the other one has an array."""
    mask = trainable_mask(params)
    return (
        jax.tree.map(lambda m, x: x if m else None, mask, params),
        jax.tree.map(lambda m, x: None if m else x, mask, params),
    )


def combine(trainable: Any, frozen: Any) -> Any:
    """The tree whose `partition` is (trainable, frozen)."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
    )


def freeze(params: Any, targets: Targets = "*") -> Any:
    """Nodes whose path matches `targets` no longer train (their inner nodes neither).

    Raises ValueError for a target other than "*" that names no node.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    nodes = [p for p, x in places(params).items() if is_node(x)]
    for target in wanted:
        if target != "*" and not any(matches(p, target) for p in nodes):
            raise ValueError(matches_nothing("freeze", target, nodes))

    def inner(x: Any) -> Any:
        if not is_node(x):
            return map_nodes(inner, x)
        return x.replace(frozen=True, **{f: inner(getattr(x, f)) for f in data_fields(x)})

    return map_places(
        lambda path, x: inner(x) if any(matches(path, t) for t in wanted) else x, params
    )


def full(params: Any, key: Any = None, *, targets: Targets = "*", exclude: Targets = ()) -> Any:
    """Full fine-tuning: the arrays that `targets` name train as they are, and of pruned and
    factorized weights what they keep. `key` is not used.
    """
    paths = set(select(params, targets, exclude, min_ndim=0))

    def train(x: Any) -> Any:
        return (
            x if isinstance(x, Attachment) else x.train() if isinstance(x, Weight) else Trainable(x)
        )

    return map_places(lambda p, x: train(x) if p in paths else x, params)


def penalty(params: Any) -> Any:
    """What the nodes' `penalty` methods add to the loss; 0 where none has one.

    It is their sum, or for an adapter whose nodes also tell the number of their `penalty_terms` the
    mean over all of its terms (AdaLoRA's orthogonality).
    """
    sums: dict[Any, Any] = {}
    terms: dict[Any, Any] = {}
    for node in (n for x in places(params).values() for n in nodes_in(x) if hasattr(n, "penalty")):
        group = (type(node), getattr(node, "name", ""))
        sums[group] = sums.get(group, 0.0) + node.penalty()
        if hasattr(node, "penalty_terms"):
            terms[group] = terms.get(group, 0.0) + node.penalty_terms()
    return sum(total / terms[group] if group in terms else total for group, total in sums.items())


def count(params: Any) -> tuple[int, int]:
    """(trained, all) parameters; all counts logical weights, not the arrays of nodes."""
    trainable, _ = partition(params)
    trained = sum(x.size for x in jax.tree.leaves(trainable))
    total = 0
    for x in places(params).values():
        total += (
            sum(a.size for a in jax.tree.leaves(x))
            if isinstance(x, Attachment)
            else math.prod(x.shape)
        )
    return trained, total


METHOD = Method(
    name="full",
    function=full,
    nodes=(Trainable,),
    at="matrices",
    title="full fine-tuning",
    follows="Full fine-tuning: every weight trains",
    whole=True,
)
