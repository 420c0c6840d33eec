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

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from peft_jax.core.mesh import automatic, batch_axes, entered_mesh


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
    function from such states (and a key for the head's dropout, `rng`) to logits [B, T, V], best a
    `jax.tree_util.Partial` of the arrays that it uses (see `over_positions`).
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

    of = with_head(_scored, head)
    return over_positions(of, (states, targets), logits_width(head, states), chunk, rng)


def with_head(function: Callable[..., Any], *given: Any) -> Callable[..., Any]:
    """`function(*given, *arrays, rng=None)`, given heads and trees of arrays, as a function of
    arrays alone: a `Partial` where all heads are.
    """
    heads = [x for x in given if callable(x)]
    kind = Partial if all(isinstance(h, Partial) for h in heads) else functools.partial
    return kind(function, *given)


def _scored(head: Any, states: jax.Array, targets: jax.Array, rng: Any = None) -> Any:
    return nll_and_hits(head(states, rng=rng), targets)


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
    """`of(*arrays)`, a tree of arrays [B, T, ...], of trees of arrays [B, T, ...], for `chunk`
    tokens at a time and computed again in the backward pass, so that `width` logits a token are
    never stored for the whole batch.

    0: all at once; None: chunks where the float32 logits of a device would exceed 256 MB. With a
    key `rng` each chunk gets its own, by that name. On a mesh each device takes its own tokens in
    chunks where `of` is a `jax.tree_util.Partial`, whose arrays are gathered once for all chunks
    and their gradients added up after the last one; other functions are split as the compiler
    does it.
    """
    with entered_mesh((of if isinstance(of, Partial) else None, arrays)):
        B, T = jax.tree.leaves(arrays)[0].shape[:2]
        rows, tokens = batch_axes(B, T)
        ways = math.prod(map(automatic, (*rows, *tokens)))
        most = None if chunk is None else -(-chunk // ways)
        if ways == 1 or not isinstance(of, Partial) or _steps(B * T // ways, T, width, most) <= 1:
            return _in_chunks(of, arrays, width, chunk, rng, ways)
        return _each_its_own(of, arrays, width, most, rng, rows, tokens)


def _steps(tokens: int, T: int, width: int, chunk: int | None) -> int:
    """In how many runs of positions `tokens` of rows of T are taken, `chunk` at a time."""
    rows = max(1, tokens // T)
    if chunk is None:
        chunk = max(1, _CHUNK_BYTES // (4 * width * rows)) * rows
        chunk = 0 if tokens * width * 4 <= _CHUNK_BYTES else chunk
    return 1 if chunk <= 0 else -(-T // max(1, chunk // rows))


def _each_its_own(
    of: Partial,
    arrays: Any,
    width: int,
    chunk: int | None,
    rng: Any,
    rows: tuple[str, ...],
    tokens: tuple[str, ...],
) -> Any:
    """`_in_chunks` of each device's own rows and tokens."""
    leaves, tree = jax.tree.flatten(of)
    used = _used(of, arrays, rng)
    given = [x for u, x in zip(used, leaves, strict=True) if u]
    axes = [_split_axis(x) if "fsdp" in rows else None for x in given]

    def local(parts: list[Any], arrays: Any, rng: Any) -> Any:
        whole = map(_gathered, parts, axes)
        filled = [
            next(whole) if u else jnp.zeros(x.shape, x.dtype)
            for u, x in zip(used, leaves, strict=True)
        ]
        if rng is not None:
            for axis in (*rows, *tokens):
                rng = jax.random.fold_in(rng, jax.lax.axis_index(axis))
        return _in_chunks(tree.unflatten(filled), arrays, width, chunk, rng, 1)

    split = P(rows or None, tokens or None)
    run = jax.shard_map(
        local,
        in_specs=([_spec(axis) for axis in axes], split, P()),
        out_specs=split,
        axis_names={*rows, *tokens},
        check_vma=False,
    )
    return run(given, arrays, rng)


def _split_axis(x: jax.Array) -> int | None:
    """The axis along which a matrix lies over `fsdp`, as heads [D, V] and embeddings [V, D] do:
    the shorter one, if that divides. So its gradient is scattered where it is added up.
    """
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.inexact):
        return None
    axis = 0 if x.shape[0] <= x.shape[1] else 1
    return axis if x.shape[axis] % automatic("fsdp") == 0 else None


def _spec(axis: int | None) -> P:
    return P() if axis is None else P(*[None] * axis, "fsdp")


def _gathered(x: jax.Array, axis: int | None) -> jax.Array:
    return x if axis is None else jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)


def _used(of: Partial, arrays: Any, rng: Any) -> list[bool]:
    """Which of its arrays a function uses: a head is given the whole tree of a model."""
    leaves, tree = jax.tree.flatten(of)
    few = jax.tree.map(lambda x: x[:, :1], arrays)

    def run(leaves: list[Any]) -> Any:
        return tree.unflatten(leaves)(*few, **({} if rng is None else {"rng": rng}))

    jaxpr = jax.make_jaxpr(run)(leaves).jaxpr
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]


def _in_chunks(
    of: Callable[..., Any], arrays: Any, width: int, chunk: int | None, rng: Any, ways: int
) -> Any:
    """`of(*arrays)` by runs of positions over all rows, so that rows stay split as they are, over
    `ways` devices.
    """

    def keyed(index):
        return {} if rng is None else {"rng": jax.random.fold_in(rng, index)}

    B, T = jax.tree.leaves(arrays)[0].shape[:2]
    most = None if chunk is None else -(-chunk // ways)
    steps = _steps(B * T // ways, T, width, most) if ways > 1 else _steps(B * T, T, width, chunk)
    if steps <= 1:
        return of(*arrays, **keyed(0))
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
