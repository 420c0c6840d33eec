"""Scores: how much each entry of a matrix matters, the least of which are pruned first.

Each is a function `(w [in, out], *, statistics, key, **options) -> score [in, out]`, float32.
`statistics` are those of the place that `NEEDS` names: "second_moment" [in] of the inputs
(`calibrate`), "gradient" and "squared_gradient" [in, out] (`gradients`, with `square` for the
second). `key` is for the random one.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.coverage import choose, reached
from peft_jax.core.reparametrised import Site
from peft_jax.core.weight import materialize, to_matrix
from peft_jax.pruning.masked import Masked, base_of
from peft_jax.pruning.pattern import Compare

Statistics = Mapping[str, jax.Array]


def magnitude(w: jax.Array, **_: Any) -> jax.Array:
    """|w| (Han et al. 2015, arXiv:1506.02626)."""
    return jnp.abs(w)


def random(w: jax.Array, *, key: jax.Array, **_: Any) -> jax.Array:
    """Drawn at random: the baseline."""
    return jax.random.uniform(key, w.shape)


def snip(w: jax.Array, *, statistics: Statistics, **_: Any) -> jax.Array:
    """|g w| for the loss's mean gradient g (Lee et al. 2019, arXiv:1810.02340, equation 6, without
    its constant).
    """
    return jnp.abs(statistics["gradient"] * w)


def taylor(w: jax.Array, *, statistics: Statistics, **_: Any) -> jax.Array:
    """The mean over batches of (g w)^2 (Molchanov et al. 2019, arXiv:1906.10771, equation 8)."""
    return statistics["squared_gradient"] * jnp.square(w)


def movement(w: jax.Array, *, statistics: Statistics, **_: Any) -> jax.Array:
    """-g w: high where training moves the weight away from zero (Sanh et al. 2020,
    arXiv:2005.07683, equation 3).
    """
    return -statistics["gradient"] * w


def wanda(w: jax.Array, *, statistics: Statistics, **_: Any) -> jax.Array:
    """|w| times the norm of its input (Sun et al. 2023, arXiv:2306.11695, equation 1)."""
    return jnp.abs(w) * jnp.sqrt(statistics["second_moment"])[:, None]


def ria(w: jax.Array, *, statistics: Statistics, power: float = 0.5) -> jax.Array:
    """Relative importance and activations (Zhang et al. 2024, ICLR, equation 4): the share of |w|
    in its input's and in its output's sum, times the norm of its input to a `power`.
    """
    size = jnp.abs(w)
    floor = 1e-30
    shares = size / (size.sum(0, keepdims=True) + floor) + size / (
        size.sum(1, keepdims=True) + floor
    )
    return shares * (jnp.sqrt(statistics["second_moment"]) ** power)[:, None]


SCORES: dict[str, Callable[..., jax.Array]] = {
    "magnitude": magnitude,
    "random": random,
    "snip": snip,
    "taylor": taylor,
    "movement": movement,
    "wanda": wanda,
    "ria": ria,
}
NEEDS: dict[str, tuple[str, ...]] = {
    "snip": ("gradient",),
    "taylor": ("squared_gradient",),
    "movement": ("gradient",),
    "wanda": ("second_moment",),
    "ria": ("second_moment",),
    "sparsegpt": ("covariance",),
}
WITHOUT_DATA = {name: "magnitude" for name in NEEDS}  # the score where there are no statistics
COMPARE: dict[str, Compare] = {
    "wanda": "output"
}  # what each paper ranks together, where not the whole matrix


def options_of(function: Callable[..., Any]) -> list[str]:
    """The own options of a score or distribution."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
        and p.name not in ("statistics", "scores", "key", "kept", "sparsity", "pattern")
    ]


def of_gradients(score: str) -> bool:
    """Whether a score is made of gradients of the whole model."""
    return any("gradient" in name for name in NEEDS.get(score, ()))


