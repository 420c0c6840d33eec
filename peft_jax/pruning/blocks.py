"""Calibrated pruning block by block: each block is calibrated on what the pruned blocks before it
pass on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np

from peft_jax.core.calibrate import Statistic, calibrate_all
from peft_jax.core.coverage import Calibrated, ledger
from peft_jax.core.in_turn import in_turn
from peft_jax.core.reparametrised import find_sites
from peft_jax.core.select import Targets
from peft_jax.core.weight import Layout
from peft_jax.pruning.distribution import NEEDS as DISTRIBUTION_NEEDS
from peft_jax.pruning.distribution import OF_SCORES, allocate_sparsity, check_pattern
from peft_jax.pruning.pattern import NM, Pattern, make_pattern
from peft_jax.pruning.prune import check_score, prune
from peft_jax.pruning.scores import NEEDS, of_gradients


@ledger()
def prune_in_turn(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    sparsity: float | Mapping[str, Any] | None = None,
    *,
    score: str = "wanda",
    distribution: str = "uniform",
    pattern: Pattern | str = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    seed: int = 0,
    distribution_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """As `prune`, with the statistics of inputs that score and distribution need taken from
    `batches`.

    The distribution sees the model as it is; then one block after the other is pruned. A block is a
    layer: weights whose paths have the same number (`layers_3`). Stacked layers are one block; a
    tree of our decoder is taken apart by `unstack_layers`, and then runs once, one layer after the
    other; of other models the part up to each block runs anew. Raises ValueError as `prune` and
    `calibrate` do, and for scores of gradients, which are of the whole model.
    """
    if of_gradients(score):
        raise ValueError(
            f"score {score!r} is made of gradients of the whole model; use prune with statistics "
            "from gradients"
        )
    needed = cast("tuple[Statistic, ...]", NEEDS.get(score, ()))
    check_score(score, set(options) - {"compare"})
    check_pattern(pattern, sparsity, distribution)
    batches = list(batches)
    if needed and not batches:
        raise ValueError("there is no batch to calibrate on")
    where: dict[str, Any] = {"exclude": exclude, "layout": layout}
    sites = find_sites(params, targets=targets, **where)
    if not isinstance(make_pattern(pattern), NM) and not isinstance(sparsity, Mapping):
        assert sparsity is not None
        names = (
            *DISTRIBUTION_NEEDS.get(distribution, ()),
            *(needed if distribution in OF_SCORES else ()),
        )
        found = calibrate_all(apply, params, batches, names, targets=targets, **where)
        sparsity = allocate_sparsity(
            params,
            sparsity,
            distribution,
            score=score,
            statistics=found,
            targets=targets,
            seed=seed,
            **where,
            **(distribution_options or {}),
        )
        options = {"compare": "matrix", **options} if distribution in OF_SCORES else options

    def change(params: Any, paths: list[str], found: dict[str, Calibrated]) -> Any:
        here = (
            {p: np.asarray(sparsity[p]) for p in paths}
            if isinstance(sparsity, Mapping)
            else sparsity
        )
        rest: dict[str, Any] = {"targets": paths, "layout": layout, "seed": seed, **options}
        return prune(params, here, score=score, pattern=pattern, statistics=found, **rest)

    return in_turn(apply, params, batches, sites, needed, change, layout=layout)
