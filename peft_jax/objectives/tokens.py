"""Objectives of language models: the next token, masked tokens, and a mixture's balance beside
either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from peft_jax.core.bind import Bound, bound_of
from peft_jax.models.moe import load_balancing_loss
from peft_jax.objectives.objective import NamedObjective
from peft_jax.objectives.reading import (
    Apply,
    Objective,
    Reading,
    as_they_are,
    cross_entropy,
    inputs_of,
)


def _hidden(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any, **more: Any) -> Any:
    tokens = [batch[name] for name in ("tokens", "decoder_tokens") if name in batch]
    method = {"method": "hidden"} if bound_of(apply).hidden_states else {}
    return apply(params, *tokens, rng=rng, **method, **inputs_of(batch), **more)


def token_states(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> jax.Array:
    """Hidden states before the head, at `batch["at"]` [B, T] where it has that; logits of a model
    without `unembed`.
    """
    hidden = _hidden(apply, params, batch, rng)
    return jnp.take_along_axis(hidden, batch["at"][..., None], axis=1) if "at" in batch else hidden


def token_head(apply: Apply, params: Any, batch: dict[str, jax.Array]) -> Callable[..., jax.Array]:
    """The model's own head."""
    bound = bound_of(apply)
    if not bound.hidden_states:
        return as_they_are
    if (ids := batch.get("adapter_ids")) is not None:  # each row's own, which is not to be gathered
        return functools.partial(apply, params, method="unembed", adapter_ids=ids)
    return Partial(_unembed, bound, params)


def _unembed(bound: Bound, params: Any, states: jax.Array, rng: Any = None) -> jax.Array:
    return bound(params, states, method="unembed", rng=rng)


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

    Where the model has `hidden` and `unembed`, logits are computed for `chunk` tokens at a time
    (see `over_positions`). A mixture of experts adds its load-balancing loss (see `balanced`).
    """
    return balanced(functools.partial(cross_entropy, TOKENS, chunk=chunk), router_loss)(
        apply, params, batch, rng
    )


def balanced(objective: Objective, router_loss: float | None = None) -> Objective:
    """`objective`, to which a mixture of experts adds `router_loss` times its load-balancing loss
    in training (with an `rng`), by default as its checkpoint says; the metric is `router`.
    Micro-batches are balanced each in itself.
    """

    def run(apply: Apply, params: Any, batch: dict[str, jax.Array], rng: Any) -> Any:
        bound = bound_of(apply)
        share = bound.router_loss if router_loss is None else router_loss
        if not bound.experts or not share or rng is None:
            return objective(apply, params, batch, rng)
        found: list[Any] = []
        loss, metrics = objective(_with_router(apply, found), params, batch, rng)
        router = (
            sum(map(load_balancing_loss, found), start=jnp.zeros(())) / len(found) / _parts(batch)
        )
        return loss + share * router, {**metrics, "router": router}

    return run


def _with_router(apply: Apply, found: list[Any]) -> Apply:
    """`apply` that leaves in `found` what the routers did in each training pass through the
    layers.
    """

    def around(
        call: Apply, *args: Any, rng: Any = None, method: str | None = None, **kwargs: Any
    ) -> Any:
        how = {} if method is None else {"method": method}
        if rng is None or method == "unembed" or "mutable" in kwargs:
            return call(*args, rng=rng, **how, **kwargs)
        out, state = call(*args, rng=rng, mutable=["router"], **how, **kwargs)
        found.append(state["router"])
        return out

    return bound_of(apply).wrap(around)


def _parts(batch: dict[str, jax.Array]) -> int:
    """How many parts a batch is taken in, as far as the objective sees it."""
    return jax.tree.leaves(batch["shared"])[0].shape[0] if "shared" in batch else 1


def masked_tokens(
    batch: dict[str, jax.Array], rng: Any, *, mask_token: int, vocab_size: int, share: float = 0.15
) -> dict[str, jax.Array]:
    """The batch with a `share` of each row's tokens to be guessed (Devlin et al. 2018, section
    3.1): four in five become the mask, one in ten another token, and one in ten stays. `at` [B, n]
    says which, with their targets and weights [B, n].

    Each call draws anew; without an `rng`, in evaluation, always the same.
    """
    key = jax.random.key(0) if rng is None else jax.random.fold_in(rng, 1)
    draws = jax.random.split(key, 3)
    tokens, maskable = batch["tokens"], batch["weights"] > 0
    count = max(1, round(share * tokens.shape[1]))
    drawn, at = jax.lax.top_k(
        jnp.where(maskable, jax.random.uniform(draws[0], tokens.shape), -1.0), count
    )  # [B, count]
    wanted = jnp.ceil(share * maskable.sum(-1, keepdims=True))
    weights = ((jnp.arange(count) < wanted) & (drawn >= 0)).astype(jnp.float32)
    targets = jnp.take_along_axis(tokens, at, axis=1)
    what = jax.random.uniform(draws[1], at.shape)
    other = jnp.where(
        what < 0.9, jax.random.randint(draws[2], at.shape, 0, vocab_size, tokens.dtype), targets
    )
    new = jnp.where(weights > 0, jnp.where(what < 0.8, mask_token, other), targets)
    seen = jax.vmap(lambda row, i, x: row.at[i].set(x))(tokens, at, new)
    return {**batch, "tokens": seen, "at": at, "targets": targets, "weights": weights}


def masked_reading(**options: Any) -> Reading:
    """A masked language model's, with the options of `masked_tokens`."""
    return Reading(functools.partial(masked_tokens, **options), token_states, token_head)


def _token_cross_entropy(
    reading: Reading, chunk: int | None = None, router_loss: float | None = None
) -> Objective:
    return balanced(functools.partial(cross_entropy, reading, chunk=chunk), router_loss)


OBJECTIVE = NamedObjective(
    name="token_cross_entropy",
    tasks=("causal_lm", "masked_lm", "seq2seq_lm"),
    make=_token_cross_entropy,
    follows="the mean negative log-likelihood of the tokens that count",
)