def check_options(
    kind: str, name: str, function: Callable[..., Any], options: Iterable[str]
) -> None:
    """Raise ValueError for an option that a score or distribution (`kind`) does not have."""
    known = options_of(function)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{kind} {name!r} has no option {unknown[0]!r}; its options: "
            f"{', '.join(known) or 'none'}"
        )


def check_statistics(
    sites: Iterable[Site],
    names: Iterable[str],
    statistics: Mapping[str, Statistics],
    wanted_by: str,
) -> None:
    """Raise ValueError naming the place whose statistics are missing or misshapen."""
    makers = {"gradient": "gradients(...)", "squared_gradient": "gradients(..., square=True)"}
    for site in sites:
        lead, n_in, n_out = site.sizes
        for name in names:
            shape = {"covariance": (*lead, n_in, n_in), "second_moment": (*lead, n_in)}.get(
                name, (*lead, n_in, n_out)
            )
            if site.path not in statistics.get(name, {}):
                maker = makers.get(name, f"calibrate(..., statistic={name!r})")
                raise ValueError(
                    f"{site.path} has no statistics {name!r}, which {wanted_by} needs; pass "
                    f"statistics={{{name!r}: {maker}}}, "
                    "for the same targets"
                )
            if (found := np.shape(statistics[name][site.path])) != shape:
                raise ValueError(
                    f"statistics {name!r} of {site.path} have shape {found}, expected {shape}"
                )


def known(
    score: str, site: Site, statistics: Statistics, instead: str | None = None
) -> jax.Array | None:
    """bool [*lead], which of a place's matrices the score has its `statistics` of (see `reached`);
    None where all.
    """
    if score not in NEEDS:
        return None
    found, instead = (
        [statistics[name] for name in NEEDS[score]],
        instead or repr(WITHOUT_DATA[score]),
    )
    return reached(site.path, found, site.sizes[0], method=f"score {score!r}", instead=instead)


def scores_of(
    score: str, site: Site, *, statistics: Mapping[str, Statistics], seed: int = 0
) -> tuple[jax.Array, jax.Array | None]:
    """(the scores [*lead, in, out] of one place's entries, of which matrices [*lead] they say
    anything); see `known`.

    Entries that are masked already have the lowest.
    """
    check_statistics([site], NEEDS.get(score, ()), statistics, f"score {score!r}")
    here = {name: statistics[name][site.path] for name in NEEDS.get(score, ())}
    there = known(score, site, here, "the mean sparsity")
    flat, kept, here, keys = flat_stack(site, base_of(site.base), here, seed)
    found = jax.lax.map(lambda a: score_matrix(score, *a), (flat, kept, here, keys))
    return found.reshape(*site.sizes[0], *found.shape[1:]), there


def score_matrix(
    score: str,
    w: jax.Array,
    kept: jax.Array,
    statistics: Statistics,
    key: jax.Array,
    options: Mapping[str, Any] | None = None,
    there: jax.Array | None = None,
) -> jax.Array:
    """The score [in, out] of one matrix; entries that are not `kept` have the lowest there is.

    Where not `there`, a bool, it is the score that needs no statistics.
    """
    found = SCORES[score](
        w, **({"statistics": statistics} if score in NEEDS else {"key": key}), **(options or {})
    )
    if there is not None:
        found = choose(there, found, SCORES[WITHOUT_DATA[score]](w))
    return jnp.where(kept, found, -jnp.inf)


def flat_stack(
    site: Site, w: Any, statistics: Mapping[str, jax.Array], seed: int
) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
    """(matrices [n, in, out], what is kept of them, statistics [n, ...], keys [n]) of a stack of
    n.
    """
    lead, count = site.sizes[0], max(1, math.prod(site.sizes[0]))
    matrices = to_matrix(materialize(w), site.in_axes, site.out_axes).astype(jnp.float32)
    kept = w.kept() if isinstance(w, Masked) else jnp.ones(matrices.shape, bool)

    def join(a):
        return a.reshape(count, *a.shape[len(lead) :])

    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(site.path.encode()))
    return (
        join(matrices),
        join(kept),
        jax.tree.map(join, dict(statistics)),
        jax.random.split(key, count),
    )
