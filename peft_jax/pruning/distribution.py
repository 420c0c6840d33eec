"""Distributions: how much of each weight goes, so that a given share of all of them does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.calibrate import Statistic
from peft_jax.core.coverage import choose, ledger, reached
from peft_jax.core.reparametrised import Site, find_sites
from peft_jax.core.select import Targets, layer_paths
from peft_jax.core.values import fetched, is_traced
from peft_jax.core.weight import Layout
from peft_jax.pruning.pattern import make_pattern
from peft_jax.pruning.scores import check_options, check_statistics, scores_of

Sparsities = dict[str, Any]  # path -> [*lead]: of NumPy, or traced
Scores = Callable[
    [Site], tuple[jax.Array, jax.Array | None]
]  # -> [*lead, in, out], and of which [*lead] there are any

NEEDS: dict[str, tuple[Statistic, ...]] = {"owl": ("second_moment",)}
OF_SCORES = (
    "global",
)  # these compare the scores of all weights, which are then ranked over whole matrices


def uniform(sites: Mapping[str, Site], sparsity: float, **_: Any) -> Sparsities:
    """The same share of every weight."""
    return {path: np.full(site.sizes[0], sparsity) for path, site in sites.items()}


def erk(sites: Mapping[str, Site], sparsity: float, **_: Any) -> Sparsities:
    """Erdos-Renyi: densities in proportion to (in + out) / (in * out) (Mocanu et al. 2018,
    arXiv:1707.04780; for layers without kernels it is Evci et al.'s ERK, arXiv:1911.11134). Weights
    that would be more than dense are dense.
    """
    sizes = {p: (max(1, int(np.prod(s.sizes[0]))), *s.sizes[1:]) for p, s in sites.items()}
    budget = (1.0 - sparsity) * sum(n * i * o for n, i, o in sizes.values())
    dense: set[str] = set()
    while True:
        rest = budget - sum(n * i * o for p, (n, i, o) in sizes.items() if p in dense)
        scale = rest / max(sum(n * (i + o) for p, (n, i, o) in sizes.items() if p not in dense), 1)
        over = {p for p, (_, i, o) in sizes.items() if p not in dense and scale * (i + o) > i * o}
        if not over:
            break
        dense |= over
    density = {
        p: 1.0 if p in dense else scale * (i + o) / (i * o) for p, (_, i, o) in sizes.items()
    }
    return {p: np.full(s.sizes[0], 1.0 - density[p]) for p, s in sites.items()}


def overall(sites: Mapping[str, Site], sparsity: float, *, scores: Scores, **_: Any) -> Sparsities:
    """One threshold for the scores of all weights together ("global"); matrices that have none lose
    the mean share.
    """
    found: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for path, site in sites.items():
        score, there = scores(site)
        found[path] = fetched(score)
        known[path] = np.ones(site.sizes[0], bool) if there is None else fetched(there)
    return (_overall_traced if is_traced(found, known) else _overall)(found, known, sparsity)


def _overall(
    scores: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray], sparsity: float
) -> Sparsities:
    every = np.concatenate([s[known[path]].ravel() for path, s in scores.items()])
    remove = int(sparsity * every.size + 1e-6)
    if remove == 0:
        return {
            path: np.full(there.shape, sparsity if every.size == 0 else 0.0)
            for path, there in known.items()
        }
    threshold = np.partition(every, remove - 1)[remove - 1]
    return {
        path: np.where(known[path], (s <= threshold).mean((-2, -1)), sparsity)
        for path, s in scores.items()
    }


def _overall_traced(
    scores: Mapping[str, jax.Array], known: Mapping[str, Any], sparsity: float
) -> Sparsities:
    """`_overall` without values: what is not known sorts behind everything, so that sizes are those
    of all.
    """
    ranked = {
        path: jnp.where(jnp.asarray(known[path])[..., None, None], s, jnp.inf)
        for path, s in scores.items()
    }
    every = jnp.sort(jnp.concatenate([s.ravel() for s in ranked.values()]))
    count = sum(jnp.sum(known[path]) * math.prod(s.shape[-2:]) for path, s in scores.items())
    remove = jnp.floor(sparsity * count * (1 + 1e-6)).astype(jnp.int32)
    threshold = every[jnp.maximum(remove - 1, 0)]

    def share(s):
        return jnp.where(remove > 0, (s <= threshold).mean((-2, -1)), 0.0)

    return {
        path: jnp.where(known[path], share(s), jnp.where(count > 0, sparsity, 0.0))
        for path, s in ranked.items()
    }


def owl(
    sites: Mapping[str, Site],
    sparsity: float,
    *,
    statistics: Mapping[str, Mapping[str, jax.Array]],
    outlier: float = 5.0,
    spread: float = 0.08,
    **_: Any,
) -> Sparsities:
    """Outlier-weighted layerwise sparsity (Yin et al. 2024, arXiv:2310.05175): layers with more
    outliers keep more.

    An outlier is an entry whose Wanda score is `outlier` times the mean of its layer's, all of
    whose weights are taken together as in the authors' code; a layer's sparsity differs from the
    mean by at most `spread` (the paper's M and lambda). Weights of one layer have the same.
    """
    names = {path: _layer_names(site) for path, site in sites.items()}
    scores: dict[str, jax.Array] = {}
    total: dict[Any, Any] = {}
    entries: dict[Any, int] = {}
    for path, site in sites.items():
        second_moment = statistics["second_moment"][path]
        there = reached(
            path,
            [second_moment],
            site.sizes[0],
            method="distribution 'owl'",
            instead="the size of the weights",
        )
        scores[path] = choose(there, second_moment, jnp.ones_like(second_moment))
        size = int(np.prod(site.sizes[1:]))
        mean = fetched(_wanda(site.matrix(), scores[path]).mean((-2, -1)))
        mean = mean if is_traced(mean) else mean.astype(np.float64)
        for layer, value in zip(names[path], mean.reshape(-1), strict=True):
            total[layer] = total.get(layer, 0.0) + value * size
            entries[layer] = entries.get(layer, 0) + size
    xp: Any = jnp if is_traced(*total.values()) else np
    found: dict[Any, Any] = dict.fromkeys(entries, 0)
    for path, site in sites.items():
        bounds = xp.array(
            [outlier * total[n] / entries[n] for n in names[path]], np.float32
        ).reshape(site.sizes[0])
        over = fetched(
            (_wanda(site.matrix(), scores[path]) > bounds[..., None, None]).sum((-2, -1))
        )
        for layer, count in zip(names[path], over.reshape(-1), strict=True):
            found[layer] += count
    return _spread(sites, names, found, entries, sparsity, spread)


def _spread(
    sites: Mapping[str, Site],
    names: Mapping[str, list[Any]],
    outliers: Mapping[Any, Any],
    entries: Mapping[Any, int],
    sparsity: float,
    spread: float,
) -> Sparsities:
    """Sparsities that fall with a layer's share of outliers, by 2 * `spread` from the smallest
    share to the largest.
    """
    layers = list(entries)
    xp: Any = jnp if is_traced(*outliers.values()) else np
    ratio = xp.array([outliers[layer] / entries[layer] for layer in layers])
    ratio = (ratio - ratio.min()) / xp.maximum(ratio.max() - ratio.min(), 1e-30) * 2 * spread
    mean = xp.average(ratio, weights=np.array([entries[layer] for layer in layers], np.float64))
    of = dict(zip(layers, 1.0 - xp.clip(ratio - mean + 1.0 - sparsity, 0.0, 1.0), strict=True))
    return {
        path: xp.array([of[n] for n in names[path]]).reshape(site.sizes[0])
        for path, site in sites.items()
    }


@jax.jit
def _wanda(w: jax.Array, second_moment: jax.Array) -> jax.Array:
    return jnp.abs(w) * jnp.sqrt(second_moment)[..., None]


def _layer_names(site: Site) -> list[Any]:
    """For each entry of the leading axes the layer that it belongs to: its number, or the path
    where it has none.
    """
    lead = site.sizes[0]
    numbers = [n for _, n in layer_paths(site.path, lead[0] if lead else None)]
    inner = int(np.prod(lead[1:])) if lead else 1
    return [site.path if n is None else n for n in numbers for _ in range(inner)]


DISTRIBUTIONS: dict[str, Callable[..., Sparsities]] = {
    "uniform": uniform,
    "global": overall,
    "erk": erk,
    "owl": owl,
}


@ledger()
def allocate_sparsity(
    params: Any,
    sparsity: float,
    distribution: str = "uniform",
    *,
    score: str = "magnitude",
    statistics: Mapping[str, Mapping[str, jax.Array]] | None = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    seed: int = 0,
    **options: Any,
) -> Sparsities:
    """path -> sparsity [*lead] of each weight that `targets` name, so that `sparsity` of all their
    entries go.

    `distribution` is uniform, erk, global (by `score`, with the statistics that it needs) or owl
    (with the "second_moment" of inputs, and its `options` outlier and spread). Raises ValueError
    for a sparsity outside [0, 1), an unknown distribution and missing statistics.
    """
    check_sparsity(sparsity)
    check_distribution(distribution, options)
    function, statistics = DISTRIBUTIONS[distribution], statistics or {}
    sites = find_sites(params, targets=targets, exclude=exclude, layout=layout)
    check_statistics(
        sites.values(), NEEDS.get(distribution, ()), statistics, f"distribution {distribution!r}"
    )
    scores = functools.partial(scores_of, score, statistics=statistics, seed=seed)
    return function(sites, sparsity, statistics=statistics, scores=scores, **options)


def check_distribution(name: str, options: Iterable[str]) -> None:
    """Raise ValueError for an unknown distribution, or an option that it does not have."""
    if name not in DISTRIBUTIONS:
        raise ValueError(
            f"unknown distribution {name!r}; distributions: {', '.join(DISTRIBUTIONS)}"
        )
    check_options("distribution", name, DISTRIBUTIONS[name], options)


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError for a sparsity outside [0, 1)."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"sparsity, the share of entries that go, must lie in [0, 1), got {sparsity}"
        )


def check_pattern(pattern: Any, sparsity: Any, distribution: str) -> None:
    """Raise ValueError where an N:M pattern meets a sparsity or distribution that contradicts
    it.
    """
    found = make_pattern(pattern)
    fixed = getattr(found, "sparsity", None)
    if fixed is None:
        if sparsity is None:
            raise ValueError("sparsity is missing: the share of entries that go, as 0.5")
        return
    if distribution != "uniform" or (
        sparsity is not None and (not np.isscalar(sparsity) or abs(sparsity - fixed) > 1e-6)
    ):
        raise ValueError(
            f"pattern {found} prunes {fixed:.4g} of every weight: give no other sparsity or "
            "distribution"
        )
