"""How the loss answers when one layer alone is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from peft_jax.core.calibrate import Statistic, calibrate_all
from peft_jax.core.coverage import ledger
from peft_jax.core.in_turn import layer_blocks
from peft_jax.core.reparametrised import find_sites
from peft_jax.core.select import Targets, layer_paths
from peft_jax.core.weight import Layout
from peft_jax.pruning.prune import densify, prune
from peft_jax.pruning.scores import NEEDS, of_gradients


@ledger()
def sensitivity(
    apply: Callable[..., Any],
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    shares: Sequence[float],
    *,
    score: str = "magnitude",
    statistics: Mapping[str, Mapping[str, jax.Array]] | None = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, dict[float, float]]:
    """layer -> {share that is pruned: mean of `loss(params, batch)` over the batches}, the share 0
    included.

    A layer is what `prune_in_turn` takes as a block; other layers stay dense. `statistics` are
    those of gradients; those of inputs are taken from the batches. Raises ValueError as `prune`
    does.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("there is no batch to calibrate on")
    measure = jax.jit(loss)

    def mean(tree):
        return float(np.mean([float(measure(tree, b)) for b in batches]))

    dense, found = mean(params), {}
    sites = find_sites(params, targets=targets, exclude=exclude, layout=layout)
    needed = () if of_gradients(score) else cast("tuple[Statistic, ...]", NEEDS.get(score, ()))
    for paths in layer_blocks(sites):
        number = layer_paths(paths[0], None)[0][1]
        of = calibrate_all(apply, params, batches, needed, targets=paths, layout=layout)
        where: dict[str, Any] = {
            "targets": paths,
            "layout": layout,
            "seed": seed,
            "statistics": {**(statistics or {}), **of},
        }
        trees = {s: densify(prune(params, s, score=score, **where, **options)) for s in shares if s}
        name = f"layer {number}" if number is not None else "the rest" if found else "all layers"
        found[name] = {0.0: dense, **{s: mean(tree) for s, tree in trees.items()}}
    return found
