"""Objectives: pure functions (apply, params, batch, rng) -> (loss, metrics).

`loss` is a mean over what counts in the batch and `metrics["weight"]` says how much that was, so that micro-batches and
evaluation batches can be averaged exactly.

A loss that is no such mean (several means over different things, pairs that are told from all others of the batch) also has
`metrics["shared"]`: a tree of arrays that the other micro-batches must know of this one. Where a batch is taken in parts, the
objective gets all parts' as `batch["shared"]`, each array with one more leading axis, and its own number as `batch["part"]`.
What it then returns adds up over the parts to the whole batch's, gradients included.
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
    rng)` are [B, T, D], and `head(apply, params, batch)` is a function from such states (and a key for the head's dropout,
    `rng`) to logits [B, T, V].
    """

    view: Callable[[dict[str, jax.Array], Any], dict[str, jax.Array]]
    states: Callable[[Apply, Any, dict[str, jax.Array], Any], jax.Array]
    head: Callable[[Apply, Any, dict[str, jax.Array]], Callable[..., jax.Array]]


def cross_entropy(reading: Reading, apply: Apply, params: Any, batch: Any, rng: Any, *, chunk: int | None = None) -> Any:
    """Mean cross-entropy of what `reading` makes of a batch, in nats, weighted; see `over_positions` for `chunk`."""
    batch = reading.view(batch, rng)
    states = reading.states(apply, params, batch, rng)
    head = reading.head(apply, params, batch)
    nll, hits = scores_of(head, states, batch["targets"], chunk, rng)
    mean, weights = mean_over(batch), batch["weights"].astype(jnp.float32)
    return mean(nll, weights), {"weight": weights.sum(), "accuracy": mean(hits, weights)}


def mean_over(batch: dict[str, jax.Array]) -> Callable[..., jax.Array]:
    """`mean(values, weights, name)`: the weighted mean of what a batch has, or of a part of one its share of the whole mean.

    `name` says which of the batch's shared sums of weights it is about.
    """
    shared = batch.get("shared", {})

    def mean(values: jax.Array, weights: jax.Array, name: str = "weight") -> jax.Array:
        total = shared[name].sum() if name in shared else weights.sum()
        return (values * weights).sum() / jnp.maximum(total, 1e-9)

    return mean


def scores_of(head: Any, states: jax.Array, targets: jax.Array, chunk: int | None, rng: Any = None) -> Any:
    """(negative log-likelihood, whether it was the likeliest) of `targets` [B, T] at states [B, T, D]."""
    of = lambda states, targets, rng=None: nll_and_hits(head(states, rng=rng), targets)
    return over_positions(of, (states, targets), logits_width(head, states), chunk, rng)


