"""Objectives: pure functions (apply, params, batch, rng) -> (loss, metrics).

`loss` is a mean over what counts in the batch and `metrics["weight"]` says how much that was, so
that micro-batches and evaluation batches can be averaged exactly.

A loss that is no such mean (several means over different things, pairs that are told from all
others of the batch) also has `metrics["shared"]`: a tree of arrays that the other micro-batches
must know of this one. Where a batch is taken in parts, the objective gets all parts' as
`batch["shared"]`, each array with one more leading axis, and its own number as `batch["part"]`.
What it then returns adds up over the parts to the whole batch's, gradients included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax


class Apply(Protocol):
    """A model as a function of its parameters: the result of `bind`, or one of the user's own."""

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any: ...


Objective = Callable[
    [Apply, Any, dict[str, jax.Array], Any], tuple[jax.Array, dict[str, jax.Array]]
]
_CHUNK_BYTES = 256 * 2**20  # logits larger than this are computed in chunks unless told otherwise


class Reading(NamedTuple):
    """How a task reads a batch, for a loss over distributions.

    `view(batch, rng)` is the batch as the model gets it, with targets [B, T] and weights [B, T];
    `states(apply, params, batch, rng)` are [B, T, D], and `head(apply, params, batch)` is a
    function from such states (and a key for the head's dropout, `rng`) to logits [B, T, V].
    """

    view: Callable[[dict[str, jax.Array], Any], dict[str, jax.Array]]
    states: Callable[[Apply, Any, dict[str, jax.Array], Any], jax.Array]
    head: Callable[[Apply, Any, dict[str, jax.Array]], Callable[..., jax.Array]]


def cross_entropy(
    reading: Reading, apply: Apply, params: Any, batch: Any, rng: Any, *, chunk: int | None = None
) -> Any:
    """Mean cross-entropy of what `reading` makes of a batch, in nats, weighted; see
    `over_positions` for `chunk`.
    """
    batch = reading.view(batch, rng)
    states = reading.states(apply, params, batch, rng)
    head = reading.head(apply, params, batch)
    nll, hits = scores_of(head, states, batch["targets"], chunk, rng)
    mean, weights = mean_over(batch), batch["weights"].astype(jnp.float32)
    return mean(nll, weights), {"weight": weights.sum(), "accuracy": mean(hits, weights)}


def mean_over(batch: dict[str, jax.Array]) -> Callable[..., jax.Array]:
    """`mean(values, weights, name)`: the weighted mean of what a batch has, or of a part of one its
    share of the whole mean.

    `name` says which of the batch's shared sums of weights it is about.
    """
    shared = batch.get("shared", {})

    def mean(values: jax.Array, weights: jax.Array, name: str = "weight") -> jax.Array:
        total = shared[name].sum() if name in shared else weights.sum()
        return (values * weights).sum() / jnp.maximum(total, 1e-9)

    return mean


def scores_of(
    head: Any, states: jax.Array, targets: jax.Array, chunk: int | None, rng: Any = None
) -> Any:
    """(negative log-likelihood, whether it was the likeliest) of `targets` [B, T] at states [B, T,
    D].
    """

    def of(states, targets, rng=None):
        return nll_and_hits(head(states, rng=rng), targets)

    return over_positions(of, (states, targets), logits_width(head, states), chunk, rng)


def nll_and_hits(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(negative log-likelihood, whether it is the first of the likeliest) of `targets` [...], given
    logits [..., V].
    """
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    best = logits.max(-1, keepdims=True)
    first = jnp.where(logits >= best, jnp.arange(logits.shape[-1]), logits.shape[-1]).min(
        -1
    )  # cheaper than argmax
    return loss, first == targets


def logits_width(head: Callable[..., jax.Array], states: jax.Array) -> int:
    """The number of logits that `head` gives for each of states [B, T, D]."""
    return jax.eval_shape(head, states[:, :1]).shape[-1]


def over_positions(
    of: Callable[..., Any], arrays: Any, width: int, chunk: int | None, rng: Any = None
) -> Any:
    """`of(*arrays)`, a tree of arrays [B, T], of trees of arrays [B, T, ...], for `chunk` tokens at
    a time and computed again in the backward pass, so that `width` logits a token are never stored
    for the whole batch.

    0: all at once; None: chunks where float32 logits would exceed 256 MB. With a key `rng` each
    chunk gets its own, by that name.
    """

    def keyed(index):
        return {} if rng is None else {"rng": jax.random.fold_in(rng, index)}

    B, T = jax.tree.leaves(arrays)[0].shape[:2]
    own = 0 if B * T * width * 4 <= _CHUNK_BYTES else max(1, _CHUNK_BYTES // (4 * width * B)) * B
    tokens = own if chunk is None else chunk
    steps = 1 if tokens <= 0 else -(-T // max(1, tokens // B))
    if steps <= 1:
        return of(*arrays, **keyed(0))
    # Chunks are runs of positions over all rows, so that rows stay sharded as they are.
    size = -(-T // steps)
    pad = steps * size - T

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, steps, size, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, steps * size, *x.shape[3:])[:, :T]

    body = jax.checkpoint(lambda index, part: (index + 1, of(*part, **keyed(index))))
    return jax.tree.map(join, jax.lax.scan(body, jnp.int32(0), jax.tree.map(split, arrays))[1])


_INPUTS = (
    "positions",
    "segment_ids",
    "token_type_ids",
    "adapter_ids",
    "branches",
    "mentions",
    "entities",
)


def inputs_of(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a model's call takes beside tokens; `knowledge.inputs.reads_knowledge` gives it the last
    three.
    """
    return {name: batch[name] for name in _INPUTS if name in batch}


def as_they_are(logits: jax.Array, rng: Any = None) -> jax.Array:
    """The head of a model whose states are logits."""
    return logits
