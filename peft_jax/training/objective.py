"""Objectives: pure functions (apply, params, batch, rng) -> (loss, metrics).

`loss` is a mean over what counts in the batch and `metrics["weight"]` says how much that was, so that micro-batches and
evaluation batches can be averaged exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from peft_jax.models.blocks import mean_of
from peft_jax.models.moe import load_balancing_loss

Apply = Callable[..., Any]
Objective = Callable[[Apply, Any, dict[str, jax.Array], Any], tuple[jax.Array, dict[str, jax.Array]]]
_CHUNK_BYTES = 256 * 2**20  # logits larger than this are computed in chunks unless told otherwise


class Reading(NamedTuple):
    """How a task reads a batch, for a loss over distributions.

    `view(batch, rng)` is the batch as the model gets it, with targets [B, T] and weights [B, T]; `states(apply, params, batch,
    rng)` are [B, T, D], and `head(apply, params, batch)` is a function from such states to logits [B, T, V].
    """

    view: Callable[[dict[str, jax.Array], Any], dict[str, jax.Array]]
    states: Callable[[Apply, Any, dict[str, jax.Array], Any], jax.Array]
    head: Callable[[Apply, Any, dict[str, jax.Array]], Callable[[jax.Array], jax.Array]]


def cross_entropy(reading: Reading, apply: Apply, params: Any, batch: Any, rng: Any, *, chunk: int | None = None) -> Any:
    """Mean cross-entropy of what `reading` makes of a batch, in nats, weighted; see `over_positions` for `chunk`."""
    batch = reading.view(batch, rng)
    states = reading.states(apply, params, batch, rng)
    return _cross_entropy(reading.head(apply, params, batch), states, batch["targets"], batch["weights"], chunk)


def _cross_entropy(head: Any, states: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int | None) -> Any:
    of = lambda states, targets: nll_and_hits(head(states), targets)
    loss, hits = over_positions(of, (states, targets), logits_width(head, states), chunk)
    weights = weights.astype(jnp.float32)
    total = jnp.maximum(weights.sum(), 1e-9)
    return (loss * weights).sum() / total, {"weight": weights.sum(), "accuracy": (hits * weights).sum() / total}


def nll_and_hits(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(negative log-likelihood, whether nothing is likelier) of `targets` [...], given logits [..., V]."""
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return loss, jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] >= logits.max(-1)  # cheaper than argmax


def logits_width(head: Callable[[jax.Array], jax.Array], states: jax.Array) -> int:
    """The number of logits that `head` gives for each of states [B, T, D]."""
    return jax.eval_shape(head, states[:, :1]).shape[-1]


def over_positions(of: Callable[..., Any], arrays: Any, width: int, chunk: int | None) -> Any:
    """`of(*arrays)`, a tree of arrays [B, T], of trees of arrays [B, T, ...], for `chunk` tokens at a time and computed again
    in the backward pass, so that `width` logits a token are never stored for the whole batch.

    0: all at once; None: chunks where float32 logits would exceed 256 MB.
    """
    B, T = jax.tree.leaves(arrays)[0].shape[:2]
    own = 0 if B * T * width * 4 <= _CHUNK_BYTES else max(1, _CHUNK_BYTES // (4 * width * B)) * B
    tokens = own if chunk is None else chunk
    steps = 1 if tokens <= 0 else -(-T // max(1, tokens // B))
    if steps <= 1:
        return of(*arrays)
    # Chunks are runs of positions over all rows, so that rows stay sharded as they are.
    size = -(-T // steps)
    pad = steps * size - T

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, steps, size, *x.shape[2:]), 1, 0)

    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, steps * size, *x.shape[3:])[:, :T]
    body = jax.checkpoint(lambda carry, part: (carry, of(*part)))
    return jax.tree.map(join, jax.lax.scan(body, None, jax.tree.map(split, arrays))[1])


# ------------------------------------------------------------------------------------------------------------------ tokens


_INPUTS = ("positions", "segment_ids", "token_type_ids", "adapter_ids", "branches", "mentions", "entities")


