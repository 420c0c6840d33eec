"""LoftQ (Li et al. 2023, arXiv:2310.08659): a quantized base and LoRA factors that together start
near the full weights.

In turns (algorithm 1): the weight less the factors' product is quantized; the factors are the best
ones of their rank for what quantization lost. With few bits this starts much nearer to the model
than a quantized base and B = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.reparametrised import Site, find_sites
from peft_jax.core.tree import map_places, places
from peft_jax.core.weight import from_matrix
from peft_jax.core.where import Selection
from peft_jax.low_rank.init import start
from peft_jax.low_rank.lora import LoRA, lora


def loftq(
    params: Any,
    key: jax.Array,
    *,
    quantize: Callable[[Any], Any],
    rank: int = 8,
    rank_pattern: Mapping[str, int] | None = None,
    steps: int = 5,
    **options: Any,
) -> Any:
    """`quantize(params)` with LoRA nodes over it whose product makes up for the loss; `options` are
    those of `lora`.

    `quantize` maps a tree to the tree with its weights quantized, as `lambda tree:
    peft_jax.quantize(tree, "nf4")`; what it leaves alone gets factors that begin at a product of
    zero. Layers that get no LoRA are quantized as they are. Raises ValueError for `steps` below 1,
    and as `lora` does.
    """
    if steps < 1:
        raise ValueError(f"LoftQ needs at least one step, got steps={steps}")
    shared = {name: options[name] for name in options if hasattr(Selection, name)}
    sites = find_sites(params, **Selection.of(lora, shared).places)
    used = {p: _used(s, s.pattern(rank, rank_pattern or {})) for p, s in sites.items()}
    factors: dict[str, Any] = {}
    base = params
    for _ in range(steps):

        def rest(path, w, known=factors):
            return _less(w, sites[path], known[path]) if path in known else w

        base = quantize(map_places(rest, params))
        quantized = places(base)
        lost = {p: s.matrix() - s._replace(base=quantized[p]).matrix() for p, s in sites.items()}
        factors = {p: _factors(w, used[p], key) for p, w in lost.items()}
    placed = lora(base, key, rank=rank, rank_pattern=rank_pattern, **options)

    def begin(path: str, w: Any) -> Any:
        if path not in sites or not isinstance(w, LoRA):
            return w
        a, b = factors[path]
        root = jnp.sqrt(w.scale)[..., None, None]
        there = (
            jnp.abs(b).max((-2, -1), keepdims=True) > 0
        )  # where nothing was lost, factors as LoRA's own
        return w.replace(a=jnp.where(there, a / root, w.a), b=jnp.where(there, b / root, w.b))

    return map_places(begin, placed)


def _used(site: Site, ranks: Sequence[int]) -> jax.Array:
    """bool [*lead, r]: which of the largest rank's directions each layer has; none where it is left
    out.
    """
    own = [r * chosen for r, chosen in zip(ranks, site.chosen, strict=True)]
    return jnp.arange(max(ranks)) < site.by_layer(own)[..., None]


def _factors(lost: jax.Array, used: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best factors of each layer's rank for what quantization lost [*lead, in, out]."""
    a, b = start("pissa", lost, used.shape[-1], jnp.ones(lost.shape[:-2]), key)
    return a * used[..., None, :], b * used[..., :, None]


def _less(w: Any, site: Site, factors: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The weight less the factors' product."""
    return from_matrix(
        site.matrix() - jnp.matmul(*factors), w.shape, site.in_axes, site.out_axes
    ).astype(w.dtype)
