"""`prune`: weights of a tree replaced by masked ones."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.coverage import choose, ledger
from peft_jax.core.reparametrised import Reparametrised, Site, find_sites
from peft_jax.core.select import Targets
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import map_places
from peft_jax.core.values import check_finite, is_traced
from peft_jax.core.weight import Layout, Weight, from_matrix, materialize
from peft_jax.pruning.block import block_sparse
from peft_jax.pruning.distribution import OF_SCORES, allocate_sparsity, check_pattern
from peft_jax.pruning.masked import Masked, base_of, masked, zeros_of
from peft_jax.pruning.nm import nm_sparse
from peft_jax.pruning.pattern import NM, Block, Compare, Pattern, make_pattern, removed, select_kept
from peft_jax.pruning.scores import (
    COMPARE,
    NEEDS,
    SCORES,
    WITHOUT_DATA,
    check_options,
    check_statistics,
    flat_stack,
    known,
    score_matrix,
)
from peft_jax.pruning.sparsegpt import sparsegpt

Statistics = Mapping[str, Mapping[str, jax.Array]]  # name of the statistic -> path -> array
PROCEDURES = {"sparsegpt": sparsegpt}  # they change the weights that stay as well


@ledger()
def prune(
    params: Any,
    sparsity: float | Mapping[str, Any] | None = None,
    *,
    score: str = "magnitude",
    distribution: str = "uniform",
    pattern: Pattern | str = None,
    compare: Compare | None = None,
    statistics: Statistics | None = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    seed: int = 0,
    distribution_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """`params` with a Masked weight at each place that `targets` name; in nodes that have a base,
    there.

    `sparsity` is the share of entries that go, or maps each path to its own (see
    `allocate_sparsity`, which `distribution` asks). `score` is magnitude, random, snip, taylor,
    movement, wanda, ria or sparsegpt, with its `options`; `statistics` maps those that it needs
    (`NEEDS`) to what `calibrate` and `gradients` give. `pattern` is "2:4" and its like, or blocks
    as "16x16". Entries are ranked within each "output" or the whole "matrix" (`compare`; each score
    has its paper's). What is masked already stays masked and counts. Layers of a stack are pruned
    one by one. Experts and weights that no token of the statistics reached are pruned by magnitude,
    which is said.

    Raises ValueError naming the place for a pattern that does not divide it, missing statistics,
    and quantized weights that a score would have to change; and for a sparsity outside [0, 1),
    unknown scores, distributions and options.
    """
    check_score(score, options)
    if distribution in OF_SCORES and score in PROCEDURES:
        raise ValueError(
            f"score {score!r} cannot be compared over all weights: the distribution "
            f"{distribution!r} needs another"
        )
    check_pattern(pattern, sparsity, distribution)
    pattern = make_pattern(pattern)
    sites = find_sites(params, targets=targets, exclude=exclude, layout=layout)
    for site in sites.values():
        if pattern is not None:
            pattern.check(site.path, *site.sizes[1:])
    check_statistics(sites.values(), NEEDS.get(score, ()), statistics or {}, f"score {score!r}")
    where: dict[str, Any] = {"targets": targets, "exclude": exclude, "layout": layout}
    if isinstance(pattern, NM):
        shares = {p: np.full(s.sizes[0], pattern.sparsity) for p, s in sites.items()}
    elif isinstance(sparsity, Mapping):
        shares = _given(sparsity, sites)
    else:
        assert sparsity is not None
        where |= {"seed": seed, **(distribution_options or {})}
        shares = allocate_sparsity(
            params, sparsity, distribution, score=score, statistics=statistics, **where
        )
    compare = compare or ("matrix" if distribution in OF_SCORES else COMPARE.get(score, "matrix"))
    if compare not in ("output", "matrix"):
        raise ValueError(f"compare must be 'output' or 'matrix', got {compare!r}")

    def place(path: str, w: Any) -> Any:
        if path not in sites:
            return w
        site = sites[path]
        here = {name: of[path] for name, of in (statistics or {}).items() if path in of}
        chosen = (
            np.reshape(site.chosen, (-1, *[1] * (len(site.sizes[0]) - 1)))
            if site.sizes[0]
            else site.chosen[0]
        )
        share = (jnp if is_traced(shares[path]) else np).where(chosen, shares[path], 0.0)
        if isinstance(pattern, NM):
            site.check_whole("follow one pattern")
        return _prune_base(
            site, w, share, here, score, pattern, compare, seed, tuple(options.items())
        )

    return map_places(place, params)


def check_score(score: str, options: Iterable[str]) -> None:
    """Raise ValueError for an unknown score, or an option that it does not have."""
    known = {**SCORES, **PROCEDURES}
    if score not in known:
        raise ValueError(f"unknown score {score!r}; scores: {', '.join(known)}")
    check_options("score", score, known[score], options)


def _given(sparsity: Mapping[str, Any], sites: Mapping[str, Site]) -> dict[str, np.ndarray]:
    if missing := sorted(set(sites) - set(sparsity)):
        raise ValueError(
            f"sparsity has nothing for {missing[0]}; allocate_sparsity with the same targets "
            "gives all"
        )
    shares = {
        p: np.broadcast_to(np.asarray(sparsity[p], np.float64), s.sizes[0])
        for p, s in sites.items()
    }
    for share in shares.values():
        for value in share.ravel():
            if not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"sparsity, the share of entries that go, must lie in [0, 1], got {value}"
                )
    return shares


def _prune_base(
    site: Site,
    w: Any,
    share: Any,
    statistics: Mapping[str, jax.Array],
    score: str,
    pattern: Pattern,
    compare: Compare,
    seed: int,
    options: Any,
) -> Any:
    """`w`, an array or a Weight, masked; where it is a node over a base, the innermost one is."""
    if isinstance(w, Reparametrised) and not isinstance(w, Masked):
        base = _prune_base(site, w.base, share, statistics, score, pattern, compare, seed, options)
        return w.replace(base=base)
    if getattr(w, "pruned", False) and not isinstance(w, Masked):
        raise ValueError(f"{site.path} is stored as a {type(w).__name__}; prune before compress")
    base = w.base if isinstance(w, Masked) else w
    if score in PROCEDURES and isinstance(base, Weight):
        raise ValueError(
            f"{site.path} is a {type(base).__name__}, whose weights {score} cannot change; prune "
            "first, or use wanda"
        )
    needed = {name: statistics[name] for name in NEEDS.get(score, ())}
    there = known(score, site, needed)
    flat, kept, needed, keys = flat_stack(site, w, needed, seed)
    there = None if there is None else there.reshape(-1)
    n_in, n_out = flat.shape[-2:]
    remove = removed(share.reshape(-1), n_in, n_out, pattern, compare)
    shares = jnp.asarray(share.reshape(-1), jnp.float32)
    new, kept = _prune_stack(
        flat,
        kept,
        needed,
        keys,
        shares,
        jnp.asarray(remove),
        there,
        score,
        pattern,
        compare,
        options,
    )
    check_finite(new, f"{site.path} holds, or its statistics lead to, numbers that are not finite")
    lead = site.sizes[0]
    kept = kept.reshape(*lead, n_in, n_out)
    if score in PROCEDURES:
        base = from_matrix(
            new.reshape(*lead, n_in, n_out), w.shape, site.in_axes, site.out_axes
        ).astype(w.dtype)
    return masked(base, kept, in_axes=site.in_axes, out_axes=site.out_axes, pattern=pattern)


@functools.partial(jax.jit, static_argnums=(7, 8, 9, 10))
def _prune_stack(
    matrices: jax.Array,
    kept: jax.Array,
    statistics: Any,
    keys: jax.Array,
    share: jax.Array,
    remove: jax.Array,
    there: jax.Array | None,
    score: str,
    pattern: Pattern,
    compare: Compare,
    options: Any,
) -> tuple[jax.Array, jax.Array]:
    """(matrices as they become, bool of what is kept), both [n, in, out], one matrix after the
    other.

    Where not `there` [n], the score needs no statistics.
    """

    def by_score(
        score: str, inputs: Any, options: Any, there: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        w, kept, of, key, _, remove, _ = inputs
        found = score_matrix(score, w, kept, of, key, options, there)
        return w, select_kept(found, remove, pattern, compare) & kept

    def one(inputs: Any) -> tuple[jax.Array, jax.Array]:
        w, kept, of, _, share, _, there = inputs
        if score not in PROCEDURES:
            return by_score(score, inputs, dict(options), there)
        found = PROCEDURES[score](
            w, statistics=of, kept=kept, sparsity=share, pattern=pattern, **dict(options)
        )
        return (
            found
            if there is None
            else choose(there, found, by_score(WITHOUT_DATA[score], inputs, {}, None))
        )

    return jax.lax.map(one, (matrices, kept, statistics, keys, share, remove, there))


def compress(params: Any) -> Any:
    """Masked weights stored without their zeros: those of N:M patterns as NMSparse, those of blocks
    as BlockSparse.

    Weights whose mask follows no pattern, or that lie over something other than an array, stay as
    they are. Under `jax.jit` blocks are stored with room for all of them, since how many are kept
    is not known then.
    """

    def store(w: Any) -> Any:
        if isinstance(w, Masked) and not isinstance(w.base, Weight):
            return {NM: nm_sparse, Block: block_sparse}.get(type(w.pattern), lambda w: w)(w)
        return w.replace(base=store(w.base)) if isinstance(w, Reparametrised) else w

    return map_places(lambda _, w: store(w), params)


def densify(params: Any) -> Any:
    """Pruned weights replaced by the arrays, with zeros in them, that they stand for; in nodes that
    have a base too.
    """

    def back(w: Any) -> Any:
        if getattr(w, "pruned", False):
            return materialize(w)
        return w.replace(base=back(w.base)) if isinstance(w, Reparametrised) else w

    return map_places(lambda _, w: back(w), params)


def sparsity_of(
    params: Any, *, targets: Targets = "all-linear", exclude: Targets = ()
) -> dict[str, np.ndarray]:
    """path -> share of zeros [*lead] of each weight that `targets` name: of the mask where there is
    one, else of the array.
    """
    sites = find_sites(params, targets=targets, exclude=exclude)
    return {path: fetch(zeros_of(base_of(site.base))) for path, site in sites.items()}