def inputs_of(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a model's call takes beside tokens; `knowledge.inputs.reads_knowledge` gives it the last three."""
    return {name: batch[name] for name in _INPUTS if name in batch}


def _unembeds(apply: Apply) -> bool:
    return hasattr(getattr(apply, "model", None), "unembed")


def _hidden(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any, **more: Any) -> Any:
    tokens = [batch[name] for name in ("tokens", "decoder_tokens") if name in batch]
    method = {"method": "hidden"} if _unembeds(apply) else {}
    return apply(params, *tokens, rng=rng, **method, **inputs_of(batch), **more)


def token_states(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> jax.Array:
    """Hidden states before the head, at `batch["at"]` [B, T] where it has that; logits of a model without `unembed`."""
    hidden = _hidden(apply, params, batch, rng)
    return jnp.take_along_axis(hidden, batch["at"][..., None], axis=1) if "at" in batch else hidden


def token_head(apply: Apply, params: Any, batch: dict[str, jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The model's own head."""
    if not _unembeds(apply):
        return lambda logits: logits
    return functools.partial(apply, params, rng=None, method="unembed", adapter_ids=batch.get("adapter_ids"))


TOKENS = Reading(lambda batch, rng: batch, token_states, token_head)


def next_token(
    apply: Apply,
    params: Any,
    batch: dict[str, jax.Array],
    rng: Any,
    *,
    chunk: int | None = None,
    router_loss: float | None = None,
) -> Any:
    """Mean cross-entropy of the next token, in nats, weighted by `batch["weights"]` [B, T].

    Where the model has `hidden` and `unembed`, logits are computed for `chunk` tokens at a time (see `over_positions`). In
    training (with an `rng`) a mixture of experts adds `router_loss` times its load-balancing loss, by default as its checkpoint
    says; the metric is `router`.
    """
    config = getattr(getattr(apply, "model", None), "config", None)
    own = getattr(config, "router_loss", 0.0)
    share = (own if router_loss is None else router_loss) if getattr(config, "num_experts", 0) else 0.0
    if not share or rng is None:
        return cross_entropy(TOKENS, apply, params, batch, rng, chunk=chunk)
    hidden, state = _hidden(apply, params, batch, rng, mutable=["router"])
    head = token_head(apply, params, batch)
    loss, metrics = _cross_entropy(head, hidden, batch["targets"], batch["weights"], chunk)
    router = load_balancing_loss(state["router"])
    return loss + share * router, {**metrics, "router": router}


def masked_tokens(
    batch: dict[str, jax.Array], rng: Any, *, mask_token: int, vocab_size: int, share: float = 0.15
) -> dict[str, jax.Array]:
    """The batch with a `share` of each row's tokens to be guessed (Devlin et al. 2018, section 3.1): four in five become the
    mask, one in ten another token, and one in ten stays. `at` [B, n] says which, with their targets and weights [B, n].

    Each call draws anew; without an `rng`, in evaluation, always the same.
    """
    key = jax.random.key(0) if rng is None else jax.random.fold_in(rng, 1)
    draws = jax.random.split(key, 3)
    tokens, maskable = batch["tokens"], batch["weights"] > 0
    count = max(1, round(share * tokens.shape[1]))
    drawn, at = jax.lax.top_k(jnp.where(maskable, jax.random.uniform(draws[0], tokens.shape), -1.0), count)  # [B, count]
    wanted = jnp.ceil(share * maskable.sum(-1, keepdims=True))
    weights = ((jnp.arange(count) < wanted) & (drawn >= 0)).astype(jnp.float32)
    targets = jnp.take_along_axis(tokens, at, axis=1)
    what = jax.random.uniform(draws[1], at.shape)
    other = jnp.where(what < 0.9, jax.random.randint(draws[2], at.shape, 0, vocab_size, tokens.dtype), targets)
    new = jnp.where(weights > 0, jnp.where(what < 0.8, mask_token, other), targets)
    seen = jax.vmap(lambda row, i, x: row.at[i].set(x))(tokens, at, new)
    return {**batch, "tokens": seen, "at": at, "targets": targets, "weights": weights}


def masked_reading(**options: Any) -> Reading:
    """A masked language model's, with the options of `masked_tokens`."""
    return Reading(functools.partial(masked_tokens, **options), token_states, token_head)


# ------------------------------------------------------------------------------------------------------------------ labels


def _logits(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> jax.Array:
    """A head's logits as states [B, T, C], of one position where there is one label a row."""
    logits = apply(params, batch["tokens"], rng=rng, **inputs_of(batch))
    return logits[:, None] if logits.ndim == 2 else logits


def _labelled(batch: dict[str, jax.Array], rng: Any) -> dict[str, jax.Array]:
    column = lambda x: x[:, None] if x.ndim == 1 else x
    return {**batch, "targets": column(batch["labels"]), "weights": column(batch["weights"])}


def _ends(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> jax.Array:
    """Scores of each token as an answer's first and as its last, [B, 2, T]; padding has no part."""
    logits = apply(params, batch["tokens"], rng=rng, **inputs_of(batch)).astype(jnp.float32)
    return jnp.where(batch["segment_ids"][..., None] > 0, logits, -1e9).swapaxes(1, 2)


def _answered(batch: dict[str, jax.Array], rng: Any) -> dict[str, jax.Array]:
    weights = jnp.broadcast_to(0.5 * batch["weights"][:, None], batch["labels"].shape)  # its two ends weigh as one
    return {**batch, "targets": batch["labels"], "weights": weights}


LABELS = Reading(_labelled, _logits, lambda apply, params, batch: lambda logits: logits)
ANSWERS = Reading(_answered, _ends, LABELS.head)


def squared_error(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> Any:
    """Mean squared error of numbers [B], given logits [B, 1]."""
    weights = batch["weights"].astype(jnp.float32)
    values = apply(params, batch["tokens"], rng=rng, **inputs_of(batch))[:, 0]
    error = jnp.square(values - batch["labels"]) * weights
    return error.sum() / jnp.maximum(weights.sum(), 1e-9), {"weight": weights.sum()}


def contrast(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any, *, temperature: float = 0.05) -> Any:
    """Cross-entropy of each text's own pair among the batch's, both ways, by the cosine of mean hidden states over
    `temperature` (van den Oord et al. 2018, arXiv:1807.03748; Reimers and Gurevych 2019 for the pooling).
    """
    weights = batch["weights"].astype(jnp.float32)
    first, second = (
        embed_texts(apply, params, batch[f"{side}tokens"], batch[f"{side}segment_ids"], rng) for side in ("", "other_")
    )
    scores = jnp.matmul(first, second.T, preferred_element_type=jnp.float32) / temperature
    scores = jnp.where(weights[:, None] * weights[None] > 0, scores, -1e9)  # rows that pad a batch are no one's pair
    own = jnp.arange(len(weights))
    both = (_cross_entropy(lambda x: x, s[:, None], own[:, None], weights[:, None], 0) for s in (scores, scores.T))
    (loss, metrics), (other, _) = both
    return (loss + other) / 2, metrics


def embed_texts(apply: Apply, params: Any, tokens: jax.Array, segment_ids: jax.Array, rng: Any = None) -> jax.Array:
    """A vector of length 1 for each text, float32 [B, D]: the mean of its hidden states."""
    hidden = apply(params, tokens, segment_ids=segment_ids, rng=rng, method="hidden").astype(jnp.float32)
    mean = mean_of(hidden, segment_ids)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-9)
