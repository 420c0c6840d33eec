"""Mixtures of experts (Shazeer et al. 2017, arXiv:1701.06538): a router picks k of E experts for
each token, none is dropped. How tokens and experts meet is in `routing`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from peft_jax.core.bind import register_rule
from peft_jax.models.routing import parallel_mixture


class Experts(nn.Module):
    """Stacked gated feed-forward layers: gate_up_proj [E, D, 2F], down_proj [E, F, D], called as
    Hugging Face's parameters.
    """

    num_experts: int
    intermediate_size: int
    activation: str
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        init, F = nn.initializers.normal(0.02), self.intermediate_size
        gate_up = self.param(
            "gate_up_proj", init, (self.num_experts, x.shape[-1], 2 * F), self.param_dtype
        )
        down = self.param("down_proj", init, (self.num_experts, F, x.shape[-1]), self.param_dtype)
        x = x if self.dtype is None else x.astype(self.dtype)
        return parallel_mixture(x, ids, weights, gate_up, down, activation=self.activation)


def _experts(
    module: Experts, params: Mapping[str, Any], x: jax.Array, ids: jax.Array, weights: jax.Array
) -> jax.Array:
    x = x if module.dtype is None else x.astype(module.dtype)
    return parallel_mixture(
        x, ids, weights, params["gate_up_proj"], params["down_proj"], activation=module.activation
    )


register_rule(Experts, _experts)


class Router(nn.Module):
    """Scores of the experts, by a weight [E, D] that is called as Hugging Face's, and is not among
    the "all-linear" ones.
    """

    num_experts: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param(
            "weight",
            nn.initializers.normal(0.02),
            (self.num_experts, x.shape[-1]),
            self.param_dtype,
        )
        dtype = self.dtype or x.dtype
        return x.astype(dtype) @ weight.astype(dtype).T


class SparseMLP(nn.Module):
    """A router over experts and, where the config has one, a shared expert that all tokens go
    through.

    The collection "router", where it is mutable, receives what `load_balancing_loss` needs: how
    often each expert was chosen [E], the sum of its probabilities [E], and the number of tokens,
    padding (segments of 0) left out.
    """

    config: Any
    dtype: Any
    param_dtype: Any
    shared_mlp: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        c = self.config
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
        )
        logits = Router(c.num_experts, self.dtype, self.param_dtype, name="gate")(x)
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, ids = jax.lax.top_k(probabilities, c.experts_per_token)
        if c.normalise_router:
            weights = weights / weights.sum(-1, keepdims=True)
        seen = (
            jnp.ones(x.shape[:2])
            if segment_ids is None
            else (jnp.broadcast_to(segment_ids, x.shape[:2]) > 0) * 1.0
        )
        chosen = jax.nn.one_hot(ids, c.num_experts).sum(-2)
        self.sow("router", "chosen", (chosen * seen[..., None]).sum((0, 1)))
        self.sow("router", "probabilities", (probabilities * seen[..., None]).sum((0, 1)))
        self.sow("router", "tokens", seen.sum())
        if (
            segment_ids is not None
        ):  # what pads a row goes to no expert; virtual tokens, of the segment -1, do
            ids = jnp.where(
                jnp.broadcast_to(segment_ids, x.shape[:2])[..., None] != 0, ids, c.num_experts
            )
        experts = Experts(
            c.num_experts, c.expert_size, c.activation, self.dtype, self.param_dtype, name="experts"
        )
        y = experts(x, ids, weights.astype(x.dtype))
        if c.shared_expert_size:
            shared = self.shared_mlp(
                c, self.dtype, self.param_dtype, c.shared_expert_size, name="shared_expert"
            )(x)
            y = y + jax.nn.sigmoid(dense(1, name="shared_expert_gate")(x)) * shared
        return y


def load_balancing_loss(router: Mapping[str, Any]) -> jax.Array:
    """E times the sum over experts of how often each is chosen times its mean probability, over all
    layers together (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6), from the collection
    "router" of one call.
    """
    leaves = jax.tree_util.tree_flatten_with_path(router)[0]

    def of(name):
        return jnp.stack(
            [jnp.ravel(x) for path, x in leaves if f"'{name}'" in jax.tree_util.keystr(path)]
        )

    tokens, experts = of("tokens").sum(), leaves[0][1].shape[-1]
    chosen, probabilities = (
        of(name).reshape(-1, experts).sum(0) for name in ("chosen", "probabilities")
    )
    return (chosen / tokens * (probabilities / tokens)).sum() * experts
