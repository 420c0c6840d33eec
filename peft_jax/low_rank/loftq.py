"""LoftQ (Li et al. 2023, arXiv:2310.08659): a quantized base and LoRA factors that together start near the full weights.

In turns (algorithm 1): the weight less the factors' product is quantized; the factors are the best ones of their rank for what
quantization lost. With few bits this starts much nearer to the model than a quantized base and B = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.reparametrised import Site, find_sites
from peft_jax.core.tree import Targets, map_places, places
from peft_jax.core.weight import Layout, from_matrix
from peft_jax.low_rank.init import start
from peft_jax.low_rank.lora import LoRA, lora


def loftq(
    params: Any,
    key: jax.Array,
    *,
    quantize: Callable[[Any], Any],
    rank: int = 8,
    alpha: float | None = None,
    steps: int = 5,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    **options: Any,
) -> Any:
    """`quantize(params)` with LoRA nodes over it whose product makes up for the loss; `options` are those of `lora`.

    `quantize` maps a tree to the tree with its weights quantized, as `lambda tree: peft_jax.quantize(tree, "nf4")`; what it
    leaves alone gets factors that begin at a product of zero. Raises ValueError for `steps` below 1, and as `lora` does.
    """
    if steps < 1:
        raise ValueError(f"LoftQ needs at least one step, got steps={steps}")
    where: dict[str, Any] = {"targets": targets, "exclude": exclude, "layout": layout}
    sites = find_sites(params, **where)
    factors: dict[str, Any] = {}
    base = params
    for _ in range(steps):
        rest = lambda path, w, known=factors: _less(w, sites[path], known[path]) if path in known else w
        base = quantize(map_places(rest, params))
        quantized = places(base)
        lost = {p: s.matrix() - s._replace(base=quantized[p]).matrix() for p, s in sites.items()}
        factors = {p: start("pissa", w, rank, jnp.ones(w.shape[:-2]), key) for p, w in lost.items()}
    placed = lora(base, key, rank=rank, alpha=alpha, **where, **options)

    def begin(path: str, w: Any) -> Any:
        if path not in sites or not isinstance(w, LoRA):
            return w
        a, b = factors[path]
        root = jnp.sqrt(w.scale)[..., None, None]
        return w if jnp.abs(b).max() == 0 else w.replace(a=a / root, b=b / root)  # nothing lost: factors as LoRA's own

    return map_places(begin, placed)


def _less(w: Any, site: Site, factors: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The weight less the factors' product."""
    return from_matrix(site.matrix() - jnp.matmul(*factors), w.shape, site.in_axes, site.out_axes).astype(w.dtype)