def nll_and_hits(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(negative log-likelihood, whether it is the first of the likeliest) of `targets` [...], given logits [..., V]."""
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    best = logits.max(-1, keepdims=True)
    first = jnp.where(logits >= best, jnp.arange(logits.shape[-1]), logits.shape[-1]).min(-1)  # cheaper than argmax
    return loss, first == targets


def logits_width(head: Callable[..., jax.Array], states: jax.Array) -> int:
    """The number of logits that `head` gives for each of states [B, T, D]."""
    return jax.eval_shape(head, states[:, :1]).shape[-1]


def over_positions(of: Callable[..., Any], arrays: Any, width: int, chunk: int | None, rng: Any = None) -> Any:
    """`of(*arrays)`, a tree of arrays [B, T], of trees of arrays [B, T, ...], for `chunk` tokens at a time and computed again
    in the backward pass, so that `width` logits a token are never stored for the whole batch.

    0: all at once; None: chunks where float32 logits would exceed 256 MB. With a key `rng` each chunk gets its own, by that
    name.
    """
    keyed = lambda index: {} if rng is None else {"rng": jax.random.fold_in(rng, index)}
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

    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, steps * size, *x.shape[3:])[:, :T]
    body = jax.checkpoint(lambda index, part: (index + 1, of(*part, **keyed(index))))
    return jax.tree.map(join, jax.lax.scan(body, jnp.int32(0), jax.tree.map(split, arrays))[1])


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


def token_head(apply: Apply, params: Any, batch: dict[str, jax.Array]) -> Callable[..., jax.Array]:
    """The model's own head."""
    if not _unembeds(apply):
        return _as_they_are
    return functools.partial(apply, params, method="unembed", adapter_ids=batch.get("adapter_ids"))


def _as_they_are(logits: jax.Array, rng: Any = None) -> jax.Array:
    """The head of a model whose states are logits."""
    return logits


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

    Where the model has `hidden` and `unembed`, logits are computed for `chunk` tokens at a time (see `over_positions`). A
    mixture of experts adds its load-balancing loss (see `balanced`).
    """
    return balanced(functools.partial(cross_entropy, TOKENS, chunk=chunk), router_loss)(apply, params, batch, rng)


def balanced(objective: Objective, router_loss: float | None = None) -> Objective:
    """`objective`, to which a mixture of experts adds `router_loss` times its load-balancing loss in training (with an `rng`),
    by default as its checkpoint says; the metric is `router`. Micro-batches are balanced each in itself.
    """

    def run(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> Any:
        config = getattr(getattr(apply, "model", None), "config", None)
        own = getattr(config, "router_loss", 0.0)
        share = (own if router_loss is None else router_loss) if getattr(config, "num_experts", 0) else 0.0
        if not share or rng is None:
            return objective(apply, params, batch, rng)
        found: list[Any] = []
        loss, metrics = objective(_with_router(apply, found), params, batch, rng)
        router = sum(map(load_balancing_loss, found), start=jnp.zeros(())) / len(found) / _parts(batch)
        return loss + share * router, {**metrics, "router": router}

    return run


def _with_router(apply: Apply, found: list[Any]) -> Apply:
    """`apply` that leaves in `found` what the routers did in each training pass through the layers."""

    def run(*args: Any, rng: Any = None, method: str | None = None, **kwargs: Any) -> Any:
        how = {} if method is None else {"method": method}
        if rng is None or method == "unembed" or "mutable" in kwargs:
            return apply(*args, rng=rng, **how, **kwargs)
        out, state = apply(*args, rng=rng, mutable=["router"], **how, **kwargs)
        found.append(state["router"])
        return out

    run.model = apply.model  # type: ignore[attr-defined]
    return run


def _parts(batch: dict[str, jax.Array]) -> int:
    """How many parts a batch is taken in, as far as the objective sees it."""
    return jax.tree.leaves(batch["shared"])[0].shape[0] if "shared" in batch else 1


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


LABELS = Reading(_labelled, _logits, lambda apply, params, batch: _as_they_are)
ANSWERS = Reading(_answered, _ends, LABELS.head)


def squared_error(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> Any:
    """Mean squared error of numbers [B], given logits [B, 1]."""
    weights = batch["weights"].astype(jnp.float32)
    values = apply(params, batch["tokens"], rng=rng, **inputs_of(batch))[:, 0]
    error = jnp.square(values - batch["labels"]) * weights
    return error.sum() / jnp.maximum(weights.sum(), 1e-9), {"weight": weights.sum()}


def contrast(
    apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any, *, temperature: float = 0.05, same: bool = False
) -> Any:
    """Cross-entropy of each text's own pair among the batch's, both ways, by the cosine of mean hidden states over
    `temperature` (van den Oord et al. 2018, arXiv:1807.03748; Reimers and Gurevych 2019 for the pooling).

    The two texts of a pair have dropout masks of their own, so a text may be its own pair (SimCSE, Gao et al. 2021,
    arXiv:2104.08821). Texts equal to a row's own are no negatives of it, unless `same`. A batch in parts is contrasted as a
    whole, one part's embeddings with gradients at a time (GradCache, Gao et al. 2021, arXiv:2101.06983).
    """
    keys = (None, None) if rng is None else jax.random.split(rng)
    sides = [(batch[f"{side}tokens"], batch[f"{side}segment_ids"]) for side in ("", "other_")]
    vectors = [embed_texts(apply, params, *texts, key) for texts, key in zip(sides, keys, strict=True)]
    mine = {
        "weights": batch["weights"].astype(jnp.float32),
        "vectors": jnp.stack(vectors, axis=1),
        "texts": jnp.stack([jnp.where(seen > 0, tokens, -1) for tokens, seen in sides], axis=1),
    }
    whole, own = mine, jnp.arange(len(mine["weights"]))
    if "part" in batch:  # the other parts' rows are constants
        put = lambda all, part: all.at[batch["part"]].set(part).reshape(-1, *part.shape[1:])
        whole, own = jax.tree.map(put, batch["shared"], mine), own + batch["part"] * len(own)
    losses, hits = _contrasted(whole, temperature, same)
    weights = whole["weights"]
    total = jnp.maximum(weights.sum(), 1e-9)
    loss = (losses * weights).sum() / total
    here = (losses * weights)[own].sum() / total
    loss = loss + jax.lax.stop_gradient(here - loss)  # the gradient is the whole loss's, the value adds up over parts
    metrics = {"weight": mine["weights"].sum(), "accuracy": (hits * weights)[own].sum() / total}
    return loss, {**metrics, "shared": mine}


def _contrasted(rows: dict[str, jax.Array], temperature: float, same: bool) -> tuple[jax.Array, jax.Array]:
    """(loss, whether the first text's pair is the likeliest) [B] of pairs: weights [B], vectors [B, 2, D], texts [B, 2, T]."""
    weights, vectors, texts = rows["weights"], rows["vectors"], rows["texts"]
    own = jnp.arange(len(weights))
    scores = jnp.matmul(vectors[:, 0], vectors[:, 1].T, preferred_element_type=jnp.float32) / temperature
    others = weights[:, None] * weights[None] > 0  # rows that pad a batch are no one's pair
    if not same:
        equal = (texts[:, None] == texts[None]).all(-1).any(-1) & ~jnp.eye(len(own), dtype=bool)
        others = others & ~equal
    scores = jnp.where(others, scores, -1e9)
    (loss, hits), (back, _) = (nll_and_hits(s, own) for s in (scores, scores.T))
    return (loss + back) / 2, hits


def embed_texts(apply: Apply, params: Any, tokens: jax.Array, segment_ids: jax.Array, rng: Any = None) -> jax.Array:
    """A vector of length 1 for each text, float32 [B, D]: the mean of its hidden states; zeros where it has no token."""
    hidden = apply(params, tokens, segment_ids=segment_ids, rng=rng, method="hidden").astype(jnp.float32)
    mean = mean_of(hidden, segment_ids)
    square = jnp.square(mean).sum(-1, keepdims=True)
    return mean * jax.lax.rsqrt(jnp.maximum(square, 1e-18))  # a norm has no gradient at zero
